"""QAT runs from one model, by their divergence from it."""

from collections.abc import Sequence

from speedstack.eval.report import plots
from speedstack.eval.report.page import (
    MISSING,
    Block,
    Cell,
    Column,
    FigureBlock,
    Section,
    Table,
    compact,
    count,
    number,
    number_and_error,
)
from speedstack.eval.report.sections import Found, each
from speedstack.eval.results.quality import MethodQuality
from speedstack.eval.results.quantization import QatRun, QatRuns

DOCUMENT = QatRuns
COLUMNS = (
    Column("run", is_number=False),
    Column("steps"),
    Column("KL to full precision", "millinats a token"),
    Column("over rounding"),
    Column("top-1 agreement"),
    Column("loss", "nats a token"),
    Column("weights changed"),
    Column("oscillating"),
)
QUALITY_COLUMNS = (
    Column("model", is_number=False),
    Column("KL to full precision", "millinats a token"),
    Column("top-1 agreement"),
    Column("loss", "nats a token"),
)


def sections(found: Sequence[Found[QatRuns]]) -> list[Section]:
    """A section a result."""
    return each("Runs of quantization-aware training", found, _section)


def _section(result: QatRuns, title: str) -> Section:
    caption = (
        "Last evaluation of each run; below its name what it changed. Changed and oscillating: shares of MXFP4 values."
    )
    blocks: list[Block] = [
        Table(COLUMNS, tuple(_row(run) for run in result.runs), caption).without_empty_columns(),
    ]
    last_kl = [(run.run, run.evaluations[-1].heldout_kl) for run in result.runs if run.evaluations]
    measured = [(name, kl) for name, kl in last_kl if kl is not None]
    if measured:
        svg = plots.bars(
            "Divergence by run",
            [name for name, _ in measured],
            [1e3 * kl for _, kl in measured],
            "KL from full precision (millinats a token; less is better)",
        )
        blocks.append(FigureBlock(svg, "Distance from the full-precision model at the end of each run."))
    if result.quality:
        rows = tuple(_quality_row(quality) for quality in result.quality)
        blocks.append(
            Table(QUALITY_COLUMNS, rows, "Models of these runs on other held-out text; \u00b1 one standard error.")
        )
    rounding = ""
    if result.rtn is not None and result.rtn.heldout_kl is not None:
        rounding = (
            f" Rounding to nearest, where training starts, is at {1e3 * result.rtn.heldout_kl:.3f} millinats a token."
        )
    text = f"Runs from one model, weights {result.model_sha256[:12]}.{rounding}"
    return Section(title, (text, *result.notes), tuple(blocks))


def _row(run: QatRun) -> tuple[Cell, ...]:
    if not run.evaluations:
        return (Cell(run.run, note="never evaluated"), *[MISSING] * (len(COLUMNS) - 1))
    last = run.evaluations[-1]
    return (
        Cell(run.run, note=compact(run.changes)),
        count(last.step),
        number(last.heldout_kl, ".3f", 1e3),
        number(run.kl_over_rtn, ".3f", suffix="\u00d7"),
        number(last.heldout_top1_agreement, ".2f", 100, "%"),
        number(last.heldout_loss, ".4f"),
        number(last.flips_since_start, ".2f", 100, "%"),
        number(last.oscillating, ".3f", 100, "%"),
    )


def _quality_row(quality: MethodQuality) -> tuple[Cell, ...]:
    return (
        Cell(quality.method),
        number_and_error(quality.kl_to_teacher_nats, quality.kl_stderr_nats, ".3f", 1e3),
        number(quality.top1_agreement, ".2f", 100, "%"),
        number(quality.nll_nats, ".4f"),
    )
