"""Results of a drafter ablation: rows of one table, each a way of drafting, trained on the same data for the same time.

Shapes of the file and the table printed from it; what is run is `speedstack.ablation.drafters`'s business.
"""

import statistics
from collections.abc import Sequence
from typing import Any, Literal

from speedstack.eval.results.kinds import Document, Environment, Record

_COLUMNS = (
    "row",
    "seeds",
    "steps",
    "step ms",
    "tau simulated",
    "tau served",
    "T = 1",
    "T = 1, shared noise",
    "code",
    "tokens/s",
    "over plain",
)


class DraftedSet(Record):
    """Acceptance on one set of prompts: simulated on the target's greedy text, and as the engine decoded it.

    At temperature 1 a drafter proposes its most probable tokens, or those that the target's own noise would draw from
    its distribution. `None` where a row has no such figure: no engine decodes with the autoregressive baseline.
    """

    num_prompts: int
    tau_simulated: float
    tau_served: float | None = None
    tau_served_t1: float | None = None
    tau_served_t1_shared_noise: float | None = None
    survival: tuple[float, ...] = ()
    tokens_per_second: float | None = None


class DrafterRun(Record):
    """One row trained with one seed. `seconds` is the training alone; a baseline that is not trained has 0 steps."""

    row: str
    seed: int
    num_steps: int
    seconds: float
    heldout: DraftedSet
    code: DraftedSet | None = None


class StepTimes(Record):
    """Times of optimizer steps of one row, rows taking turns; the median leaves the first out."""

    row: str
    step_ms: tuple[float, ...]
    median_ms: float


class RowTime(StepTimes):
    """Time of an optimizer step of a row, and how many steps the budget buys.

    `beside`: set on a row that was added to others; the row with known steps that it took turns with then, on a machine
    that may have been busier or quieter than before. Its own steps are the other's, in proportion to the two medians.
    """

    num_steps: int
    beside: StepTimes | None = None


class AblationTimes(Document):
    """Measured before the first run of a row; every run of it has its number of steps from here."""

    kind: Literal["drafter_ablation_times"] = "drafter_ablation_times"
    budget_seconds: float
    rows: tuple[RowTime, ...]
    environment: Environment

    def row(self, name: str) -> RowTime | None:
        """The row called `name`, None if it has not been timed."""
        return next((entry for entry in self.rows if entry.row == name), None)

    def comparable_ms(self, name: str) -> float | None:
        """Median step time of a row on the machine as the first rows found it, None if the row has not been timed."""
        entry = self.row(name)
        if entry is None or entry.beside is None:
            return None if entry is None else entry.median_ms
        reference_ms = self.comparable_ms(entry.beside.row)
        assert reference_ms is not None
        return entry.median_ms * reference_ms / entry.beside.median_ms


class DrafterAblation(Document):
    """All runs of an ablation, with what each row changes in the base config."""

    kind: Literal["drafter_ablation"] = "drafter_ablation"
    target_sha256: str
    budget_seconds: float
    num_new_tokens: int
    rows: dict[str, dict[str, Any]]
    times: AblationTimes
    runs: tuple[DrafterRun, ...]
    environment: Environment

    def of(self, row: str) -> list[DrafterRun]:
        """The runs of one row, by seed."""
        return sorted((run for run in self.runs if run.row == row), key=lambda run: run.seed)

    def table(self) -> str:
        """A Markdown table, a row each: means over seeds, and the extremes of the headline."""
        lines = [
            f"| {' | '.join(_COLUMNS)} |",
            f"|{'---|' * len(_COLUMNS)}",
        ]
        plain = self.of("plain")
        for row in self.rows:
            runs = self.of(row)
            if not runs:
                continue
            step_ms = self.times.comparable_ms(row)
            simulated = [run.heldout.tau_simulated for run in runs]
            cells = [
                row,
                str(len(runs)),
                str(runs[0].num_steps),
                "" if step_ms is None else f"{step_ms:.0f}",
                f"{statistics.mean(simulated):.3f} ({min(simulated):.2f} .. {max(simulated):.2f})",
                _mean([run.heldout.tau_served for run in runs], 3),
                _mean([run.heldout.tau_served_t1 for run in runs], 3),
                _mean([run.heldout.tau_served_t1_shared_noise for run in runs], 3),
                _mean([run.code.tau_served or run.code.tau_simulated for run in runs if run.code], 3),
                _mean([run.heldout.tokens_per_second for run in runs], 0),
            ]
            base = statistics.mean(run.heldout.tau_simulated for run in plain) if plain else None
            cells.append(f"{statistics.mean(simulated) / base:.2f}x" if base else "")
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"


def _mean(values: Sequence[float | None], num_digits: int) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.mean(known):.{num_digits}f}" if known else ""
