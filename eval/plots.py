"""Figures of a report as inline SVG that follows the page: its text colour, its font, light or dark.

matplotlib draws with two stand-in colours for ink and grid, which are then replaced by `currentColor` and a CSS
variable. Series use colours in the manner of Okabe and Ito, chosen to keep their contrast on white and on near-black
and apart for colour-blind readers; they never carry meaning alone (markers, hatches and labels do too). Figures are
narrow, so that a phone shows them at nearly full size and a desktop two side by side. Hatches are straight lines: a
dotted one takes a hundred times the bytes. Nothing here touches pyplot's global state.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from speedstack.eval.results import AcceptanceResult, Curve, QualityResult, TimingResult

INK, GRID = "#010203", "#040506"
COLOURS = ("#2f8fd0", "#d9822b", "#1f9e77", "#c0699f", "#8c7fd6", "#b39b25", "#7f8c99", "#cf4d3f")
# One fewer than the colours, so that a ninth series still differs from the first.
HATCHES = ("", "///", "\\\\\\", "xxx", "---", "|||", "+++")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
WIDTH_INCHES = 5.0
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
        axes.set_ylabel(curves[0].quantity)
        axes.legend()

    return _figure(draw, f"{curves[0].stage}: {curves[0].quantity} over training steps", height_inches=2.9)


def divergence_by_method(quality: QualityResult) -> str:
    """Divergence from the teacher of each method that has one, with standard errors."""
    methods = [entry for entry in quality.methods if entry.kl_to_teacher_nats is not None]

    def draw(axes: Axes) -> None:
        values = [1e3 * (entry.kl_to_teacher_nats or 0.0) for entry in methods]
        errors = [1e3 * (entry.kl_stderr_nats or 0.0) for entry in methods]
        _horizontal_bars(axes, [entry.method for entry in methods], values, errors, "{:.3g}")
        axes.set_xlabel(f"KL from {quality.teacher} (millinats a token; less is better)")

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
        _legend_above(axes, len(methods))

    return _figure(draw, "Task scores by method", 1.3 + 0.32 * len(metrics) * max(1, len(methods)))


def acceptance_by_position(acceptance: AcceptanceResult) -> str:
    """Share of rounds in which the drafts up to each position were all accepted, overall and for each prompt set."""

    def draw(axes: Axes) -> None:
        groups = [acceptance.overall, *(acceptance.sets if len(acceptance.sets) > 1 else ())]
        for index, group in enumerate(groups):
            axes.plot(
                range(1, len(group.survival) + 1),
                [100 * value for value in group.survival],
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[index % len(MARKERS)],
                markersize=4.5,
                linewidth=2.0 if index == 0 else 1.2,
                linestyle="-" if index == 0 else "--",
                label=f"{group.name} (\u03c4 {group.acceptance_length:.2f})",
            )
        axes.set_xticks(range(1, len(acceptance.overall.survival) + 1))
        axes.set_ylim(0, 100)
        axes.set_xlabel("draft position in the block")
        axes.set_ylabel("rounds accepted this far (%)")
        axes.legend()

    return _figure(draw, "Acceptance by draft position", 2.9)


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
        _legend_above(axes, len(parts))

    num_parts = len({part for engine in memory_bytes.values() for part in engine})
    return _figure(draw, "Memory by part", _bars_height(len(memory_bytes)) + 0.2 * (1 + (num_parts - 1) // 2))


def _horizontal_bars(
    axes: Axes,
    names: Sequence[str],
    values: Sequence[float],
    errors: Sequence[float] | tuple[Sequence[float], Sequence[float]],
    value_format: str,
) -> None:
    """One bar a name, its value written behind the whisker."""
    for row, value in enumerate(values):
        axes.barh(row, value, height=0.62, color=COLOURS[row % len(COLOURS)], edgecolor=INK, linewidth=0.5)
    axes.errorbar(values, range(len(values)), xerr=errors, fmt="none", ecolor=INK, elinewidth=0.9, capsize=3)
    upper = errors[1] if isinstance(errors, tuple) else errors
    for row, (value, error) in enumerate(zip(values, upper, strict=True)):
        axes.annotate(
            value_format.format(value), (value + error, row), xytext=(5, 0), textcoords="offset points", va="center"
        )
    axes.set_yticks(range(len(names)), [_wrap(name) for name in names])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.margins(x=0.16)
    axes.grid(axis="y", visible=False)


def _bars_height(num_bars: int) -> float:
    return 0.9 + 0.42 * max(1, num_bars)


def _wrap(name: str) -> str:
    """A long bar label on two lines, so that labels leave the bars their room."""
    if len(name) <= 16:
        return name
    middle = min((i for i, c in enumerate(name) if c == " "), key=lambda i: abs(i - len(name) / 2), default=None)
    return name if middle is None else f"{name[:middle]}\n{name[middle + 1 :]}"


def _legend_above(axes: Axes, num_entries: int) -> None:
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        ncols=min(2, num_entries),
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
    return svg.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
