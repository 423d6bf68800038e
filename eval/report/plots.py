"""Figures of a report as inline SVG that follows the page: its text colour, its font, light or dark.

matplotlib draws with two stand-in colours for ink and grid, which are then replaced by `currentColor` and a CSS
variable. Series use colours in the manner of Okabe and Ito, chosen to keep their contrast on white and on near-black
and apart for colour-blind readers; they never carry meaning alone (markers, hatches and labels do too). Figures are
narrow, so that a phone shows them at nearly full size and a desktop two side by side. Hatches are straight lines: a
dotted one takes a hundred times the bytes. Nothing here touches pyplot's global state.
"""

import html
import io
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from speedstack.eval.results.labels import numbered
from speedstack.eval.results.quality import QualityResult
from speedstack.eval.results.report import Curve
from speedstack.eval.results.speed import AcceptanceResult, TimingResult

INK, GRID = "#010203", "#040506"
COLOURS = ("#2f8fd0", "#d9822b", "#1f9e77", "#c0699f", "#8c7fd6", "#b39b25", "#7f8c99", "#cf4d3f")
# One fewer than the colours, so that a ninth series still differs from the first.
HATCHES = ("", "///", "\\\\\\", "xxx", "---", "|||", "+++")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
WIDTH_INCHES = 5.0
LEGEND_WIDTH = 44  # characters
MANY_BARS = 8
# Characters of an axis label that fit below an axis which labels have narrowed.
AXIS_LABEL_WIDTH = 46
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "speedstack",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlesize": 10.5,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
}


def training_curves(curves: Sequence[Curve]) -> str:
    """Curves of one stage and quantity over its steps. Raises ValueError for none, or for a mixture."""
    if len({(curve.stage, curve.quantity) for curve in curves}) != 1:
        raise ValueError(f"one figure shows one stage's curves of one quantity, not {len(curves)} of several")

    def draw(axes: Axes) -> None:
        for index, curve in enumerate(curves):
            axes.plot(
                curve.steps,
                curve.values,
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[index % len(MARKERS)] if len(curve.steps) <= 30 else None,
                markersize=3.5,
                linewidth=1.4,
                label=curve.label,
            )
        values = [value for curve in curves for value in curve.values]
        if min(values) > 0 and max(values) / min(values) > 20:
            axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True))
        axes.set_xlabel("training step")
        axes.set_ylabel(textwrap.fill(curves[0].quantity, 28))
        _legend_above(axes)

    return _figure(draw, f"{curves[0].stage}: {curves[0].quantity} over training steps", height_inches=3.0)


def divergence_by_method(quality: QualityResult) -> str:
    """Divergence from the teacher of each method that has one, with standard errors."""
    methods = [entry for entry in quality.methods if entry.kl_to_teacher_nats is not None]

    def draw(axes: Axes) -> None:
        values = [1e3 * (entry.kl_to_teacher_nats or 0.0) for entry in methods]
        errors = [1e3 * (entry.kl_stderr_nats or 0.0) for entry in methods]
        _horizontal_bars(axes, [entry.method for entry in methods], values, errors, "{:.3g}")
        axes.set_xlabel(
            textwrap.fill(f"KL from {quality.teacher} (millinats a token; less is better)", AXIS_LABEL_WIDTH)
        )

    return _figure(draw, "Divergence from the teacher by method", _bars_height(len(methods)))


def task_scores_by_method(quality: QualityResult, metrics: Mapping[str, str]) -> str:
    """Scores in [0, 1] of the chosen task metrics, grouped by task; `metrics` maps task to metric."""
    methods = [entry for entry in quality.methods if entry.tasks]

    def draw(axes: Axes) -> None:
        tasks = list(metrics)
        height = 0.8 / max(1, len(methods))
        for index, entry in enumerate(methods):
            scores = {(score.task, score.metric): score for score in entry.tasks}
            chosen = [(row, scores.get((task, metrics[task]))) for row, task in enumerate(tasks)]
            found = [(row, score) for row, score in chosen if score is not None]
            axes.barh(
                [row + (index - (len(methods) - 1) / 2) * height for row, _ in found],
                [100 * score.value for _, score in found],
                xerr=[100 * (score.stderr or 0.0) for _, score in found],
                height=0.9 * height,
                color=COLOURS[index % len(COLOURS)],
                hatch=HATCHES[index % len(HATCHES)],
                edgecolor=INK,
                linewidth=0.5,
                error_kw={"ecolor": INK, "elinewidth": 0.9, "capsize": 2},
                label=entry.method,
            )
        axes.set_yticks(range(len(tasks)), [f"{task.replace('_', ' ')}\n({metrics[task]})" for task in tasks])
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel("score (%; whiskers: standard error)")
        axes.grid(axis="y", visible=False)
        _legend_above(axes)

    return _figure(draw, "Task scores by method", 1.3 + 0.32 * len(metrics) * max(1, len(methods)))


def acceptance_by_position(acceptance: AcceptanceResult) -> str:
    """Share of rounds in which the drafts up to each position were all accepted, overall and for each prompt set."""
    groups = [acceptance.overall, *(acceptance.sets if len(acceptance.sets) > 1 else ())]
    # A set may have the name that all of them together go by.
    labels = numbered([f"{group.name} (\u03c4 {group.acceptance_length:.2f})" for group in groups])
    curves = {label: group.survival for label, group in zip(labels, groups, strict=True)}
    return survival_curves("Acceptance by draft position", curves)


def survival_curves(title: str, curves: Mapping[str, Sequence[float]]) -> str:
    """Shares in [0, 1] by draft position, a curve a label; the first one is the main one."""

    def draw(axes: Axes) -> None:
        for index, (label, shares) in enumerate(curves.items()):
            axes.plot(
                range(1, len(shares) + 1),
                [100 * share for share in shares],
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[index % len(MARKERS)],
                markersize=4.5,
                linewidth=2.0 if index == 0 else 1.2,
                linestyle="-" if index == 0 else "--",
                label=label,
            )
        axes.set_xticks(range(1, max(map(len, curves.values())) + 1))
        axes.set_ylim(0, 100)
        axes.set_xlabel("draft position in the block")
        axes.set_ylabel("rounds accepted this far (%)")
        _legend_above(axes)

    return _figure(draw, title, 2.7 + 0.2 * -(-len(curves) // 2))


def tokens_per_second(timing: TimingResult) -> str:
    """Median decode rate of each contestant; whiskers from the slowest to the fastest repeat."""

    def draw(axes: Axes) -> None:
        rates = [entry.decode_tokens_per_second for entry in timing.contestants]
        names = [entry.name for entry in timing.contestants]
        errors = (
            [rate.median - rate.minimum for rate in rates],
            [rate.maximum - rate.median for rate in rates],
        )
        _horizontal_bars(axes, names, [rate.median for rate in rates], errors, "{:.0f}")
        axes.set_xlabel("decode rate (tokens/s; whiskers: min and max)")

    return _figure(draw, "Decode rate by contestant", _bars_height(len(timing.contestants)))


def memory_by_part(memory_bytes: Mapping[str, Mapping[str, int]]) -> str:
    """Bytes of each part, stacked, a bar an engine, in MiB."""

    def draw(axes: Axes) -> None:
        parts = list(dict.fromkeys(part for engine in memory_bytes.values() for part in engine))
        # Experts differ in name by their format; side by side at the axis their widths compare.
        parts.sort(key=lambda part: not part.startswith("experts"))
        left = [0.0] * len(memory_bytes)
        for index, part in enumerate(parts):
            widths = [engine.get(part, 0) / 2**20 for engine in memory_bytes.values()]
            axes.barh(
                range(len(widths)),
                widths,
                left=left,
                height=0.6,
                color=COLOURS[index % len(COLOURS)],
                hatch=HATCHES[index % len(HATCHES)],
                edgecolor=INK,
                linewidth=0.5,
                label=part,
            )
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for row, total in enumerate(left):
            axes.annotate(f"{total:.1f}", (total, row), xytext=(4, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(memory_bytes)), [_wrap(name) for name in memory_bytes])
        axes.invert_yaxis()
        axes.margins(x=0.14)
        axes.set_xlabel("memory (MiB)")
        axes.grid(axis="y", visible=False)
        _legend_above(axes)

    num_parts = len({part for engine in memory_bytes.values() for part in engine})
    return _figure(draw, "Memory by part", _bars_height(len(memory_bytes)) + 0.2 * (1 + (num_parts - 1) // 2))


def bars(
    title: str,
    names: Sequence[str],
    values: Sequence[float],
    x_label: str,
    errors: Sequence[float] | tuple[Sequence[float], Sequence[float]] | None = None,
    value_format: str = "{:.3g}",
) -> str:
    """A bar a name with its value behind it; `errors` are half-widths of whiskers, or those to the left and right."""

    def draw(axes: Axes) -> None:
        _horizontal_bars(axes, names, values, [0.0] * len(values) if errors is None else errors, value_format)
        axes.set_xlabel(textwrap.fill(x_label, AXIS_LABEL_WIDTH))

    return _figure(draw, title, _bars_height(len(names)))


def dots(
    title: str,
    names: Sequence[str],
    series: Mapping[str, Sequence[tuple[float, float, float] | None]],
    x_label: str,
    log: bool = False,
    reference: float | None = None,
) -> str:
    """For every name a dot a series, with its whisker: (value, low, high), None where a series has none.

    `reference` is a line across all, on the axis of the values. Raises ValueError for nothing to draw.
    """
    if not any(point is not None for points in series.values() for point in points):
        raise ValueError(f"nothing to draw: {title} has no values")

    def draw(axes: Axes) -> None:
        for index, (label, points) in enumerate(series.items()):
            rows = [row for row, point in enumerate(points) if point is not None]
            found = [point for point in points if point is not None]
            offset = 0.5 * ((index + 0.5) / len(series) - 0.5)
            axes.errorbar(
                [value for value, _, _ in found],
                [row + offset for row in rows],
                # Rounding may put a value a hair outside of its own interval.
                xerr=[
                    [max(0.0, value - low) for value, low, _ in found],
                    [max(0.0, high - value) for value, _, high in found],
                ],
                fmt=MARKERS[index % len(MARKERS)],
                color=COLOURS[index % len(COLOURS)],
                markersize=5.5,
                elinewidth=1.1,
                capsize=2.5,
                label=label,
            )
        if reference is not None:
            axes.axvline(reference, color=INK, linewidth=0.9, linestyle="--")
        if log and any(point is not None and point[0] > 0 for points in series.values() for point in points):
            axes.set_xscale("log")
        axes.set_yticks(range(len(names)), [_wrap(name, _label_width(len(names))) for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel(textwrap.fill(x_label, AXIS_LABEL_WIDTH))
        if len(series) > 1:
            _legend_above(axes)

    num_legend_rows = -(-len(series) // _legend_columns(list(series))) if len(series) > 1 else 0
    row_height = 0.26 + 0.12 * min(3, len(series))
    return _figure(draw, title, 0.85 + row_height * len(names) + 0.2 * num_legend_rows)


def _horizontal_bars(
    axes: Axes,
    names: Sequence[str],
    values: Sequence[float],
    errors: Sequence[float] | tuple[Sequence[float], Sequence[float]],
    value_format: str,
) -> None:
    """One bar a name, its value written behind the whisker."""
    axes.barh(range(len(values)), values, height=0.62, color=COLOURS[0], edgecolor=INK, linewidth=0.5)
    axes.errorbar(values, range(len(values)), xerr=errors, fmt="none", ecolor=INK, elinewidth=0.9, capsize=3)
    upper = errors[1] if isinstance(errors, tuple) else errors
    for row, (value, error) in enumerate(zip(values, upper, strict=True)):
        axes.annotate(
            value_format.format(value), (value + error, row), xytext=(5, 0), textcoords="offset points", va="center"
        )
    axes.set_yticks(range(len(names)), [_wrap(name, _label_width(len(names))) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.margins(x=0.16)
    axes.grid(axis="y", visible=False)


def _bars_height(num_bars: int) -> float:
    return 0.9 + 0.42 * max(1, min(num_bars, MANY_BARS)) + 0.26 * max(0, num_bars - MANY_BARS)


def _label_width(num_bars: int) -> int:
    """Characters of a line: many bars are too close together for labels of two."""
    return 16 if num_bars <= MANY_BARS else 28


def _wrap(name: str, width: int = 16) -> str:
    """A long bar label on two lines, so that labels leave the bars their room."""
    if len(name) <= width:
        return name
    middle = min((i for i, c in enumerate(name) if c == " "), key=lambda i: abs(i - len(name) / 2), default=None)
    return name if middle is None else f"{name[:middle]}\n{name[middle + 1 :]}"


def _legend_columns(labels: Sequence[str]) -> int:
    """Two where the two longest labels fit beside each other over an axis, else one."""
    return 2 if len(labels) > 1 and sum(sorted(map(len, labels))[-2:]) <= LEGEND_WIDTH else 1


def _legend_above(axes: Axes) -> None:
    if not axes.get_legend_handles_labels()[0]:
        return
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        ncols=_legend_columns(axes.get_legend_handles_labels()[1]),
        borderaxespad=0.2,
        columnspacing=1.2,
        handlelength=1.6,
    )


def _figure(draw: Callable[[Axes], None], title: str, height_inches: float) -> str:
    """An SVG element: same input, same bytes. `title` names it for screen readers; the page captions it for the eye."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
        figure.patch.set_alpha(0.0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0.0)
        draw(axes)
        svg = _to_svg(figure)
    return _adopt(svg, title)


def _to_svg(figure: Figure) -> str:
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _adopt(svg: str, title: str) -> str:
    """A stand-alone SVG made part of a page: no prologue, ids that clash with no other figure's, the page's ink."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    prefix = re.sub(r"[^a-z0-9]+", "-", title.lower())
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', svg)
    svg = svg.replace(INK, "currentColor").replace(GRID, "var(--grid, #8884)")
    # The page's font: matplotlib lists every family it would try.
    svg = re.sub(r"font-family: [^;\"]*", "font-family: var(--font, sans-serif)", svg)
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'width="100%"', svg, count=1)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1)
