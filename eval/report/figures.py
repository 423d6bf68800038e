"""Figures for notebooks and papers: a function per question, from a result document to a matplotlib figure.

Every axis names its unit, and the line below it says what whiskers are. A function raises `NothingToDraw` if the result
lacks what it shows; `eval.report.notebook.show` prints that instead.
"""

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from speedstack.eval.report.drawing import (
    COLOURS,
    MARKERS,
    NothingToDraw,
    bars,
    bars_height,
    dots,
    dots_height,
    either_side,
    ink,
    label_x,
    label_y,
    legend_above,
    name_rows,
    new_figure,
    style,
)
from speedstack.eval.results.quality import QualityResult
from speedstack.eval.results.report import StageSummary
from speedstack.eval.results.schema import Z95
from speedstack.eval.results.speed import AcceptanceResult, AcceptanceSet, TimingResult
from speedstack.eval.results.suite import Comparison

STYLE = style("black", "#dddddd") | {"figure.facecolor": "white", "figure.dpi": 150}
# What whiskers are.
WINDOWS = "95 % interval of the mean over windows"
ROUNDS, REPEATS = "95 % interval over rounds", "quartiles of the repeats"


def divergence(quality: QualityResult) -> Figure:
    """KL from the teacher by method, in millinats per token; whiskers are 95 % intervals over windows."""
    entries = [entry for entry in quality.methods if entry.kl_to_teacher_nats is not None]
    if not entries:
        raise NothingToDraw(f"no model but {quality.teacher} was measured, hence no KL from it")
    kl_millinats = [1e3 * (entry.kl_to_teacher_nats or 0.0) for entry in entries]
    errors = [1e3 * Z95 * (entry.kl_stderr_nats or 0.0) for entry in entries]
    with new_figure(STYLE, bars_height(len(entries))) as (figure, axes):
        bars(axes, [entry.method for entry in entries], kl_millinats, errors, "{:.3g}")
        label_x(axes, f"KL from {quality.teacher} (millinats a token)", WINDOWS)
    return figure


def score_by_bits(comparison: Comparison, task: str, bits: Mapping[str, float], names: Mapping[str, str]) -> Figure:
    """Score of `task` over the bits per expert weight; whiskers are 95 % intervals of the difference.

    `bits` and `names` are by result, baseline included. The axis label lists results without bits; results without a
    name use their own. Raises NothingToDraw for a task that was not compared.
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
    with new_figure(STYLE, 3.2) as (figure, axes):
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
        label_y(axes, f"{entry.metric.partition(',')[0]} (share of {entry.num_documents} documents)")
        legend_above(axes)
    return figure


def suite_differences(comparison: Comparison, names: Mapping[str, str]) -> Figure:
    """Recovery in percent of the baseline's score, by task and result; whiskers are 95 % intervals.

    Hollow markers are differences within noise.
    """
    entries = [entry for entry in comparison.metrics if any(other.recovery is not None for other in entry.others)]
    if not entries:
        raise NothingToDraw("no task has a recovery: scores of 0, or metrics that do not say whether more is better")
    num_results = max(len(entry.others) for entry in entries)
    drawn: set[str] = set()
    baseline = names.get(comparison.baseline, comparison.baseline)
    with new_figure(STYLE, 1.2 + 0.16 * num_results * len(entries)) as (figure, axes):
        for row, entry in enumerate(entries):
            for index, other in enumerate(entry.others):
                if (interval := other.recovery_interval) is None:
                    continue
                recovery, low, high = (100 * value for value in interval)
                axes.errorbar(
                    recovery,
                    row + 0.2 * (index - (num_results - 1) / 2),
                    xerr=either_side([(recovery, low, high)]),
                    fmt=MARKERS[index % len(MARKERS)],
                    color=COLOURS[index % len(COLOURS)],
                    markerfacecolor="white" if other.is_noise else None,
                    capsize=2.5,
                    markersize=5,
                    label=None if other.result in drawn else names.get(other.result, other.result),
                )
                drawn.add(other.result)
        axes.axvline(100, color=ink(), linewidth=0.8)
        name_rows(axes, [entry.task.removeprefix("speedstack_").replace("_", " ") for entry in entries])
        axes.set_ylim(len(entries) - 0.5, -0.5)
        label_x(
            axes,
            f"recovery (% of {baseline}); hollow: p > {comparison.significance:g}",
            "95 % interval, paired over documents",
        )
        legend_above(axes)
    return figure


def survival(acceptance: AcceptanceResult) -> Figure:
    """Share of rounds that accepted all drafts up to a position; whiskers are 95 % intervals over rounds."""
    sets = _drafted_sets(acceptance)
    with new_figure(STYLE, 2.7 + 0.2 * len(sets)) as (figure, axes):
        for index, one in enumerate(sets):
            errors = [100 * Z95 * math.sqrt(p * (1 - p) / max(1, one.num_rounds)) for p in one.survival]
            label = f"{one.name} ({one.num_rounds} rounds)"
            _curve(axes, index, label, range(1, len(one.survival) + 1), [100 * p for p in one.survival], errors)
        axes.set_ylim(0, 100)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        label_x(axes, "position in the drafted block (tokens after the anchor)", ROUNDS)
        label_y(axes, "all accepted up to here (% of rounds)")
        legend_above(axes)
    return figure


def tokens_by_block(acceptance: AcceptanceResult) -> Figure:
    """Tokens per round if only the first k positions were drafted: 1 plus the sum of their survival."""
    sets = _drafted_sets(acceptance)
    with new_figure(STYLE, 2.7 + 0.2 * len(sets)) as (figure, axes):
        for index, one in enumerate(sets):
            lengths = range(len(one.survival) + 1)
            expected = [1.0 + sum(one.survival[:k]) for k in lengths]
            # The variance of a sum of nested indicators: a round's accepted count.
            variances = [_variance_of_count(one.survival[:k]) for k in lengths]
            errors = [Z95 * math.sqrt(variance / max(1, one.num_rounds)) for variance in variances]
            _curve(axes, index, one.name, lengths, expected, errors)
        axes.plot(
            range(acceptance.block_size),
            range(1, acceptance.block_size + 1),
            color="#888888",
            linestyle="--",
            linewidth=1,
            label="every draft accepted",
        )
        label_x(axes, "drafted tokens a round", ROUNDS)
        label_y(axes, "committed tokens a round")
        legend_above(axes)
    return figure


def decode_rates(timing: TimingResult) -> Figure:
    """Tokens per second by contestant: medians and quartiles of the repeats."""
    entries = timing.contestants
    if not entries:
        raise NothingToDraw("no contestant ran")
    rates = [entry.decode_tokens_per_second for entry in entries]
    errors = either_side([(rate.median, rate.q1, rate.q3) for rate in rates])
    with new_figure(STYLE, bars_height(len(entries))) as (figure, axes):
        bars(axes, [entry.name for entry in entries], [rate.median for rate in rates], errors, "{:.0f}")
        label_x(axes, f"decoded tokens a second, {timing.dtype}, {timing.num_threads} threads", REPEATS)
    return figure


def time_per_text(timing: TimingResult) -> Figure:
    """Time until the first token, and for all others; medians on a log scale."""
    num_decoded = timing.num_new_tokens - 1
    # An axis of logarithms has no place for what took no time.
    entries = [
        entry for entry in timing.contestants if entry.decode_tokens_per_second.q1 > 0 < entry.first_token_seconds.q1
    ]
    if not entries or num_decoded < 1:
        raise NothingToDraw("no contestant decoded more than its first token")
    first = [entry.first_token_seconds for entry in entries]
    rates = [entry.decode_tokens_per_second for entry in entries]
    parts = {
        "first token": [(1e3 * one.median, 1e3 * one.q1, 1e3 * one.q3) for one in first],
        "all others": [
            (1e3 * num_decoded / rate.median, 1e3 * num_decoded / rate.q3, 1e3 * num_decoded / rate.q1)
            for rate in rates
        ],
    }
    with new_figure(STYLE, dots_height(len(entries), list(parts))) as (figure, axes):
        dots(axes, [entry.name for entry in entries], parts, log=True)
        label_x(axes, f"milliseconds of a text of {timing.num_new_tokens} tokens (log scale)", REPEATS)
        legend_above(axes)
    return figure


def stage_times(stages: Sequence[StageSummary]) -> Figure:
    """Seconds of every timed stage of one run."""
    timed = [(stage.name, stage.seconds) for stage in stages if stage.seconds is not None]
    if not timed:
        raise NothingToDraw("no stage was timed")
    with new_figure(STYLE, bars_height(len(timed))) as (figure, axes):
        bars(axes, [name for name, _ in timed], [seconds for _, seconds in timed], None, "{:.3g}")
        label_x(axes, "seconds (one run)")
    return figure


def _drafted_sets(acceptance: AcceptanceResult) -> Sequence[AcceptanceSet]:
    """The prompt sets with drafts, or all prompts together if sets are not told apart."""
    found = [one for one in acceptance.sets or (acceptance.overall,) if one.survival]
    if not found:
        raise NothingToDraw("nothing was drafted")
    return found


def _curve(
    axes: Axes, index: int, label: str, places: Sequence[int], values: Sequence[float], errors: Sequence[float]
) -> None:
    axes.errorbar(
        places,
        values,
        yerr=errors,
        marker=MARKERS[index % len(MARKERS)],
        color=COLOURS[index % len(COLOURS)],
        linewidth=1.3,
        capsize=2.5,
        label=label,
    )


def _variance_of_count(survival_shares: Sequence[float]) -> float:
    """Variance of the number of drafts a round accepts; position i is reached with the i-th share."""
    mean = sum(survival_shares)
    # E[n^2] is the sum of (2 i - 1) P(n >= i).
    second_moment = sum((2 * i - 1) * share for i, share in enumerate(survival_shares, start=1))
    return max(0.0, second_moment - mean**2)
