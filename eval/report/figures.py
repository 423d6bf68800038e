"""Figures for notebooks and papers: one function a question, each from a result document to a matplotlib figure.

Black on white, in a column's width, in the colours of Okabe and Ito with markers beside them, so that they
survive a printer and a colour-blind reader. Every axis names its unit, and a line below it says what whiskers are.
Where a result lacks all that a figure shows, its function raises `NothingToDraw`; a notebook goes on with `show` of
`eval.report.notebook`. The report draws its own (`eval.report.plots`), which follow the page's theme. Nothing
here touches pyplot.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from speedstack.eval.lm_eval.compare import Comparison
from speedstack.eval.results.quality import QualityResult
from speedstack.eval.results.report import StageSummary
from speedstack.eval.results.schema import Z95
from speedstack.eval.results.speed import AcceptanceResult, AcceptanceSet, TimingResult

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
COLUMN_INCHES = 4.6
# Characters of a line below the axes, and of a row's name beside them.
LABEL_WIDTH, NAME_WIDTH = 50, 18
STYLE: dict[Any, Any] = {
    "figure.facecolor": "white",
    "figure.dpi": 150,
    "savefig.bbox": "tight",
    "pdf.fonttype": 42,  # text stays text
    "font.size": 8.5,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}


class NothingToDraw(ValueError):
    """A result has none of what a figure shows; the message says in one line what is missing."""


def divergence(quality: QualityResult) -> Figure:
    """KL from the teacher of every method, in millinats a token; whiskers are 95 % intervals over windows."""
    entries = [entry for entry in quality.methods if entry.kl_to_teacher_nats is not None]
    if not entries:
        raise NothingToDraw(f"no model but {quality.teacher} was measured, hence no KL from it")
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes(0.8 + 0.36 * len(entries))
        for row, entry in enumerate(entries):
            axes.barh(
                row,
                1e3 * (entry.kl_to_teacher_nats or 0.0),
                xerr=1e3 * Z95 * (entry.kl_stderr_nats or 0.0),
                height=0.62,
                color=COLOURS[0],
                edgecolor="black",
                linewidth=0.6,
                capsize=3,
            )
        name_rows(axes, [entry.method for entry in entries])
        label_x(axes, f"KL from {quality.teacher} (millinats a token)", "95 % interval of the mean over windows")
    return figure


def score_by_bits(comparison: Comparison, task: str, bits: Mapping[str, float], names: Mapping[str, str]) -> Figure:
    """Score of `task` over the bits that an expert's weight takes; whiskers are 95 % intervals of the difference.

    `bits` and `names` are by result, the baseline among them; a result without bits is named below the axis, one
    without a name goes by its own. Raises NothingToDraw for a task that was not compared.
    """
    entry = next((entry for entry in comparison.metrics if entry.task == task), None)
    if entry is None:
        raise NothingToDraw(f"no task {task!r}; there are {', '.join(each.task for each in comparison.metrics)}")
    found: list[tuple[str, float, float | None]] = [(comparison.baseline, entry.baseline, None)]
    found += [(other.result, other.value, other.stderr) for other in entry.others]
    points = [point for point in found if point[0] in bits]
    left_out = [result for result, _, _ in found if result not in bits]
    if not points:
        raise NothingToDraw(f"the bits of a weight are known of none of {', '.join(left_out)}")
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes(3.2)
        for index, (result, value, stderr) in enumerate(points):
            axes.errorbar(
                bits[result],
                value,
                yerr=None if stderr is None else Z95 * stderr,
                fmt=MARKERS[index % len(MARKERS)],
                color=COLOURS[index % len(COLOURS)],
                capsize=3,
                markersize=6,
                label=names.get(result, result),
            )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        unknown = f"; not known of {', '.join(left_out)}" if left_out else ""
        label_x(
            axes,
            f"bits a weight of the experts, scales included (log scale){unknown}",
            "95 % interval of the difference from full precision",
        )
        axes.set_ylabel(f"{entry.metric.partition(',')[0]} (share of {entry.num_documents} documents)")
        legend_above(axes)
    return figure


def suite_differences(comparison: Comparison, names: Mapping[str, str]) -> Figure:
    """Recovery of every task and result, in percent of the baseline's score; whiskers are 95 % intervals.

    Hollow markers are differences that may be chance.
    """
    entries = [entry for entry in comparison.metrics if any(other.recovery is not None for other in entry.others)]
    if not entries:
        raise NothingToDraw("no task has a recovery: scores of 0, or metrics that do not say whether more is better")
    num_results = max(len(entry.others) for entry in entries)
    drawn: set[str] = set()
    baseline = names.get(comparison.baseline, comparison.baseline)
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes(1.2 + 0.16 * num_results * len(entries))
        for row, entry in enumerate(entries):
            for index, other in enumerate(entry.others):
                if (recovery := other.recovery) is None:
                    continue
                # To first order, a relative error of the score is one of its ratio too.
                error = Z95 * (other.stderr or 0.0) * recovery / abs(other.value) if other.value else 0.0
                axes.errorbar(
                    100 * recovery,
                    row + 0.2 * (index - (num_results - 1) / 2),
                    xerr=100 * error,
                    fmt=MARKERS[index % len(MARKERS)],
                    color=COLOURS[index % len(COLOURS)],
                    markerfacecolor="white" if other.is_noise else None,
                    capsize=2.5,
                    markersize=5,
                    label=None if other.result in drawn else names.get(other.result, other.result),
                )
                drawn.add(other.result)
        axes.axvline(100, color="black", linewidth=0.8)
        name_rows(axes, [entry.task.removeprefix("speedstack_").replace("_", " ") for entry in entries])
        label_x(
            axes,
            f"recovery (% of {baseline}); hollow: p > {comparison.significance:g}",
            "95 % interval, paired over documents",
        )
        legend_above(axes)
    return figure


def survival(acceptance: AcceptanceResult) -> Figure:
    """Share of rounds whose drafts up to a position were all accepted; bands are 95 % intervals over rounds."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes(2.7)
        for index, one in enumerate(_drafted_sets(acceptance)):
            shares = one.survival
            positions = list(range(1, len(shares) + 1))
            errors = [Z95 * math.sqrt(p * (1 - p) / max(1, one.num_rounds)) for p in shares]
            axes.errorbar(
                positions,
                [100 * p for p in shares],
                yerr=[100 * error for error in errors],
                marker=MARKERS[index % len(MARKERS)],
                color=COLOURS[index % len(COLOURS)],
                linewidth=1.3,
                capsize=2.5,
                label=f"{one.name} ({one.num_rounds} rounds)",
            )
        axes.set_ylim(0, 100)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        label_x(axes, "position in the drafted block (tokens after the anchor)", "95 % interval over rounds")
        axes.set_ylabel("all accepted up to here (% of rounds)")
        legend_above(axes)
    return figure


def tokens_by_block(acceptance: AcceptanceResult) -> Figure:
    """Tokens a round if only the first k positions were drafted: one plus the sum of their survival."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes(2.7)
        for index, one in enumerate(_drafted_sets(acceptance)):
            expected = [1.0 + sum(one.survival[:k]) for k in range(len(one.survival) + 1)]
            errors = [
                # The variance of a sum of nested indicators: a round's accepted count.
                Z95 * math.sqrt(_variance_of_count(one.survival[:k]) / max(1, one.num_rounds))
                for k in range(len(one.survival) + 1)
            ]
            axes.errorbar(
                range(len(expected)),
                expected,
                yerr=errors,
                marker=MARKERS[index % len(MARKERS)],
                color=COLOURS[index % len(COLOURS)],
                linewidth=1.3,
                capsize=2.5,
                label=one.name,
            )
        axes.plot(
            range(acceptance.block_size),
            range(1, acceptance.block_size + 1),
            color="#888888",
            linestyle="--",
            linewidth=1,
            label="every draft accepted",
        )
        label_x(axes, "drafted tokens a round", "95 % interval over rounds")
        axes.set_ylabel("committed tokens a round")
        legend_above(axes)
    return figure


def decode_rates(timing: TimingResult) -> Figure:
    """Tokens a second of every contestant: median and quartiles of the repeats."""
    entries = timing.contestants
    if not entries:
        raise NothingToDraw("no contestant ran")
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes(0.8 + 0.36 * len(entries))
        for row, entry in enumerate(entries):
            rate = entry.decode_tokens_per_second
            axes.barh(
                row,
                rate.median,
                xerr=_to_either_side(rate.median, rate.q1, rate.q3),
                height=0.62,
                color=COLOURS[0],
                edgecolor="black",
                linewidth=0.6,
                capsize=3,
            )
            axes.annotate(f" {rate.median:.0f}", (rate.q3, row), va="center", xytext=(4, 0), textcoords="offset points")
        name_rows(axes, [entry.name for entry in entries])
        axes.margins(x=0.12)
        label_x(
            axes, f"decoded tokens a second, {timing.dtype}, {timing.num_threads} threads", "quartiles of the repeats"
        )
    return figure


def time_per_text(timing: TimingResult) -> Figure:
    """Where the time of one text goes: until its first token, and decoding the others. Medians; log scale."""
    num_decoded = timing.num_new_tokens - 1
    # An axis of logarithms has no place for what took no time.
    entries = [
        entry for entry in timing.contestants if entry.decode_tokens_per_second.q1 > 0 < entry.first_token_seconds.q1
    ]
    if not entries or num_decoded < 1:
        raise NothingToDraw("no contestant decoded more than its first token")
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes(1.0 + 0.42 * len(entries))
        for index, part in enumerate(("first token", "all others")):
            for row, entry in enumerate(entries):
                rate = entry.decode_tokens_per_second
                if part == "first token":
                    one = entry.first_token_seconds
                    median, low, high = one.median, one.q1, one.q3
                else:
                    median, low, high = (num_decoded / value for value in (rate.median, rate.q3, rate.q1))
                axes.errorbar(
                    1e3 * median,
                    row + 0.16 * (2 * index - 1),
                    xerr=_to_either_side(1e3 * median, 1e3 * low, 1e3 * high),
                    fmt=MARKERS[index],
                    color=COLOURS[index],
                    capsize=2.5,
                    markersize=6,
                    label=part if row == 0 else None,
                )
        axes.set_xscale("log")
        name_rows(axes, [entry.name for entry in entries])
        label_x(
            axes, f"milliseconds of a text of {timing.num_new_tokens} tokens (log scale)", "quartiles of the repeats"
        )
        legend_above(axes)
    return figure


def stage_times(stages: Sequence[StageSummary]) -> Figure:
    """Seconds of every stage of a run that was timed; one run, so without whiskers."""
    timed = [stage for stage in stages if stage.seconds is not None]
    if not timed:
        raise NothingToDraw("no stage was timed")
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes(0.8 + 0.26 * len(timed))
        axes.barh(
            range(len(timed)),
            [stage.seconds or 0.0 for stage in timed],
            height=0.62,
            color=COLOURS[0],
            edgecolor="black",
            linewidth=0.6,
        )
        for row, stage in enumerate(timed):
            axes.annotate(
                f"{stage.seconds:.3g}",
                (stage.seconds or 0.0, row),
                va="center",
                xytext=(4, 0),
                textcoords="offset points",
            )
        name_rows(axes, [stage.name for stage in timed])
        axes.margins(x=0.1)
        axes.set_xlabel("seconds (one run)")
    return figure


def _drafted_sets(acceptance: AcceptanceResult) -> Sequence[AcceptanceSet]:
    """The sets of prompts, or all of them together where they are not told apart, of which rounds were counted."""
    found = [one for one in acceptance.sets or (acceptance.overall,) if one.survival]
    if not found:
        raise NothingToDraw("nothing was drafted")
    return found


def _to_either_side(value: float, low: float, high: float) -> list[list[float]]:
    """Whiskers as matplotlib takes them. Rounding may put a value a hair outside of its own interval."""
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def _variance_of_count(survival_shares: Sequence[float]) -> float:
    """Variance of how many drafts a round accepts, when position i is reached with the i-th share."""
    mean = sum(survival_shares)
    # E[n^2] is the sum of (2 i - 1) P(n >= i).
    second_moment = sum((2 * i - 1) * share for i, share in enumerate(survival_shares, start=1))
    return max(0.0, second_moment - mean**2)


def new_axes(height_inches: float) -> tuple[Figure, Axes]:
    """A figure of a column's width; to be called, and drawn on, under STYLE."""
    figure = Figure(figsize=(COLUMN_INCHES, height_inches), layout="constrained")
    return figure, figure.add_subplot()


def label_x(axes: Axes, quantity: str, whiskers: str) -> None:
    """The horizontal axis' quantity with its unit, and below it what whiskers are."""
    axes.set_xlabel(f"{textwrap.fill(quantity, LABEL_WIDTH)}\nwhiskers: {whiskers}")


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """One row a name, the first on top; long names take two lines."""
    axes.set_yticks(range(len(names)), [textwrap.fill(name, NAME_WIDTH) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)


def legend_above(axes: Axes, handles: Sequence[Line2D] | None = None) -> None:
    """A legend over the axes, where it covers no point: of what is labelled, or of `handles`.

    It has two columns where the labels leave room for them.
    """
    shown: Sequence[Any] = axes.get_legend_handles_labels()[0] if handles is None else handles
    if not shown:
        return
    labels = [str(handle.get_label()) for handle in shown]
    axes.legend(
        shown,
        labels,
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        ncols=2 if 2 * max(map(len, labels), default=0) <= LABEL_WIDTH else 1,
        borderaxespad=0.2,
        handletextpad=0.4,
    )
