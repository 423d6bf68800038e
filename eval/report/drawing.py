"""One style and shared marks for all figures, on a page or on paper.

Colours follow Okabe and Ito, adjusted for contrast on white and near-black; markers, hatches and labels repeat what
they mean. Figures are narrow: full size on a phone, two side by side on a desktop, one in a paper's column. pyplot's
global state stays untouched.
"""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#2f8fd0", "#d9822b", "#1f9e77", "#c0699f", "#8c7fd6", "#b39b25", "#7f8c99", "#cf4d3f")
# One fewer than the colours, so that a ninth series still differs from the first. Straight lines: a dotted hatch takes
# a hundred times the bytes.
HATCHES = ("", "///", "\\\\\\", "xxx", "---", "|||", "+++")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
WIDTH_INCHES = 5.0
# Characters: of a legend's line, and of an axis' label below an axis which names of rows have narrowed.
LEGEND_WIDTH, AXIS_LABEL_WIDTH = 44, 46
MANY_ROWS = 8

# A value and the ends of its whisker.
Point = tuple[float, float, float]
# Half-widths of whiskers, or those to the left and right.
Errors = Sequence[float] | tuple[Sequence[float], Sequence[float]]


class NothingToDraw(ValueError):
    """A result has none of what a figure shows; the message says in one line what is missing."""


def style(ink: str, grid: str) -> dict[Any, Any]:
    """matplotlib settings with these colours for everything but series."""
    return {
        "font.family": "sans-serif",
        "font.size": 9.5,
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": ink,
        "axes.titlesize": 10.5,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": grid,
        "grid.linewidth": 0.7,
        "xtick.color": ink,
        "ytick.color": ink,
        "legend.frameon": False,
        "hatch.linewidth": 0.6,
    }


@contextmanager
def new_figure(settings: dict[Any, Any], height_inches: float) -> Iterator[tuple[Figure, Axes]]:
    """A figure with axes, in a context with these settings."""
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
        yield figure, figure.add_subplot()


def ink() -> str:
    """The current colour of text and edges."""
    return str(matplotlib.rcParams["text.color"])


def bars(axes: Axes, names: Sequence[str], values: Sequence[float], errors: Errors | None, value_format: str) -> None:
    """A horizontal bar per name, the first on top, its value behind its whisker."""
    axes.barh(range(len(values)), values, height=0.62, color=COLOURS[0], edgecolor=ink(), linewidth=0.5)
    if errors is not None:
        axes.errorbar(values, range(len(values)), xerr=errors, fmt="none", ecolor=ink(), elinewidth=0.9, capsize=3)
    upper = [0.0] * len(values) if errors is None else errors[1] if isinstance(errors, tuple) else errors
    for row, (value, error) in enumerate(zip(values, upper, strict=True)):
        axes.annotate(
            value_format.format(value), (value + error, row), xytext=(5, 0), textcoords="offset points", va="center"
        )
    name_rows(axes, names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.margins(x=0.16)
    axes.grid(axis="y", visible=False)


def bars_height(num_bars: int) -> float:
    """Figure height in inches."""
    return 0.9 + 0.42 * max(1, min(num_bars, MANY_ROWS)) + 0.26 * max(0, num_bars - MANY_ROWS)


def dots(
    axes: Axes,
    names: Sequence[str],
    series: Mapping[str, Sequence[Point | None]],
    log: bool = False,
    reference: float | None = None,
) -> None:
    """A dot with a whisker per name and series; None is skipped. `reference` is a vertical line."""
    for index, (label, points) in enumerate(series.items()):
        rows = [row for row, point in enumerate(points) if point is not None]
        found = [point for point in points if point is not None]
        offset = 0.5 * ((index + 0.5) / len(series) - 0.5)
        axes.errorbar(
            [value for value, _, _ in found],
            [row + offset for row in rows],
            xerr=either_side(found),
            fmt=MARKERS[index % len(MARKERS)],
            color=COLOURS[index % len(COLOURS)],
            markersize=5.5,
            elinewidth=1.1,
            capsize=2.5,
            label=label,
        )
    if reference is not None:
        axes.axvline(reference, color=ink(), linewidth=0.9, linestyle="--")
    if log and any(point is not None and point[0] > 0 for points in series.values() for point in points):
        axes.set_xscale("log")
    name_rows(axes, names)
    axes.set_ylim(len(names) - 0.5, -0.5)


def dots_height(num_names: int, labels: Sequence[str]) -> float:
    """Figure height in inches, including a legend for several series."""
    legend = legend_height(labels) if len(labels) > 1 else 0.0
    return 0.85 + (0.26 + 0.12 * min(3, len(labels))) * num_names + legend


def either_side(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    """Whiskers in matplotlib's form, clipped at 0: rounding may put a value outside its own interval."""
    return [max(0.0, value - low) for value, low, _ in points], [max(0.0, high - value) for value, _, high in points]


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Row labels; long ones take two lines if the rows are few."""
    width = 16 if len(names) <= MANY_ROWS else 28
    axes.set_yticks(range(len(names)), [wrap(name, width) for name in names])


def wrap(name: str, width: int = 16) -> str:
    """A long name on two lines."""
    if len(name) <= width:
        return name
    middle = min((i for i, c in enumerate(name) if c == " "), key=lambda i: abs(i - len(name) / 2), default=None)
    return name if middle is None else f"{name[:middle]}\n{name[middle + 1 :]}"


def label_x(axes: Axes, quantity: str, whiskers: str = "") -> None:
    """The label of the x axis, with what whiskers show below it."""
    below = f"\nwhiskers: {whiskers}" if whiskers else ""
    axes.set_xlabel(textwrap.fill(quantity, AXIS_LABEL_WIDTH) + below)


def label_y(axes: Axes, quantity: str) -> None:
    """The label of the y axis, on lines that fit a low figure."""
    axes.set_ylabel(textwrap.fill(quantity, 28))


def legend_columns(labels: Sequence[str]) -> int:
    """2 if the two longest labels fit side by side over the axes, else 1."""
    return 2 if len(labels) > 1 and sum(sorted(map(len, labels))[-2:]) <= LEGEND_WIDTH else 1


def legend_height(labels: Sequence[str]) -> float:
    """Inches."""
    return 0.2 * -(-len(labels) // legend_columns(labels))


def legend_above(axes: Axes, handles: Sequence[Any] | None = None) -> None:
    """A legend above the axes, of labelled artists or of `handles`."""
    shown: Sequence[Any] = axes.get_legend_handles_labels()[0] if handles is None else handles
    if not shown:
        return
    labels = [str(handle.get_label()) for handle in shown]
    axes.legend(
        shown,
        labels,
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        ncols=legend_columns(labels),
        borderaxespad=0.2,
        columnspacing=1.2,
        handlelength=1.6,
    )
