"""Results of ablations: a grid of format, modules, method, drafter and temperature; and a list of drafters.

`speedstack.ablation` runs them, `speedstack.eval.report` draws them.
"""

import csv
import io
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from speedstack.eval.results.schema import Document, Environment, Record, Spread
from speedstack.eval.results.table import Column, Table, words
from speedstack.support.files import write_atomically

Served = Literal["packed", "dequantized", "unquantized"]
# More than this part of a core taken by others while tokens/s were measured makes the figure doubtful.
BUSY_CORES = 0.25
PLAIN = "plain"


class AblationRow(Record):
    """One combination and its measurements; None where nothing was measured, or where `error` says why not.

    `format` and `modules` are empty for the full-precision model. `served`: weights packed in the runtime, or
    dequantized (then tokens/s are not the format's). `bits_per_weight` is of quantized modules with scales; bytes are
    of the model and of its routed experts as the format stores them. KL is from the full-precision model on
    `num_tokens` held-out tokens; `score` is the grid's `score_metric`. tau is tokens per round, greedy and at the row's
    temperature. `tokens_per_second` excludes the first token; meanwhile other processes kept `busy_cores_of_others`
    cores busy. `predicted_tokens_per_second` is the cost model's for the grid's `gpu`.
    """

    name: str
    format: str
    modules: str
    method: str
    drafter: str
    temperature: float
    served: Served | None = None
    bits_per_weight: float | None = None
    model_bytes: int | None = None
    expert_bytes: int | None = None
    num_tokens: int | None = None
    kl_nats: float | None = None
    kl_stderr_nats: float | None = None
    perplexity: float | None = None
    top1_agreement: float | None = None
    score: float | None = None
    score_stderr: float | None = None
    tau_greedy: float | None = None
    tau_greedy_stderr: float | None = None
    tau: float | None = None
    tau_stderr: float | None = None
    tokens_per_second: Spread | None = None
    busy_cores_of_others: float | None = None
    predicted_tokens_per_second: float | None = None
    steps: dict[str, str] = Field(default={})
    error: str | None = None

    @property
    def model_name(self) -> str:
        """The row's model, without its drafter."""
        return "full precision" if self.method == "none" else f"{self.format} {self.modules} {self.method}"

    @property
    def is_doubtful(self) -> bool:
        """Whether other processes disturbed the measurement of tokens/s."""
        return (self.busy_cores_of_others or 0.0) > BUSY_CORES


class AblationGrid(Document):
    """All rows of a grid, failed ones included. `num_jobs` steps ran at once; `notes` qualify the numbers."""

    kind: Literal["ablation"] = "ablation"
    model_sha256: str
    corpus_sha256: str
    config: dict[str, Any]
    score_metric: str | None
    gpu: str | None
    num_jobs: int
    rows: tuple[AblationRow, ...]
    notes: tuple[str, ...] = ()
    environment: Environment

    @property
    def num_failed(self) -> int:
        return sum(row.error is not None for row in self.rows)

    def models(self) -> list[AblationRow]:
        """The first row of each model."""
        first: dict[str, AblationRow] = {}
        for row in self.rows:
            first.setdefault(row.model_name, row)
        return list(first.values())

    def save_csv(self, path: str | Path) -> Path:
        """Write a CSV column per field, with median and quartiles of tokens/s; returns the path."""
        quartiles = ("median", "q1", "q3")
        columns = [name for name in AblationRow.model_fields if name not in ("tokens_per_second", "steps")]
        text = io.StringIO(newline="")
        names = [*columns, *(f"tokens_per_second_{name}" for name in quartiles)]
        writer = csv.DictWriter(text, fieldnames=names, lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            rate = row.tokens_per_second
            known = {} if rate is None else {f"tokens_per_second_{name}": getattr(rate, name) for name in quartiles}
            writer.writerow(row.model_dump(include=set(columns)) | known)
        return write_atomically(path, text.getvalue())

    def save_markdown(self, path: str | Path) -> Path:
        """Write the table and the notes; returns the path."""
        return write_atomically(path, self.table() + "".join(f"\n{note}\n" for note in self.notes))

    def table(self) -> str:
        """Markdown without empty columns."""
        if not self.rows:
            return "No rows.\n"
        return Table.of(_grid_columns(self), self.rows).without_empty_columns().markdown() + "\n"


def _grid_columns(grid: AblationGrid) -> tuple[Column, ...]:
    has_drafter = any(row.drafter != "none" for row in grid.rows)
    return (
        words("model", "model_name"),
        *((words("drafter, temperature", _drafter),) if has_drafter else ()),
        Column("served", "", "served"),
        Column("bits a weight", "", "bits_per_weight", ".4g"),
        Column("model, MB", "", "model_bytes", ".2f", 1e-6),
        Column("experts, MB", "", "expert_bytes", ".2f", 1e-6),
        Column("KL, millinats a token", "", "kl_nats", ".4g", 1e3, error="kl_stderr_nats", error_form=".2g"),
        Column("perplexity", "", "perplexity", ".3f"),
        Column("top-1, %", "", "top1_agreement", ".2f", 100),
        Column(grid.score_metric or "score", "", "score", ".3f", error="score_stderr"),
        Column("tau, greedy", "", "tau_greedy", ".2f", error="tau_greedy_stderr"),
        Column("tau", "", lambda row: row.tau if row.temperature else None, ".2f", error="tau_stderr"),
        Column("tokens/s", "", _rate),
        Column(f"tokens/s on {grid.gpu}, predicted", "", "predicted_tokens_per_second", ".0f"),
        Column("error", "", "error"),
    )


def _drafter(row: AblationRow) -> str:
    return "" if row.drafter == "none" else f"for the {row.drafter} model, {row.temperature:g}"


def _rate(row: AblationRow) -> str | None:
    rate = row.tokens_per_second
    return None if rate is None else f"{rate.median:.0f}{'*' if row.is_doubtful else ''}"


class DraftedSet(Record):
    """Acceptance on one set of prompts: simulated on the target's greedy text, and as the engine decoded it.

    At temperature 1 a drafter proposes its most probable tokens, or samples with the target's own noise. None where a
    row has no such value: no engine decodes with the autoregressive baseline.
    """

    num_prompts: int
    tau_simulated: float
    tau_served: float | None = None
    tau_served_t1: float | None = None
    tau_served_t1_shared_noise: float | None = None
    survival: tuple[float, ...] = ()
    tokens_per_second: float | None = None


class DrafterRun(Record):
    """One row trained with one seed in `seconds`; an untrained baseline has 0 steps."""

    row: str
    seed: int
    num_steps: int
    seconds: float
    heldout: DraftedSet
    code: DraftedSet | None = None


class StepTimes(Record):
    """Optimizer steps of one row, interleaved with other rows; the median excludes the first."""

    row: str
    step_ms: tuple[float, ...]
    median_ms: float


class RowTime(StepTimes):
    """A row's step time, and the number of steps it gets.

    `beside` is set on rows added later: the known row it was interleaved with, whose steps it gets in proportion to the
    medians.
    """

    num_steps: int
    beside: StepTimes | None = None


class AblationTimes(Document):
    """Step times measured before training; they set the number of steps of every run."""

    kind: Literal["drafter_ablation_times"] = "drafter_ablation_times"
    budget_seconds: float
    rows: tuple[RowTime, ...]
    environment: Environment

    def row(self, name: str) -> RowTime | None:
        """The row called `name`, or None."""
        return next((entry for entry in self.rows if entry.row == name), None)

    def comparable_ms(self, name: str) -> float | None:
        """A row's median step time at the machine's speed when the first rows were measured; None if unknown."""
        entry = self.row(name)
        if entry is None or entry.beside is None:
            return None if entry is None else entry.median_ms
        reference_ms = self.comparable_ms(entry.beside.row)
        assert reference_ms is not None
        return entry.median_ms * reference_ms / entry.beside.median_ms


@dataclass(frozen=True)
class DrafterMeans:
    """A row's means over the seeds that have the value; `changes` are the row's in the base config.

    `tau_code` is as served, or simulated where none was served.
    """

    row: str
    changes: dict[str, Any]
    num_seeds: int
    num_steps: int
    step_ms: float | None
    tau_simulated: float
    least_tau_simulated: float
    most_tau_simulated: float
    over_plain: float | None
    tau_served: float | None
    tau_served_t1: float | None
    tau_served_t1_shared_noise: float | None
    tau_code: float | None
    tokens_per_second: float | None


class DrafterAblation(Document):
    """All runs of an ablation; `rows` maps a row to its changes in the base config."""

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

    def means(self) -> list[DrafterMeans]:
        """The rows that were trained."""
        return [self._means(row) for row in self.rows if self.of(row)]

    def _means(self, row: str) -> DrafterMeans:
        runs, time = self.of(row), self.times.row(row)
        sets = [run.heldout for run in runs]
        simulated = [one.tau_simulated for one in sets]
        plain = _mean(run.heldout.tau_simulated for run in self.of(PLAIN))
        return DrafterMeans(
            row=row,
            changes=self.rows[row],
            num_seeds=len(runs),
            num_steps=runs[0].num_steps,
            step_ms=None if time is None else time.median_ms,
            tau_simulated=statistics.mean(simulated),
            least_tau_simulated=min(simulated),
            most_tau_simulated=max(simulated),
            over_plain=statistics.mean(simulated) / plain if plain else None,
            tau_served=_mean(one.tau_served for one in sets),
            tau_served_t1=_mean(one.tau_served_t1 for one in sets),
            tau_served_t1_shared_noise=_mean(one.tau_served_t1_shared_noise for one in sets),
            tau_code=_mean(run.code.tau_served or run.code.tau_simulated for run in runs if run.code),
            tokens_per_second=_mean(one.tokens_per_second for one in sets),
        )

    def table(self) -> str:
        """Markdown: means over seeds, and the extremes of simulated tau."""
        columns = (
            words("row", "row"),
            Column("seeds", "", "num_seeds"),
            Column("steps", "", "num_steps"),
            Column("step ms", "", lambda mean: self.times.comparable_ms(mean.row), ".0f"),
            Column("tau simulated", "", _simulated),
            Column("tau served", "", "tau_served", ".3f"),
            Column("T = 1", "", "tau_served_t1", ".3f"),
            Column("T = 1, shared noise", "", "tau_served_t1_shared_noise", ".3f"),
            Column("code", "", "tau_code", ".3f"),
            Column("tokens/s", "", "tokens_per_second", ".0f"),
            Column("over plain", "", "over_plain", ".2f", suffix="x"),
        )
        return Table.of(columns, self.means()).markdown() + "\n"


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def _simulated(mean: DrafterMeans) -> str:
    return f"{mean.tau_simulated:.3f} ({mean.least_tau_simulated:.2f} .. {mean.most_tau_simulated:.2f})"
