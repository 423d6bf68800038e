"""The table of an ablation: a row a combination of number format, modules, method, drafter and temperature.

Shapes of the file, and what is printed from it; what is run is `verbs.ablate`'s business. A notebook reads the
file with `AblationGrid.load` and draws it with `speedstack.eval.report.ablation_figures`.
"""

import csv
import io
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from speedstack.eval.results.schema import Document, Environment, Record, Spread
from speedstack.support.files import write_atomically

Served = Literal["packed", "dequantized", "unquantized"]
# More than this part of a core taken by others while tokens/s were measured makes the figure doubtful.
BUSY_CORES = 0.25


class AblationRow(Record):
    """One combination and what was measured of it; None where nothing was, or where `error` says why not.

    `format` and `modules` are empty for the full-precision model. `served` says how the runtime held the weights while
    it was measured: packed, or as ordinary numbers of the same values (then tokens/s are not those of the format).
    `bits_per_weight` is of the quantized modules, scales included; bytes are of the whole model and of its routed
    experts as the format would store them, the rest as the checkpoint has it.
    KL is from the full-precision model, on `num_tokens` held-out tokens; `score` is the grid's `score_metric`.
    tau is tokens a round: of greedy decoding, and at the row's temperature. `tokens_per_second` counts from the second
    token on, one text at a time; `busy_cores_of_others` are the cores that other processes kept busy meanwhile.
    `predicted_tokens_per_second` is the cost model's for the grid's `gpu`.
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
        """The row's model, whatever drafts for it."""
        return "full precision" if self.method == "none" else f"{self.format} {self.modules} {self.method}"


class AblationGrid(Document):
    """All rows of a grid, those that failed among them, and what they have in common.

    `config` is the verb's, `score_metric` the suite's task and metric, `num_jobs` how many steps ran at once, and
    `notes` what a reader of the numbers has to know.
    """

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
        """Rows with an error."""
        return sum(row.error is not None for row in self.rows)

    def models(self) -> list[AblationRow]:
        """One row a model, the first of those that differ by drafter and temperature alone."""
        first: dict[str, AblationRow] = {}
        for row in self.rows:
            first.setdefault(row.model_name, row)
        return list(first.values())

    def save_csv(self, path: str | Path) -> Path:
        """Write the rows as CSV, a column a field, tokens/s as its median and quartiles; returns the path."""
        return write_atomically(path, self._csv())

    def _csv(self) -> str:
        rows = []
        for row in self.rows:
            cells = row.model_dump(exclude={"tokens_per_second", "steps"})
            rate = row.tokens_per_second
            for name in ("median", "q1", "q3"):
                cells[f"tokens_per_second_{name}"] = None if rate is None else getattr(rate, name)
            rows.append(cells)
        text = io.StringIO(newline="")
        rate_columns = [f"tokens_per_second_{name}" for name in ("median", "q1", "q3")]
        columns = [name for name in AblationRow.model_fields if name not in ("tokens_per_second", "steps")]
        writer = csv.DictWriter(text, fieldnames=[*columns, *rate_columns], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def save_markdown(self, path: str | Path) -> Path:
        """Write the table and the notes; returns the path."""
        return write_atomically(path, self.table() + "".join(f"\n{note}\n" for note in self.notes))

    def table(self) -> str:
        """A Markdown table. Empty columns are left out; a row that failed ends in its error."""
        if not self.rows:
            return "No rows.\n"
        columns = list(zip(*[_cells(row) for row in self.rows], strict=True))
        shown = [(heading, column) for heading, column in zip(self._headings(), columns, strict=True) if any(column)]
        lines = [
            f"| {' | '.join(heading for heading, _ in shown)} |",
            f"|{'|'.join('---' if index < 2 else '---:' for index in range(len(shown)))}|",
        ]
        lines += [f"| {' | '.join(cells)} |" for cells in zip(*[column for _, column in shown], strict=True)]
        return "\n".join(lines) + "\n"

    def _headings(self) -> list[str]:
        return [
            "model",
            "drafter, temperature",
            "served",
            "bits a weight",
            "model, MB",
            "experts, MB",
            "KL, millinats a token",
            "perplexity",
            "top-1, %",
            self.score_metric or "score",
            "tau, greedy",
            "tau",
            "tokens/s",
            f"tokens/s on {self.gpu}, predicted",
            "error",
        ]


def _cells(row: AblationRow) -> list[str]:
    drafter = "" if row.drafter == "none" else f"for the {row.drafter} model, {row.temperature:g}"
    rate = row.tokens_per_second
    busy = row.busy_cores_of_others is not None and row.busy_cores_of_others > BUSY_CORES
    return [
        row.model_name,
        drafter,
        row.served or "",
        _number(row.bits_per_weight, "{:.4g}"),
        _number(row.model_bytes, "{:.2f}", 1e-6),
        _number(row.expert_bytes, "{:.2f}", 1e-6),
        _number(row.kl_nats, "{:.4g}", 1e3) + _number(row.kl_stderr_nats, " ± {:.2g}", 1e3),
        _number(row.perplexity, "{:.3f}"),
        _number(row.top1_agreement, "{:.2f}", 100),
        _number(row.score, "{:.3f}") + _number(row.score_stderr, " ± {:.3f}"),
        _number(row.tau_greedy, "{:.2f}") + _number(row.tau_greedy_stderr, " ± {:.2f}"),
        "" if row.temperature == 0 else _number(row.tau, "{:.2f}") + _number(row.tau_stderr, " ± {:.2f}"),
        "" if rate is None else f"{rate.median:.0f}{'*' if busy else ''}",
        _number(row.predicted_tokens_per_second, "{:.0f}"),
        (row.error or "").replace("|", "\\|"),
    ]


def _number(value: float | None, template: str, factor: float = 1.0) -> str:
    return "" if value is None else template.format(factor * value)
