"""Sections of quantization: post-training methods, and QAT runs."""

from speedstack.eval.report import plots
from speedstack.eval.report.page import Block, FigureBlock, Headline, Section
from speedstack.eval.report.tables import PTQ, QAT, QAT_QUALITY
from speedstack.eval.results.quantization import PtqResult, QatRuns
from speedstack.eval.results.table import Table

KL_LABEL = "KL from full precision (millinats a token; less is better)"


def ptq(result: PtqResult, title: str) -> Section:
    table = Table.of(PTQ, result.methods, "\u00b1 is one standard error over windows.")
    blocks: list[Block] = [table.with_absent(result.unavailable, "failed")]
    headlines: tuple[Headline, ...] = ()
    measured = [entry for entry in result.methods if entry.quality.kl_to_teacher_nats is not None]
    if measured:
        svg = plots.bars(
            "Divergence by way to quantize",
            [entry.quality.method for entry in measured],
            [1e3 * (entry.quality.kl_to_teacher_nats or 0.0) for entry in measured],
            KL_LABEL,
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


def qat_runs(result: QatRuns, title: str) -> Section:
    caption = (
        "Last evaluation of each run; below its name what it changed. Changed and oscillating: shares of MXFP4 values."
    )
    blocks: list[Block] = [Table.of(QAT, result.runs, caption).without_empty_columns()]
    last_kl = [(run.run, run.last.heldout_kl) for run in result.runs if run.last is not None]
    measured = {name: 1e3 * kl for name, kl in last_kl if kl is not None}
    if measured:
        svg = plots.bars("Divergence by run", list(measured), list(measured.values()), KL_LABEL)
        blocks.append(FigureBlock(svg, "Distance from the full-precision model at the end of each run."))
    if result.quality:
        caption = "Models of these runs on other held-out text; \u00b1 one standard error."
        blocks.append(Table.of(QAT_QUALITY, result.quality, caption))
    text = f"Runs from one model, weights {result.model_sha256[:12]}."
    if result.rtn is not None and result.rtn.heldout_kl is not None:
        text += (
            f" Rounding to nearest, where training starts, is at {1e3 * result.rtn.heldout_kl:.3f} millinats a token."
        )
    return Section(title, (text, *result.notes), tuple(blocks))
