"""Reads a compiler's assembly: innermost loops that multiply and add vectors, and what else they do."""

import re
from dataclasses import dataclass

_X86 = {
    "jump": r"j\w+\s+(\.L\w+)",
    "multiply_add": r"vf(?:n?m)(?:add|sub)\d+ps\s.*%[yz]mm",
    # Single lanes taken out and put in, and single floats computed with or moved.
    "scalar": r"vp(?:extr|insr)[bwdq]|v(?:extract|insert)ps|vmovss|vf(?:n?m)(?:add|sub)\d+ss|v(?:mul|add)ss",
    "stack": r".*\(%r[sb]p\).*%[xyz]mm|.*%[xyz]mm\d+,\s*-?\d*\(%r[sb]p\)",
}
_AARCH64 = {
    "jump": r"(?:b(?:\.\w+)?|t?cbn?z\s+\w+,|tbn?z\s+\w+,\s*#?\d+,)\s+(\.L\w+)",
    "multiply_add": r"fml[as]\s+v\d+\.4s",
    "scalar": r"[us]mov\s|ins\s+v|mov\s+v\d+\.[bhsd]\[|fn?m(?:add|sub)\s|fml[as]\s+s",
    "stack": r"(?:ldr|str|ldp|stp)\s+q.*\[sp",
}


@dataclass(frozen=True)
class Loop:
    """An innermost loop: how many of its instructions are what. `stack`: they read or write a vector there."""

    function: str
    num_instructions: int
    multiply_add: int
    scalar: int
    stack: int


def vector_loops(assembly: str, least: int = 4) -> list[Loop]:
    """Innermost loops with at least `least` multiply-adds of whole vectors."""
    kinds = {kind: re.compile(pattern) for kind, pattern in (_AARCH64 if "\tfmla\t" in assembly else _X86).items()}
    jump, found = kinds.pop("jump"), []
    for function, lines in _functions(assembly):
        for body in _innermost(lines, jump):
            counts = {kind: sum(bool(pattern.match(line)) for line in body) for kind, pattern in kinds.items()}
            if counts["multiply_add"] >= least:
                found.append(Loop(function, len(body), **counts))
    return found


def _functions(assembly: str) -> list[tuple[str, list[str]]]:
    """Names, mangled, and lines without indentation and without directives."""
    functions: list[tuple[str, list[str]]] = []
    is_inside = False
    for line in assembly.splitlines():
        label = re.match(r"([A-Za-z_]\S*):", line)
        if label:
            functions.append((label[1], []))
            is_inside = True
        elif line.strip() == ".cfi_endproc":
            is_inside = False
        elif is_inside and re.match(r"\.L\w+:|\s+[a-z]", line):
            functions[-1][1].append(line.strip())
    return functions


def _innermost(lines: list[str], jump: re.Pattern[str]) -> list[list[str]]:
    labels = {line[:-1]: at for at, line in enumerate(lines) if line.endswith(":")}
    loops = []
    for end, line in enumerate(lines):
        found = jump.match(line)
        if found and labels.get(found[1], end) < end:
            loops.append((labels[found[1]], end))
    return [
        [line for line in lines[begin:end] if not line.endswith(":")]
        for begin, end in loops
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in loops)
    ]
