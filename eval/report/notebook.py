"""Helpers for notebooks: cells that name in a line what a result lacks, and short texts on results."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from speedstack.eval.report.figures import NothingToDraw
from speedstack.eval.results.ablation import AblationGrid
from speedstack.eval.results.schema import Document, Environment
from speedstack.eval.results.speed import ENGINE, ENGINE_DRAFTER, TRANSFORMERS, AcceptanceResult, TimingResult
from speedstack.eval.results.suite import Comparison

T = TypeVar("T")
DocumentT = TypeVar("DocumentT", bound=Document)


class Markdown(str):
    """Text that a notebook renders."""

    def _repr_markdown_(self) -> str:
        return str(self)


def load(document: type[DocumentT], path: str | Path | None) -> DocumentT | None:
    """The result in a file, or None without a path. Raises ValueError as `Document.load`."""
    return document.load(path) if path else None


def show(make: Callable[..., T], *parts: Any) -> T | None:
    """What `make` returns; plain text is printed. Prints a line instead if a part is None or has nothing to draw."""
    missing = [name for name, part in zip(inspect.signature(make).parameters, parts, strict=False) if part is None]
    if missing:
        print(f"not shown: there is no {' and no '.join(missing)} in what was read")
        return None
    try:
        made = make(*parts)
    except NothingToDraw as lack:
        print(f"not shown: {lack}")
        return None
    if type(made) is str:
        print(made)
        return None
    return made


def acceptance_text(acceptance: AcceptanceResult) -> str:
    """Tokens per round, pooled and by text."""
    overall = acceptance.overall
    return (
        f"{overall.acceptance_length:.2f} tokens a round over {overall.num_rounds} rounds, "
        f"{overall.mean_of_responses:.2f} as the mean of {overall.num_prompts} texts; "
        f"blocks of {acceptance.block_size}, temperature {acceptance.temperature:g}"
    )


def timing_text(timing: TimingResult, environment: Environment) -> str:
    """The machine, speedups over the engine, and a line per missing contestant.

    `environment` is used if the timing has none.
    """
    machine = timing.environment or environment
    lines = [
        f"{machine.cpu_model}, {machine.num_cores} cores, {timing.num_prompts} prompts, {timing.num_repeats} repeats"
    ]
    for entry in timing.contestants:
        speedup = timing.speedup(entry.name, ENGINE)
        if entry.name != ENGINE and speedup is not None:
            lines.append(f"{entry.name} against {ENGINE}: {speedup:.2f}x")
    reasons = {absent.name: f"did not run: {absent.reason}" for absent in timing.unavailable}
    for name in dict.fromkeys((ENGINE, ENGINE_DRAFTER, TRANSFORMERS, *reasons)):
        if timing.contestant(name) is None:
            lines.append(f"{name} {reasons.get(name, 'was not timed')}")
    return "\n".join(lines)


def comparison_table(comparison: Comparison) -> Markdown:
    return Markdown(comparison.markdown())


def grid_table(grid: AblationGrid) -> Markdown:
    """All rows of an ablation, with the errors of those that failed."""
    failed = f"{grid.num_failed} of {len(grid.rows)} rows failed, and stand with their errors.\n\n"
    return Markdown((failed if grid.num_failed else "") + grid.table())
