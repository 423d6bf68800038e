"""How many training steps a time budget buys each of several drafters.

Steps are timed in turns, because a shared machine's speed varies. A drafter that joins later is timed beside one whose
steps are known and gets steps in proportion, so the budget is still the first call's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence

from tqdm import tqdm

from speedstack.eval.results.ablation import AblationTimes, RowTime, StepTimes
from speedstack.eval.results.environment import describe_environment
from speedstack.train.core.distributed import World
from speedstack.train.core.loop import train_step
from speedstack.train.core.trainer import Trainer
from speedstack.train.drafter.recipe import DrafterRecipe


def time_steps(
    contestants: Mapping[str, tuple[DrafterRecipe, Trainer]], world: World, num_timed_steps: int
) -> list[StepTimes]:
    """Step times of every contestant, one step per turn, in order."""
    step_ms: dict[str, list[float]] = {row: [] for row in contestants}
    for step in tqdm(range(num_timed_steps), desc="timing steps", unit="round", leave=False):
        for row, (recipe, trainer) in contestants.items():
            started = time.perf_counter()
            train_step(recipe, recipe.config, world, trainer, step)
            step_ms[row].append(1e3 * (time.perf_counter() - started))
    return [
        StepTimes(row=row, step_ms=tuple(values), median_ms=statistics.median(values[1:]))
        for row, values in step_ms.items()
    ]


def first_times(measured: Sequence[StepTimes], budget_seconds: float) -> AblationTimes:
    """Each row's steps in `budget_seconds`, at least one."""
    return AblationTimes(
        budget_seconds=budget_seconds,
        rows=tuple(_with_steps(times, 1e3 * budget_seconds / times.median_ms) for times in measured),
        environment=describe_environment(),
    )


def added_times(measured: Sequence[StepTimes], known: AblationTimes) -> AblationTimes:
    """`known` with the other rows of `measured`, in proportion to its first row, which is in `known`."""
    reference, *added = measured
    before = known.row(reference.row)
    assert before is not None
    rows = [_with_steps(times, before.num_steps * reference.median_ms / times.median_ms, reference) for times in added]
    return known.model_copy(update={"rows": (*known.rows, *rows)})


def _with_steps(times: StepTimes, num_steps: float, beside: StepTimes | None = None) -> RowTime:
    return RowTime(**times.model_dump(), num_steps=max(1, round(num_steps)), beside=beside)
