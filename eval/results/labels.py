"""Short names that tell results and runs apart: the end of each path, as much of it as differs from all others."""

from collections.abc import Sequence
from pathlib import Path


def short_names(paths: Sequence[Sequence[str]]) -> list[str]:
    """A name a path, given as its parts: the last ones of each, as few as tell all of them apart.

    Paths that are equal are numbered from the second on, so that no name is given twice.
    """
    num_different = len(set(map(tuple, paths)))
    names = ["/".join(path) for path in paths]
    for num_parts in range(1, max(map(len, paths), default=0) + 1):
        names = ["/".join(path[-num_parts:]).replace("//", "/") for path in paths]
        if len(set(names)) == num_different:
            break
    return numbered(names)


def short_file_names(names: Sequence[str]) -> list[str]:
    """The same for files, without their suffixes."""
    return short_names([Path(name).with_suffix("").parts if Path(name).name else () for name in names])


def numbered(names: Sequence[str]) -> list[str]:
    """The names, with a number behind each that was there before: "a", "a (2)"."""
    given: set[str] = set()
    result = []
    for name in names:
        unique, number = name, 1
        while unique in given:
            number += 1
            unique = f"{name} ({number})"
        given.add(unique)
        result.append(unique)
    return result


def printable(text: str) -> str:
    """A path's or an argument's text with bytes that are no UTF-8 escaped, so that it can be written to a file."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
