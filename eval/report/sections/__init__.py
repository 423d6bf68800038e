"""The kinds of result that a report shows, each with the module that turns its results into sections of the page.

A kind is a line of `MODULES` and a module here that has two names:

    DOCUMENT             the class of the result: `check(content, path)` gives one, or raises ValueError
    sections(found)      the sections that show some results of the kind, one or many

Modules are imported when a result of their kind is there: the schemas of some benchmarks import what they measure.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from speedstack.eval.report.page import Section
from speedstack.eval.results.labels import short_file_names
from speedstack.eval.results.schema import Environment
from speedstack.eval.results.suite import BLOCK

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
    "serving": "microbench.serving",
    "timing": "timing",
    "lm_bench": "microbench.lm_bench",
    "drafter_cost": "microbench.drafter_cost",
    "qat_cost": "microbench.qat_cost",
    "quant-bench": "microbench.quant_bench",
    "conversion": "microbench.conversion",
    "kernel_resources": "microbench.kernel_resources",
}

T = TypeVar("T")


@dataclass(frozen=True)
class Found(Generic[T]):
    """A result and where it was read; `name` is empty for the measurements of the one run that a report is of."""

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
    name = _short_name(one, found)
    return f"{title}: {name}" if name else title


def each(title: str, found: Sequence[Found[T]], section: Callable[[T, str], Section]) -> list[Section]:
    """A section a result, made by `section(result, title)`, with its command and file.

    Of several, headlines say which one they are of.
    """
    return [
        section(one.result, titled(title, one, found)).made_by(one.command, one.name).of_run(_short_name(one, found))
        for one in found
    ]


def _short_name(one: Found[Any], found: Sequence[Found[Any]]) -> str:
    """What tells a result from the others of its kind; empty for one alone, and for that of the run itself."""
    if len(found) == 1 or not one.name:
        return ""
    named = [other for other in found if other.name]
    names = short_file_names([other.name for other in named])
    return next(name for other, name in zip(named, names, strict=True) if other is one)


def _module(kind: str) -> Any:
    return importlib.import_module(f"{__name__}.{MODULES[kind]}")
