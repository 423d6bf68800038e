"""Sections of ablations: a grid of formats and drafters, and ways of drafting."""

import statistics
from collections.abc import Sequence

from speedstack.eval.report import plots, tables
from speedstack.eval.report.page import Block, FigureBlock, Headline, Section
from speedstack.eval.report.plots import Point
from speedstack.eval.results.ablation import PLAIN, AblationGrid, DrafterAblation, DrafterRun
from speedstack.eval.results.schema import Z95
from speedstack.eval.results.table import Table, plural

# More curves than these are a tangle.
NUM_SURVIVAL_CURVES = 6


def grid(result: AblationGrid, title: str) -> Section:
    table = Table.of(tables.grid(result), result.rows, "\u00b1 is one standard error.").without_empty_columns()
    failed = plural(result.num_failed, "row") + " failed; their errors are in the table."
    return Section(
        title,
        (
            f"{plural(len(result.rows), 'row')} of number format, modules, method, drafter and temperature, all on the "
            "same held-out text and from the same full-precision model.",
            *((failed,) if result.num_failed else ()),
            *result.notes,
        ),
        (table, *_grid_figures(result)),
        _grid_headlines(result),
    )


def _grid_figures(result: AblationGrid) -> list[Block]:
    blocks: list[Block] = []
    models = [row for row in result.models() if row.kl_nats]
    if models:
        points = [_interval(row.kl_nats, row.kl_stderr_nats, 1e3) for row in models]
        label = "KL from full precision (millinats a token, log scale; whiskers: 95 % interval)"
        svg = plots.dots("Divergence of the grid", [row.model_name for row in models], {"KL": points}, label, log=True)
        blocks.append(FigureBlock(svg, "Distance from the full-precision model; less is better."))
    drafted = [row for row in result.rows if row.tau is not None and row.temperature == 0]
    if drafted:
        drafters = dict.fromkeys(row.drafter for row in drafted)
        names = list(dict.fromkeys(row.model_name for row in drafted))
        found = {(row.model_name, row.drafter): _interval(row.tau, row.tau_stderr, 1) for row in drafted}
        series = {f"drafter for the {one} model": [found.get((name, one)) for name in names] for one in drafters}
        label = "\u03c4, tokens a round, greedy (whiskers: 95 % interval)"
        svg = plots.dots("Acceptance over the grid", names, series, label)
        blocks.append(FigureBlock(svg, "Tokens a round, by the model served and the one its drafter was made for."))
    return blocks


def _interval(value: float | None, stderr: float | None, scale: float) -> Point | None:
    if value is None:
        return None
    error = Z95 * (stderr or 0.0)
    # An axis of logarithms has no place for what is not positive.
    return scale * value, scale * max(value - error, value / 10), scale * (value + error)


def _grid_headlines(result: AblationGrid) -> tuple[Headline, ...]:
    rows = [row for row in result.models() if row.kl_nats]
    if not rows:
        return ()
    best = min(rows, key=lambda row: row.kl_nats or 0.0)
    bits = "" if best.bits_per_weight is None else f"{best.bits_per_weight:.4g} bits a weight"
    return (Headline(f"{1e3 * (best.kl_nats or 0.0):.3g}", f"millinats a token: least KL, {best.model_name}", bits),)


def drafters(result: DrafterAblation, title: str) -> Section:
    """Drafters trained on the same text for the same time."""
    means = {mean.row: mean for mean in result.means()}
    table = Table.of(tables.DRAFTERS, means.values(), "Means over seeds; extremes in brackets.")
    blocks: list[Block] = [table.without_empty_columns()]
    tau = {row: mean.tau_simulated for row, mean in means.items()}
    if tau:
        blocks += [_tau_figure(result, list(tau)), *_survival_figures(result, tau)]
    text = (
        f"Every row was trained on the same text for {result.budget_seconds:g} seconds of optimizer steps, so that "
        "dear steps are fewer steps. The target's greedy text is replayed to simulate \u03c4; the engine measures it "
        "as served."
    )
    headlines: tuple[Headline, ...] = ()
    best = max(tau, key=lambda row: tau[row], default=PLAIN)
    if PLAIN in tau and best != PLAIN:
        label = f"tokens a round (\u03c4) of the best drafter, {best}"
        headlines = (Headline(f"{tau[best]:.2f}", label, f"plain {tau[PLAIN]:.2f}"),)
    return Section(title, (text,), tuple(blocks), headlines)


def _tau_figure(result: DrafterAblation, rows: Sequence[str]) -> FigureBlock:
    series: dict[str, list[Point | None]] = {"simulated": [], "served": []}
    for row in rows:
        sets = [run.heldout for run in result.of(row)]
        simulated = [one.tau_simulated for one in sets]
        served = [one.tau_served for one in sets if one.tau_served is not None]
        for name, values in (("simulated", simulated), ("served", served)):
            series[name].append((statistics.mean(values), min(values), max(values)) if values else None)
    label = "\u03c4, tokens a round, greedy (whiskers: extremes of seeds)"
    kept = {name: points for name, points in series.items() if any(points)}
    return FigureBlock(plots.dots("Acceptance length by drafter", rows, kept, label), "Each row's mean over its seeds.")


def _survival_figures(result: DrafterAblation, tau: dict[str, float]) -> list[FigureBlock]:
    """Plain and the best rows; none without curves."""
    order = sorted(tau, key=lambda row: (row != PLAIN, -tau[row]))
    found = {row: _survival(result.of(row)) for row in order[:NUM_SURVIVAL_CURVES]}
    curves = {row: survival for row, survival in found.items() if survival}
    if not curves:
        return []
    svg = plots.survival_curves("Survival by drafter", curves)
    return [FigureBlock(svg, f"How far into a block drafts survive: {', '.join(curves)}; means over seeds.")]


def _survival(runs: Sequence[DrafterRun]) -> list[float]:
    curves = [run.heldout.survival for run in runs if run.heldout.survival]
    return [statistics.mean(column) for column in zip(*curves, strict=False)]
