"""Ways to quantize one model after training, by their divergence from it."""

from collections.abc import Sequence

from speedstack.eval.report import plots
from speedstack.eval.report.page import (
    MISSING,
    Block,
    Cell,
    Column,
    FigureBlock,
    Headline,
    Section,
    Table,
    compact,
    number,
    number_and_error,
)
from speedstack.eval.report.sections import Found, each
from speedstack.eval.results.quantization import PtqMethod, PtqResult

DOCUMENT = PtqResult
COLUMNS = (
    Column("method", is_number=False),
    Column("KL to full precision", "millinats a token"),
    Column("over rounding"),
    Column("top-1 agreement"),
    Column("loss", "nats a token"),
    Column("time", "s"),
)


def sections(found: Sequence[Found[PtqResult]]) -> list[Section]:
    """A section a result."""
    return each("Ways to quantize", found, _section)


def _section(result: PtqResult, title: str) -> Section:
    measured = [entry for entry in result.methods if entry.quality.kl_to_teacher_nats is not None]
    rows = [_row(entry) for entry in result.methods]
    for absent in result.unavailable:
        rows.append((Cell(absent.name, note=f"failed: {absent.reason}"), *[MISSING] * (len(COLUMNS) - 1)))
    blocks: list[Block] = [Table(COLUMNS, tuple(rows), "\u00b1 is one standard error over windows.")]
    headlines: tuple[Headline, ...] = ()
    if measured:
        svg = plots.bars(
            "Divergence by way to quantize",
            [entry.quality.method for entry in measured],
            [1e3 * (entry.quality.kl_to_teacher_nats or 0.0) for entry in measured],
            "KL from full precision (millinats a token; less is better)",
            [1e3 * (entry.quality.kl_stderr_nats or 0.0) for entry in measured],
        )
        blocks.append(FigureBlock(svg, "Distance from the full-precision model (whiskers: standard error)."))
        best = min(measured, key=lambda entry: entry.quality.kl_to_teacher_nats or 0.0)
        if best.kl_over_rtn is not None and best.kl_over_rtn < 1:
            label = f"divergence of {best.quality.method}, against rounding to nearest"
            detail = f"{result.num_tokens:,} held-out tokens"
            headlines = (Headline(f"{best.kl_over_rtn:.2f}\u00d7", label, detail),)
    text = (
        f"One model, its experts quantized in several ways, on {result.num_tokens:,} held-out tokens in windows of "
        f"{result.window}. Times are of the quantization alone."
    )
    return Section(title, (text, *result.notes), tuple(blocks), headlines)


def _row(entry: PtqMethod) -> tuple[Cell, ...]:
    quality = entry.quality
    return (
        Cell(quality.method, note=_settings(entry)),
        number_and_error(quality.kl_to_teacher_nats, quality.kl_stderr_nats, ".3f", 1e3),
        number(entry.kl_over_rtn, ".3f", suffix="\u00d7"),
        number(quality.top1_agreement, ".2f", 100, "%"),
        number(quality.nll_nats, ".4f"),
        number(entry.seconds, ".1f"),
    )


def _settings(entry: PtqMethod) -> str:
    return f"exported, weights {entry.model_sha256[:12]}" if entry.model_sha256 else compact(entry.settings)
