"""Short names that tell results and runs apart: path endings as long as needed."""

from collections.abc import Sequence
from pathlib import Path


def short_names(paths: Sequence[Sequence[str]]) -> list[str]:
    """A name per path (given as parts): its last parts, as few as tell all paths apart. Equal paths are numbered."""
    num_different = len(set(map(tuple, paths)))
    names = ["/".join(path) for path in paths]
    for num_parts in range(1, max(map(len, paths), default=0) + 1):
        names = ["/".join(path[-num_parts:]).replace("//", "/") for path in paths]
        if len(set(names)) == num_different:
            break
    return numbered(names)


def short_file_names(names: Sequence[str]) -> list[str]:
    """The same for files, without suffixes."""
    return short_names([Path(name).with_suffix("").parts if Path(name).name else () for name in names])


def numbered(names: Sequence[str]) -> list[str]:
    """Names with a number appended to repeated ones: "a", "a (2)"."""
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
    """A path or an argument with undecodable bytes escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
