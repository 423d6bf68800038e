"""The kinds of result that a report shows, each with the module that turns its results into sections of the page.

A kind is a line of `MODULES` and a module here that has two names:

    DOCUMENT             the class of the result: `check(content, path)` gives one, or raises ValueError
    sections(found)      the sections that show some results of the kind, one or many

Modules are imported when a result of their kind is there: the schemas of some benchmarks import what they measure.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from speedstack.eval.page import Section
from speedstack.eval.results import Environment
from speedstack.eval.suite_result import BLOCK

# In the order of the page.
MODULES = {
    "quality": "quality",
    "eval": "suite",
    "comparison": "comparison",
    "ablation": "ablation",
    "ptq": "ptq",
    "qat_runs": "qat_runs",
    "sensitivity": "sensitivity",
    "acceptance": "acceptance",
    "drafter_ablation": "drafter_ablation",
    "serving": "serving",
    "timing": "timing",
    "lm_bench": "lm_bench",
    "drafter_cost": "drafter_cost",
    "qat_cost": "qat_cost",
    "quant-bench": "quant_bench",
    "conversion": "conversion",
    "kernel_resources": "kernel_resources",
}

T = TypeVar("T")


@dataclass(frozen=True)
class Found(Generic[T]):
    """A result and where it was read; `name` is empty for the measurements of a run of our own."""

    name: str
    result: T
    command: str | None = None


def kind_of(content: Any) -> str | None:
    """The kind that a result's JSON says it is of; None for JSON that is no result. A suite's lies beside lm-eval's."""
    if not isinstance(content, dict):
        return None
    block = content.get(BLOCK, content)
    kind = block.get("kind") if isinstance(block, dict) else None
    return kind if isinstance(kind, str) and "schema_version" in block else None


def check(kind: str, content: Any, path: str) -> Any:
    """The result that `content` is. Raises ValueError, naming `path`, for content that does not fit the kind."""
    return _module(kind).DOCUMENT.check(content, path)


def sections(kind: str, found: Sequence[Found[Any]]) -> list[Section]:
    """The sections of all results of one kind."""
    return _module(kind).sections(found)


def environment_of(result: Any) -> Environment | None:
    """Where a result was measured; None where it does not say."""
    return getattr(getattr(result, "block", result), "environment", None)


def titled(title: str, one: Found[Any], found: Sequence[Found[Any]]) -> str:
    """The title, with a short name of the result when there are several of its kind."""
    if len(found) == 1 or not one.name:
        return title
    parts = {other.name: Path(other.name).with_suffix("").parts for other in found if other.name}
    for num_parts in range(1, max(map(len, parts.values())) + 1):
        short = {name: "/".join(each[-num_parts:]) for name, each in parts.items()}
        if len(set(short.values())) == len(short):
            return f"{title}: {short[one.name]}"
    return f"{title}: {one.name}"


def each(title: str, found: Sequence[Found[T]], section: Callable[[T, str], Section]) -> list[Section]:
    """A section a result, made by `section(result, title)`, with its command and file."""
    return [section(one.result, titled(title, one, found)).made_by(one.command, one.name) for one in found]


def _module(kind: str) -> Any:
    return importlib.import_module(f"{__name__}.{MODULES[kind]}")
