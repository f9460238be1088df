"""The house as docs/design.md tells it: every module has one room, and no import leads up or around."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "emim_solo"
PAGE = (REPOSITORY / "docs" / "design.md").read_text()
MODULES = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")}
ROOT = "__init__.py"  # has the version and names that are loaded when they are asked for: it imports nothing
ROOMS = {
    room: re.findall(r"`([\w/]+\.py)`", files)
    for room, files in re.findall(r"^\| \*\*(\w+)\*\* \| (.*?) \|", PAGE, re.M)
}


def file_of(name: str) -> str | None:
    """The file of a module of ours, None of any other name."""
    path = "/".join(name.split(".")[1:])
    return next((file for file in (f"{path}.py", f"{path}/__init__.py".lstrip("/")) if file in MODULES), None)


def imports(file: str) -> set[str]:
    """What a module imports of ours, wherever the statement stands; for the type checker alone is not imported."""
    tree = ast.parse((PACKAGE / file).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{file}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name.startswith("emim_solo.") and file_of(name) else node.module for name in names}
    return {own for name in found if name.partition(".")[0] == "emim_solo" and (own := file_of(name))}


GRAPH = {file: imports(file) for file in MODULES}


def test_every_module_is_in_one_room_of_the_table_and_every_room_in_the_picture() -> None:
    named = sorted(file for files in ROOMS.values() for file in files)
    assert named == sorted(MODULES)
    picture = (REPOSITORY / "docs" / "images" / "house.svg").read_text()
    assert re.findall(r'class="name"[^>]*>(\w+)<', picture) == list(ROOMS)


def test_imports_lead_to_a_modules_own_room_or_further_down() -> None:
    floor = {file: number for number, files in enumerate(ROOMS.values()) for file in files}
    upward = [
        f"{file} -> {other}"
        for file, others in GRAPH.items()
        for other in others - {ROOT}
        if floor[other] < floor[file]
    ]
    assert upward == []
    assert GRAPH[ROOT] == set()


def test_imports_make_no_circle_even_those_inside_functions() -> None:
    assert "suite/face.py" in GRAPH["architectures.py"] and "checkpoints.py" in GRAPH["suite/resuming.py"], (
        "they are seen"
    )
    order = list(TopologicalSorter(GRAPH).static_order())
    assert set(order) == MODULES
