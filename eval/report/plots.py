"""Figures of a report as inline SVG in the colours and font of the page, light or dark.

matplotlib draws with stand-in colours for ink and grid, which become `currentColor` and a CSS variable.
"""

import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from speedstack.eval.report import drawing
from speedstack.eval.report.drawing import (
    COLOURS,
    HATCHES,
    MARKERS,
    Errors,
    Point,
    bars_height,
    dots_height,
    ink,
    label_x,
    label_y,
    legend_above,
    new_figure,
    style,
    wrap,
)
from speedstack.eval.results.labels import numbered
from speedstack.eval.results.quality import QualityResult
from speedstack.eval.results.report import Curve
from speedstack.eval.results.speed import AcceptanceResult, TimingResult

INK, GRID = "#010203", "#040506"
STYLE = style(INK, GRID) | {"svg.fonttype": "none", "svg.hashsalt": "speedstack"}


def training_curves(curves: Sequence[Curve]) -> str:
    """Curves of one stage and quantity. Raises ValueError for none, or for a mixture."""
    if len({(curve.stage, curve.quantity) for curve in curves}) != 1:
        raise ValueError(f"one figure shows one stage's curves of one quantity, not {len(curves)} of several")
    with _on_page(3.0) as (figure, axes):
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
        label_y(axes, curves[0].quantity)
        legend_above(axes)
        return _svg(figure, f"{curves[0].stage}: {curves[0].quantity} over training steps")


def divergence_by_method(quality: QualityResult) -> str:
    """KL from the teacher by method, with standard errors."""
    methods = [entry for entry in quality.methods if entry.kl_to_teacher_nats is not None]
    return bars(
        "Divergence from the teacher by method",
        [entry.method for entry in methods],
        [1e3 * (entry.kl_to_teacher_nats or 0.0) for entry in methods],
        f"KL from {quality.teacher} (millinats a token; less is better)",
        [1e3 * (entry.kl_stderr_nats or 0.0) for entry in methods],
    )


def task_scores_by_method(quality: QualityResult, metrics: Mapping[str, str]) -> str:
    """Scores in [0, 1], grouped by task; `metrics` maps task to metric."""
    methods = [entry for entry in quality.methods if entry.tasks]
    tasks = list(metrics)
    with _on_page(1.3 + 0.32 * len(metrics) * max(1, len(methods))) as (figure, axes):
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
                edgecolor=ink(),
                linewidth=0.5,
                error_kw={"ecolor": ink(), "elinewidth": 0.9, "capsize": 2},
                label=entry.method,
            )
        axes.set_yticks(range(len(tasks)), [f"{task.replace('_', ' ')}\n({metrics[task]})" for task in tasks])
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel("score (%; whiskers: standard error)")
        axes.grid(axis="y", visible=False)
        legend_above(axes)
        return _svg(figure, "Task scores by method")


def acceptance_by_position(acceptance: AcceptanceResult) -> str:
    """Share of rounds that accepted all drafts up to a position, overall and by prompt set."""
    groups = [acceptance.overall, *(acceptance.sets if len(acceptance.sets) > 1 else ())]
    # A set may have the name that all of them together go by.
    labels = numbered([f"{group.name} (\u03c4 {group.acceptance_length:.2f})" for group in groups])
    curves = {label: group.survival for label, group in zip(labels, groups, strict=True)}
    return survival_curves("Acceptance by draft position", curves)


def survival_curves(title: str, curves: Mapping[str, Sequence[float]]) -> str:
    """A curve per label: shares in [0, 1] by draft position; the first is emphasized."""
    with _on_page(2.7 + 0.2 * -(-len(curves) // 2)) as (figure, axes):
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
        legend_above(axes)
        return _svg(figure, title)


def tokens_per_second(timing: TimingResult) -> str:
    """Median decode rate by contestant; whiskers are the extremes of the repeats."""
    rates = [entry.decode_tokens_per_second for entry in timing.contestants]
    return bars(
        "Decode rate by contestant",
        [entry.name for entry in timing.contestants],
        [rate.median for rate in rates],
        "decode rate (tokens/s; whiskers: min and max)",
        ([rate.median - rate.minimum for rate in rates], [rate.maximum - rate.median for rate in rates]),
        "{:.0f}",
    )


def memory_by_part(memory_bytes: Mapping[str, Mapping[str, int]]) -> str:
    """A stacked bar per engine, in MiB."""
    parts = list(dict.fromkeys(part for engine in memory_bytes.values() for part in engine))
    # Experts differ in name by their format; side by side at the axis their widths compare.
    parts.sort(key=lambda part: not part.startswith("experts"))
    with _on_page(bars_height(len(memory_bytes)) + 0.2 * (1 + (len(parts) - 1) // 2)) as (figure, axes):
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
                edgecolor=ink(),
                linewidth=0.5,
                label=part,
            )
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for row, total in enumerate(left):
            axes.annotate(f"{total:.1f}", (total, row), xytext=(4, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(memory_bytes)), [wrap(name) for name in memory_bytes])
        axes.invert_yaxis()
        axes.margins(x=0.14)
        axes.set_xlabel("memory (MiB)")
        axes.grid(axis="y", visible=False)
        legend_above(axes)
        return _svg(figure, "Memory by part")


def bars(
    title: str,
    names: Sequence[str],
    values: Sequence[float],
    x_label: str,
    errors: Errors | None = None,
    value_format: str = "{:.3g}",
) -> str:
    """A bar per name with its value."""
    with _on_page(bars_height(len(names))) as (figure, axes):
        drawing.bars(axes, names, values, [0.0] * len(values) if errors is None else errors, value_format)
        label_x(axes, x_label)
        return _svg(figure, title)


def dots(
    title: str,
    names: Sequence[str],
    series: Mapping[str, Sequence[Point | None]],
    x_label: str,
    log: bool = False,
    reference: float | None = None,
) -> str:
    """A dot with a whisker per name and series, None where there is none; `reference` is a vertical line.

    Raises ValueError for nothing to draw.
    """
    if not any(point is not None for points in series.values() for point in points):
        raise ValueError(f"nothing to draw: {title} has no values")
    with _on_page(dots_height(len(names), list(series))) as (figure, axes):
        drawing.dots(axes, names, series, log, reference)
        label_x(axes, x_label)
        if len(series) > 1:
            legend_above(axes)
        return _svg(figure, title)


@contextmanager
def _on_page(height_inches: float) -> Iterator[tuple[Figure, Axes]]:
    """A transparent figure, in a context for drawing and saving."""
    with new_figure(STYLE, height_inches) as (figure, axes):
        figure.patch.set_alpha(0.0)
        axes.patch.set_alpha(0.0)
        yield figure, axes


def _svg(figure: Figure, title: str) -> str:
    """The figure as an SVG element, deterministic; `title` is for screen readers."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    return _adopt(buffer.getvalue(), title)


def _adopt(svg: str, title: str) -> str:
    """An SVG file as part of a page: no prologue, prefixed ids, the page's colours and font."""
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
