"""Draws which rooms of the house import which: `python tools/import_graph.py docs/imports.svg`.

A room is a folder of Python files. Imports are read as text, lazy ones too. An arrow that follows from others (a room
that is reached through a third) is left out, so that the picture shows the floors.
"""

from __future__ import annotations

import argparse
import ast
import re
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("speedstack", "train", "eval", "runtime", "quant", "dflash")
# Drawn as one room each: what lies below is nobody else's business.
CLOSED = ("quant", "dflash", "eval/report", "eval/speed", "eval/lm_eval", "runtime/backends", "runtime/plan")
NAMED = re.compile(r"speedstack(\.\w+)+:\w+")  # as the command line names its verbs
COLUMN, ROW, WIDTH, HEIGHT = 178, 92, 160, 40


def room_of(path: str) -> str:
    """The room of a file, by its path from the root: its folder, or the closed folder that it lies in."""
    folder = path.rpartition("/")[0]
    for closed in CLOSED:
        if folder == closed or folder.startswith(closed + "/"):
            return closed
    return folder


def file_of(module: str) -> str | None:
    """The file of one of our modules, by its path from the root; None for others' modules and for names."""
    parts = module.split(".")
    if parts[0] != "speedstack":
        return None
    base = "/".join(parts[1:] if len(parts) > 1 and parts[1] in FOLDERS else parts)
    for candidate in (f"{base}.py", f"{base}/__init__.py"):
        if (ROOT / candidate).is_file():
            return candidate
    return None


def imported(path: Path) -> set[str]:
    """Files that a file imports, now or when a verb is called."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names += [node.module] if any(file_of(name) is None for name in names) else []
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and NAMED.fullmatch(node.value):
            names = [node.value.partition(":")[0]]
        found |= {file for name in names if (file := file_of(name)) is not None}
    return found - {"speedstack/__init__.py"}  # the version, which anybody may read


def room_graph() -> dict[str, set[str]]:
    """Room -> rooms that its files import."""
    graph: dict[str, set[str]] = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if any((ROOT / parent).is_symlink() for parent in Path(name).parents):
                continue
            room = graph.setdefault(room_of(name), set())
            room |= {room_of(other) for other in imported(path)} - {room_of(name)}
    for rooms in list(graph.values()):
        for room in rooms:
            graph.setdefault(room, set())
    return graph


def reachable(graph: dict[str, set[str]], room: str) -> set[str]:
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


def reduced(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The graph without arrows that follow from others."""
    below = {room: reachable(graph, room) for room in graph}
    return {room: {o for o in rooms if not any(o in below[other] for other in rooms)} for room, rooms in graph.items()}


def draw(graph: dict[str, set[str]]) -> str:
    """An SVG: a room lies above all that it imports."""
    levels: dict[str, int] = {}

    def level(room: str) -> int:
        if room not in levels:
            levels[room] = 1 + max((level(other) for other in graph[room]), default=-1)
        return levels[room]

    floors: dict[int, list[str]] = {}
    for room in sorted(graph):
        floors.setdefault(level(room), []).append(room)
    arrows = reduced(graph)
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
    out.write_text(draw(room_graph()), encoding="utf-8")
    print(f"imports: {out}")


if __name__ == "__main__":
    main()
