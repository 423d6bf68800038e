"""Results of ways to quantize one model: post-training methods, and QAT runs."""

from typing import Any, Literal

from pydantic import Field

from speedstack.eval.results.quality import MethodQuality
from speedstack.eval.results.schema import Document, Environment, Record, Unavailable
from speedstack.eval.results.table import Column, Table, percent, words


class PtqMethod(Record):
    """One post-training method. `kl_over_rtn` is relative to rounding to nearest under the default scale rule; `gptq`
    summarizes a calibration on the token ids of `calibration_sha256`; an export has the digest of its weights.
    `environment` is None if it is the result's.
    """

    quality: MethodQuality
    settings: dict[str, Any] = Field(default={})
    seconds: float | None = None
    kl_over_rtn: float | None = None
    gptq: dict[str, float] = Field(default={})
    calibration_sha256: str | None = None
    model_sha256: str | None = None
    environment: Environment | None = None


class PtqResult(Document):
    """Methods on `num_tokens` held-out tokens; the first is the full-precision model.

    `text_sha256` is of the windows' token ids. `unavailable` are failed methods. `environment` is of the command that
    began the file.
    """

    kind: Literal["ptq"] = "ptq"
    model_sha256: str | None
    text_sha256: str | None = None
    device: str | None = None
    num_tokens: int
    window: int
    methods: tuple[PtqMethod, ...]
    unavailable: tuple[Unavailable, ...] = ()
    notes: tuple[str, ...] = ()
    environment: Environment

    def table(self) -> str:
        """Aligned text."""
        failed = [f"{entry.name}: failed: {entry.reason}" for entry in self.unavailable]
        return "\n".join([Table.of(_PTQ_COLUMNS, self.methods).text(), *failed])


_PTQ_COLUMNS = (
    words("", "quality.method"),
    Column(
        "KL, millinats",
        "",
        "quality.kl_to_teacher_nats",
        ".4f",
        1e3,
        error="quality.kl_stderr_nats",
        error_form=".3f",
    ),
    Column("over RTN", "", "kl_over_rtn", ".3f"),
    percent("top-1", "quality.top1_agreement"),
    Column("loss, nats", "", "quality.nll_nats", ".5f"),
)


class QatEvaluation(Record):
    """One evaluation on held-out text. `flips_since_start`, `flips_since_look` and `oscillating` are shares of the
    weights (see `speedstack.train.qat.flips`), None in runs without looks.
    """

    step: int
    heldout_kl: float | None
    heldout_loss: float
    heldout_top1_agreement: float | None
    flips_since_start: float | None = None
    flips_since_look: float | None = None
    oscillating: float | None = None


class QatRun(Record):
    """A run. `changes` are config fields that differ from the first run's, by dotted name; `kl_over_rtn` is of the last
    evaluation; `environment` is the run's env.json.
    """

    run: str
    changes: dict[str, Any]
    seed: int
    evaluations: tuple[QatEvaluation, ...]
    kl_over_rtn: float | None
    environment: dict[str, Any] = Field(default={})

    @property
    def last(self) -> QatEvaluation | None:
        """The last evaluation, if any."""
        return self.evaluations[-1] if self.evaluations else None


class QatRuns(Document):
    """Runs from one model. `rtn` is that model rounded to nearest, if a run began so; `quality` is on other text."""

    kind: Literal["qat_runs"] = "qat_runs"
    model_sha256: str
    rtn: QatEvaluation | None
    runs: tuple[QatRun, ...]
    quality: tuple[MethodQuality, ...] = ()
    notes: tuple[str, ...] = ()
    environment: Environment | None = None

    def table(self) -> str:
        """Aligned text."""
        return Table.of(_QAT_COLUMNS, self.runs).text()


def _changes(run: QatRun) -> str:
    return ", ".join(f"{name} {value}" for name, value in run.changes.items())


_QAT_COLUMNS = (
    words("", "run"),
    Column("steps", "", "last.step"),
    Column("KL, millinats", "", "last.heldout_kl", ".4f", 1e3),
    Column("over RTN", "", "kl_over_rtn", ".3f"),
    percent("top-1", "last.heldout_top1_agreement"),
    percent("oscillating", "last.oscillating", ".3f"),
    words("changes", _changes),
)
