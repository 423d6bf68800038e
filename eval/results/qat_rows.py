"""Results of QAT runs that start from one model: what each changed, and how far it came.

Shapes of the file and the table printed from it; `speedstack.ablation.qat_table` makes one of finished run directories.
"""

from typing import Any, Literal

from pydantic import Field

from speedstack.eval.results.kinds import Document, Environment, MethodQuality, Record


class QatEvaluation(Record):
    """One evaluation on held-out text. `flips_since_start`, `flips_since_look` and `oscillating` are shares of the
    weights, see `speedstack.train.qat.flips`; None in runs without looks.
    """

    step: int
    heldout_kl: float | None
    heldout_loss: float
    heldout_top1_agreement: float | None
    flips_since_start: float | None = None
    flips_since_look: float | None = None
    oscillating: float | None = None


class QatRun(Record):
    """A run. `changes` are its config's fields that differ from the first run's, by dotted name; `kl_over_rtn` is the
    last evaluation's KL over that of rounding; `environment` is the run's env.json.
    """

    run: str
    changes: dict[str, Any]
    seed: int
    evaluations: tuple[QatEvaluation, ...]
    kl_over_rtn: float | None
    environment: dict[str, Any] = Field(default={})


class QatRuns(Document):
    """Runs on the weights `model_sha256`. `rtn` is that model rounded to nearest, None where no run began with it;
    `quality` are models of the runs measured on other text.
    """

    kind: Literal["qat_runs"] = "qat_runs"
    model_sha256: str
    rtn: QatEvaluation | None
    runs: tuple[QatRun, ...]
    quality: tuple[MethodQuality, ...] = ()
    notes: tuple[str, ...] = ()
    environment: Environment | None = None

    def table(self) -> str:
        """The runs as lines of text."""
        width = max(len(run.run) for run in self.runs) + 2
        lines = [
            f"{'':<{width}}{'steps':>7}{'KL, millinats':>15}{'over RTN':>10}{'top-1':>9}{'oscillating':>13}  changes"
        ]
        for run in self.runs:
            last = run.evaluations[-1]
            cells = (
                (7, str(last.step)),
                (15, "" if last.heldout_kl is None else f"{1e3 * last.heldout_kl:.4f}"),
                (10, "" if run.kl_over_rtn is None else f"{run.kl_over_rtn:.3f}"),
                (9, "" if last.heldout_top1_agreement is None else f"{100 * last.heldout_top1_agreement:.2f}%"),
                (13, "" if last.oscillating is None else f"{100 * last.oscillating:.3f}%"),
            )
            changes = ", ".join(f"{name} {value}" for name, value in run.changes.items())
            lines.append(f"{run.run:<{width}}{''.join(f'{cell:>{size}}' for size, cell in cells)}  {changes}".rstrip())
        return "\n".join(lines)
