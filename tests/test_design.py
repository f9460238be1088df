"""The house: folders of the package are its rooms, and imports lead one way, between rooms and between modules."""

from __future__ import annotations

import ast
import runpy
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

from emim_solo import checkpoints
from emim_solo.ground.moved import MOVED

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "emim_solo"
MODULES = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")}
ROOT = "__init__.py"  # the version, and names that are loaded when they are asked for


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
    old = {name for name in found if name.removeprefix("emim_solo.") in MOVED}
    assert not old, f"{file} imports by the paths of version 0.2: {old}"
    return {own for name in found if name.partition(".")[0] == "emim_solo" and (own := file_of(name))}


def room(file: str) -> str:
    """The folder that a module is in; a module beside the folders is a door of its own."""
    return file.partition("/")[0]


GRAPH = {file: imports(file) for file in MODULES}


def test_imports_between_rooms_lead_one_way() -> None:
    rooms: dict[str, set[str]] = {}
    for file, others in GRAPH.items():
        rooms.setdefault(room(file), set()).update({room(other) for other in others - {ROOT}} - {room(file)})
    order = list(TopologicalSorter(rooms).static_order())  # raises where there is a circle
    assert order[0] == "ground"
    assert {"suite", "training"} <= rooms["benchmark"], "they are seen"


def test_the_picture_of_the_house_is_drawn_from_the_code() -> None:
    house = runpy.run_path(str(REPOSITORY / "docs" / "_house.py"))
    assert house["draw"]() == house["PICTURE"].read_text(), "draw it again: python docs/_house.py"


def test_the_page_says_how_many_lines_go_with_release_102() -> None:
    lines = sum(len(path.read_text().splitlines()) for path in (PACKAGE / "suite" / "release_102").glob("*.py"))
    assert f"its {lines} lines of Python could be deleted" in (REPOSITORY / "docs" / "design.md").read_text()


def test_imports_make_no_circle_even_those_inside_functions() -> None:
    assert "suite/api.py" in GRAPH["checkpoints/architectures.py"], "they are seen"
    assert set(TopologicalSorter(GRAPH).static_order()) == MODULES


def test_import_paths_of_version_0_2_lead_to_their_modules() -> None:
    for old, new in MOVED.items():
        assert import_module(f"emim_solo.{old}") is import_module(f"emim_solo.{new}")
    # A module of version 0.2 that is a folder now.
    for name in ("Checkpoint", "DamagedCheckpoint", "open_checkpoint", "open_checkpoints"):
        assert getattr(checkpoints, name) is getattr(checkpoints.opening, name)
