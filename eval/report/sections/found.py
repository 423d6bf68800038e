"""A result as a report found it, and section titles for several of one kind."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from speedstack.eval.report.page import Section
from speedstack.eval.results.labels import short_file_names

T = TypeVar("T")


@dataclass(frozen=True)
class Found(Generic[T]):
    """A result and its file; `name` is empty for the run's own measurements."""

    name: str
    result: T
    command: str | None = None


def titled(title: str, one: Found[Any], found: Sequence[Found[Any]]) -> str:
    """The title, with a short name if there are several results."""
    name = _short_name(one, found)
    return f"{title}: {name}" if name else title


def each(title: str, section: Callable[[T, str], Section]) -> Callable[[Sequence[Found[T]]], list[Section]]:
    """A function that makes one section per result with `section(result, title)`, and adds command and file.

    If there are several, headlines name their result.
    """

    def sections(found: Sequence[Found[T]]) -> list[Section]:
        return [
            section(one.result, titled(title, one, found))
            .made_by(one.command, one.name)
            .of_run(_short_name(one, found))
            for one in found
        ]

    return sections


def _short_name(one: Found[Any], found: Sequence[Found[Any]]) -> str:
    """What tells a result from the others; empty for a single one and for the run's own."""
    if len(found) == 1 or not one.name:
        return ""
    named = [other for other in found if other.name]
    names = short_file_names([other.name for other in named])
    return next(name for other, name in zip(named, names, strict=True) if other is one)
