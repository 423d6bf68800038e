"""Notebook figures of an ablation grid: bits, bytes and speed against divergence, score and tau.

Colours show the quantized modules and markers the method, for print and for colour-blind readers; whiskers are 95 %
intervals. Each function draws the rows that have both values, and raises `NothingToDraw` if none has.
"""

import contextlib
import itertools
from collections.abc import Callable, Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

from speedstack.eval.report.drawing import (
    COLOURS,
    MARKERS,
    NothingToDraw,
    ink,
    label_x,
    label_y,
    legend_above,
    legend_height,
    new_figure,
)
from speedstack.eval.report.figures import STYLE, WINDOWS
from speedstack.eval.results.ablation import AblationGrid, AblationRow
from speedstack.eval.results.schema import Z95

_MODULES = ("experts", "attention", "lm_head", "all", "")
_METHODS = ("rtn", "mse", "gptq", "qat-ce", "qad", "none")
# Bits that an axis names, where it reaches so far.
_TICKS = (2, 3, 4, 5, 6, 8, 12, 16, 32)
HEIGHT_INCHES = 2.8  # without a legend
BITS = "bits a quantized weight, scales included (log scale)"
BYTES = "bytes of the whole model (MB)"
NATS = "KL from full precision (millinats a token, log scale)"


def ablation_figures(grid: AblationGrid) -> dict[str, Figure]:
    """Every figure the grid has rows for, by file name."""
    functions = {
        "kl_by_bits": kl_by_bits,
        "kl_by_bytes": kl_by_bytes,
        "kl_by_speed": kl_by_speed,
        "score_by_bits": grid_score_by_bits,
        "tau_by_bits": tau_by_bits,
    }
    drawn = {}
    for name, function in functions.items():
        with contextlib.suppress(NothingToDraw):
            drawn[name] = function(grid)
    return drawn


def kl_by_bits(grid: AblationGrid) -> Figure:
    """KL of every quantized model over the bits per quantized weight."""
    return _points(_with_kl(grid), lambda row: row.bits_per_weight, _kl, BITS, NATS, WINDOWS)


def kl_by_bytes(grid: AblationGrid) -> Figure:
    """KL of every quantized model over the bytes of the whole model."""
    return _linear_x(_points(_with_kl(grid), _megabytes, _kl, BYTES, NATS, WINDOWS))


def kl_by_speed(grid: AblationGrid) -> Figure:
    """KL over the predicted tokens/s of greedy decoding; points are filled for rows with a drafter.

    A line marks the predicted tokens/s of the full-precision model without a drafter (its KL is 0). Speeds are
    predicted, because rows served dequantized do not measure their format's speed.
    """
    rows = [row for row in grid.rows if row.kl_nats is not None and row.kl_nats > 0 and row.temperature == 0]
    label = f"tokens/s on {grid.gpu}, predicted (filled: with a drafter)"
    full = next((row for row in grid.rows if row.method == "none" and row.drafter == "none"), None)
    line = None if full is None else full.predicted_tokens_per_second
    return _linear_x(
        _points(
            rows,
            lambda row: row.predicted_tokens_per_second,
            _kl,
            label,
            NATS,
            WINDOWS,
            fills_drafted=True,
            full_precision_x=line,
        )
    )


def _linear_x(figure: Figure) -> Figure:
    (axes,) = figure.axes
    axes.set_xscale("linear")
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
    return figure


def grid_score_by_bits(grid: AblationGrid) -> Figure:
    """Score of every model over the bits per quantized weight."""
    rows = [row for row in grid.models() if row.score is not None]
    return _points(
        rows,
        lambda row: row.bits_per_weight,
        lambda row: (row.score or 0.0, row.score_stderr),
        BITS,
        grid.score_metric or "score",
        "95 % interval over documents",
        log_y=False,
    )


def tau_by_bits(grid: AblationGrid) -> Figure:
    """Tokens per round over the target's precision: a colour per drafter and temperature, a marker per method."""
    rows = [row for row in grid.rows if row.tau is not None and row.bits_per_weight and row.modules in ("experts", "")]
    if not rows:
        raise NothingToDraw("no row has a drafter's tokens a round")
    keys = sorted({(row.temperature, row.drafter) for row in rows})
    # More lines than colours that are told apart: shades, from cold to hot.
    shades = [to_hex(colormaps["cividis"](index / len(keys))) for index in range(len(keys))]
    colours = COLOURS if len(keys) <= len(COLOURS) else shades
    with new_figure(STYLE, HEIGHT_INCHES) as (figure, axes):
        for index, key in enumerate(keys):
            for row in rows:
                if (row.temperature, row.drafter) == key:
                    _point(axes, row, row.bits_per_weight or 0.0, row.tau or 0.0, row.tau_stderr, colours[index])
        named = [
            (f"trained for {drafter}, T={temperature:g}", colours[index])
            for index, (temperature, drafter) in enumerate(keys)
        ]
        _finish(figure, rows, named, BITS, "tokens a round (tau)", "95 % interval over texts")
    return figure


def _marker(method: str) -> str:
    """Methods unknown here share the last marker."""
    return MARKERS[_METHODS.index(method)] if method in _METHODS else MARKERS[-1]


def _quantity(label: str) -> str:
    """An axis label without its unit."""
    return label.partition(" (")[0].partition(",")[0]


def _with_kl(grid: AblationGrid) -> list[AblationRow]:
    return [row for row in grid.models() if row.kl_nats is not None and row.kl_nats > 0]


def _kl(row: AblationRow) -> tuple[float, float | None]:
    return 1e3 * (row.kl_nats or 0.0), None if row.kl_stderr_nats is None else 1e3 * row.kl_stderr_nats


def _megabytes(row: AblationRow) -> float | None:
    return None if row.model_bytes is None else row.model_bytes / 1e6


def _points(
    rows: Sequence[AblationRow],
    x_of: Callable[[AblationRow], float | None],
    y_of: Callable[[AblationRow], tuple[float, float | None]],
    x_label: str,
    y_label: str,
    whiskers: str,
    log_y: bool = True,
    fills_drafted: bool = False,
    full_precision_x: float | None = None,
) -> Figure:
    rows = [row for row in rows if x_of(row)]
    if not rows:
        raise NothingToDraw(f"no row has both {_quantity(y_label)} and {_quantity(x_label)}")
    modules = dict.fromkeys((*_MODULES, *(row.modules for row in rows)))
    colours = dict(zip(modules, itertools.cycle(COLOURS)))
    with new_figure(STYLE, HEIGHT_INCHES) as (figure, axes):
        if log_y:
            axes.set_yscale("log")
        for row in rows:
            y, stderr = y_of(row)
            filled = fills_drafted and row.drafter != "none"
            _point(axes, row, x_of(row) or 0.0, y, stderr, colours[row.modules], filled)
        shown = [name for name in modules if any(row.modules == name for row in rows)]
        named = [(name or "full precision", colours[name]) for name in shown]
        lines = []
        if full_precision_x is not None:
            label = "full precision, undrafted"
            lines = [axes.axvline(full_precision_x, color=ink(), linestyle=":", linewidth=1.0, label=label)]
        _finish(figure, rows, named, x_label, y_label, whiskers, lines)
    return figure


def _point(
    axes: Axes, row: AblationRow, x: float, y: float, stderr: float | None, colour: str, is_filled: bool = False
) -> None:
    axes.errorbar(
        x,
        y,
        yerr=None if stderr is None else Z95 * stderr,
        fmt=_marker(row.method),
        color=colour,
        markerfacecolor=colour if is_filled else "none",
        markersize=5.5,
        capsize=2.5,
        elinewidth=0.9,
    )


def _finish(
    figure: Figure,
    rows: Sequence[AblationRow],
    named: Sequence[tuple[str, str]],
    x_label: str,
    y_label: str,
    whiskers: str,
    lines: Sequence[Line2D] = (),
) -> None:
    """Labels, and the legend of colours, markers and `lines`, which the figure is made higher for."""
    (axes,) = figure.axes
    axes.set_xscale("log", base=2)
    low, high = axes.get_xlim()
    axes.set_xticks([bits for bits in _TICKS if low <= bits <= high])
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    label_x(axes, x_label, whiskers)
    label_y(axes, y_label)
    used = {row.method for row in rows} - {"none"}
    methods = [name for name in dict.fromkeys((*_METHODS, *(row.method for row in rows))) if name in used]
    handles = [Line2D([], [], color=colour, linewidth=3, label=label) for label, colour in named]
    handles += [
        Line2D(
            [],
            [],
            color=ink(),
            linestyle="none",
            marker=_marker(name),
            markerfacecolor="none",
            label=name,
        )
        for name in methods
    ]
    handles += lines
    figure.set_figheight(HEIGHT_INCHES + legend_height([str(handle.get_label()) for handle in handles]))
    legend_above(axes, handles)
