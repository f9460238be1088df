"""Draws docs/images/house.svg: the folders of the package and the imports between them, read from the code.

    python docs/_house.py

A room stands above those that it imports. An arrow that follows from two others is left out.
"""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from html import escape
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "emim_solo"
PICTURE = REPOSITORY / "docs" / "images" / "house.svg"
WHAT = {
    "cli": "emim-solo COMMAND",
    "plugin": "solo-learn's METHODS",
    "benchmark": "methods × seeds",
    "tuning": "search of recipes",
    "report": "one HTML page",
    "training": "a run and its row",
    "evaluation": "k-NN, linear, score",
    "checkpoints": "open, export",
    "suite": "solo-learn",
    "emim": "loss, measures",
    "results": "rows, tables",
    "images": "folders, held out",
    "ground": "files, configs, errors",
}
"""A few words in each room."""
_WIDTH, _HEIGHT, _GAP, _FLOOR = 190, 52, 24, 84
_STYLE = (
    ".room{fill:#f3f6f9;stroke:#8a98a5}.name{font-weight:600;fill:#16212b}.what{fill:#44525e;font-size:12.5px}"
    ".down{fill:none;stroke:#0072b2;stroke-width:1.5;marker-end:url(#tip)}"
)


def rooms() -> dict[str, set[str]]:
    """Each room and those that it imports; ``cli`` stands for the modules beside the folders."""
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).parts
        if parts == ("__init__.py",):
            continue
        imported = found.setdefault(parts[0] if len(parts) > 1 else "cli", set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "emim_solo":
                names = [f"{node.module}.{alias.name}".split(".") for alias in node.names]
                imported |= {name[1] for name in names if (PACKAGE / name[1]).is_dir()}
    return {room: imported - {room} for room, imported in found.items()}


def floors(graph: dict[str, set[str]]) -> dict[str, int]:
    """Number of the floor of each room, the ground being 0."""
    numbers: dict[str, int] = {}
    for room in TopologicalSorter(graph).static_order():
        numbers[room] = max((numbers[below] + 1 for below in graph[room]), default=0)
    return numbers


def draw() -> str:
    """The picture."""
    graph = rooms()
    numbers = floors(graph)
    top = max(numbers.values())
    on_floor = {number: sorted(room for room in numbers if numbers[room] == number) for number in range(top + 1)}
    width = max(map(len, on_floor.values())) * (_WIDTH + _GAP) + _GAP
    height = (top + 1) * _FLOOR + _GAP
    places = {}
    for number, names in on_floor.items():
        left = (width - len(names) * (_WIDTH + _GAP) + _GAP) / 2
        for place, room in enumerate(names):
            places[room] = (left + place * (_WIDTH + _GAP), _GAP + (top - number) * _FLOOR)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif" '
        'font-size="14" role="img" aria-label="Rooms of the package above those that they import">',
        f'<style>{_STYLE}</style><defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8z" fill="#0072b2"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for room in sorted(graph):
        for below in sorted(graph[room] - {far for near in graph[room] for far in _below(graph, near)}):
            (x1, y1), (x2, y2) = places[room], places[below]
            lines.append(f'<path class="down" d="M{x1 + _WIDTH / 2:g} {y1 + _HEIGHT} {x2 + _WIDTH / 2:g} {y2 - 2}"/>')
    for room, (x, y) in sorted(places.items()):
        lines.append(
            f'<rect class="room" x="{x:g}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="5"/>'
            f'<text class="name" x="{x + 12:g}" y="{y + 22}">{room}</text>'
            f'<text class="what" x="{x + 12:g}" y="{y + 41}">{escape(WHAT[room])}</text>'
        )
    return "\n".join([*lines, "</svg>", ""])


def _below(graph: dict[str, set[str]], room: str) -> set[str]:
    """Every room that is reached from one."""
    reached = set(graph[room])
    for below in graph[room]:
        reached |= _below(graph, below)
    return reached


if __name__ == "__main__":
    PICTURE.write_text(draw())
