"""Draws which folders import which: `python tools/import_graph.py docs/imports.svg`.

Imports are read as text, lazy ones too. An arrow that follows from others is left out, so that the picture shows the
floors.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("quant", "dflash", "runtime", "eval", "train")
# Drawn as one room each: what lies below is nobody else's business.
CLOSED = (
    "quant",
    "dflash",
    "eval/report",
    "eval/speed",
    "eval/lm_eval",
    "runtime/backends",
    "runtime/model",
    "runtime/plan",
)
COLUMN, ROW, WIDTH, HEIGHT = 178, 92, 160, 40

Graph = dict[str, set[str]]  # module, or room, -> those of ours that it imports


def product_files(root: Path = ROOT) -> dict[str, Path]:
    """Module name -> file. The packages lie beside speedstack/, which has links to them."""
    found = {}
    for folder in ("speedstack", *PACKAGES):
        for file in sorted((root / folder).rglob("*.py")):
            parts = file.relative_to(root).with_suffix("").parts
            if folder == "speedstack" and len(parts) > 2 and parts[1] in PACKAGES:
                continue
            name = ".".join(parts if folder == "speedstack" else ("speedstack", *parts))
            found[name.removesuffix(".__init__")] = file
    return found


def imported_names(file: Path) -> Iterator[str]:
    """Dotted names of all that a file imports: modules, and what is taken from them."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{file}: an import is relative"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and re.fullmatch(r"speedstack(\.\w+)+:\w+", str(node.value)):
            yield str(node.value).partition(":")[0]


def import_graph(files: dict[str, Path]) -> Graph:
    graph: Graph = {}
    for module, file in files.items():
        targets = {name if name in files else name.rpartition(".")[0] for name in imported_names(file)}
        graph[module] = (targets & files.keys()) - {module}
    return graph


def room_of(module: str, files: dict[str, Path]) -> str:
    """The room of a module: its file's folder, or the closed folder that it lies in."""
    folder = files[module].relative_to(ROOT).parent.as_posix()
    for closed in CLOSED:
        if folder == closed or folder.startswith(closed + "/"):
            return closed
    return folder


def room_graph(files: dict[str, Path]) -> Graph:
    """Room -> rooms that its files import. Anybody may read the package's version."""
    graph: Graph = {}
    for module, targets in import_graph(files).items():
        room = room_of(module, files)
        others = {room_of(target, files) for target in targets if target != "speedstack"}
        graph.setdefault(room, set()).update(others - {room})
        for other in others:
            graph.setdefault(other, set())
    return graph


def reachable(graph: Graph, room: str) -> set[str]:
    """All rooms below one. Raises ValueError for a circle."""
    below: set[str] = set()
    waiting = [*graph[room]]
    while waiting:
        other = waiting.pop()
        if other == room:
            raise ValueError(f"{room} is in a circle of imports")
        if other not in below:
            below.add(other)
            waiting += graph[other]
    return below


def reduced(graph: Graph) -> Graph:
    """The graph without arrows that follow from others."""
    below = {room: reachable(graph, room) for room in graph}
    return {room: {o for o in rooms if not any(o in below[other] for other in rooms)} for room, rooms in graph.items()}


def draw(graph: Graph) -> str:
    """An SVG: a room lies above all that it imports."""
    arrows = reduced(graph)
    levels: dict[str, int] = {}

    def level(room: str) -> int:
        if room not in levels:
            levels[room] = 1 + max((level(other) for other in graph[room]), default=-1)
        return levels[room]

    floors: dict[int, list[str]] = {}
    for room in sorted(graph):
        floors.setdefault(level(room), []).append(room)
    centre: dict[str, float] = {}
    for number in sorted(floors):
        # Above the middle of what it imports, as far as its neighbours leave room.
        floor = sorted(floors[number], key=lambda room: _mean([centre[other] for other in arrows[room]]))
        floors[number] = floor
        for index, room in enumerate(floor):
            centre[room] = (index + 0.5 - len(floor) / 2) * COLUMN
    width = max(len(floor) for floor in floors.values()) * COLUMN + 20
    height = len(floors) * ROW + 20
    top = {room: height - ROW * (number + 1) for number, floor in floors.items() for room in floor}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img" aria-label="Which folders import which; all arrows point down">',
        "<style>text{font:12.5px ui-monospace,Menlo,Consolas,monospace;fill:#1f2328;text-anchor:middle}"
        "rect{fill:#f6f8fa;stroke:#57606a}path{fill:none;stroke:#8c959f}</style>",
        '<rect width="100%" height="100%" style="fill:#fff;stroke:none"/>',
    ]
    for room, others in arrows.items():
        for other in others:
            x, y = width / 2 + centre[room], top[room] + HEIGHT
            to_x, to_y = width / 2 + centre[other], top[other]
            bend = (to_y - y) / 2
            parts.append(
                f'<path d="M{x:.0f} {y}C{x:.0f} {y + bend:.0f} {to_x:.0f} {to_y - bend:.0f} {to_x:.0f} {to_y}"/>'
            )
    for room in graph:
        x = width / 2 + centre[room]
        parts.append(f'<rect x="{x - WIDTH / 2:.0f}" y="{top[room]}" width="{WIDTH}" height="{HEIGHT}" rx="6"/>')
        parts.append(f'<text x="{x:.0f}" y="{top[room] + 25}">{escape(room)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="the SVG")
    out = parser.parse_args().out
    out.write_text(draw(room_graph(product_files())), encoding="utf-8")
    print(f"imports: {out}")


if __name__ == "__main__":
    main()
