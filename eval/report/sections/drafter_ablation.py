"""Drafters trained on the same text for the same time: what each way of drafting is worth."""

import statistics
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
    count,
    number,
)
from speedstack.eval.report.sections import Found, each
from speedstack.eval.results.ablation import DrafterAblation, DrafterRun

DOCUMENT = DrafterAblation
PLAIN = "plain"


def sections(found: Sequence[Found[DrafterAblation]]) -> list[Section]:
    """A section an ablation."""
    return each("Ablation of drafters", found, _section)


def _section(ablation: DrafterAblation, title: str) -> Section:
    rows = [row for row in ablation.rows if ablation.of(row)]
    blocks: list[Block] = [_table(ablation, rows)]
    if rows:
        blocks += [_tau_figure(ablation, rows), *_survival_figures(ablation, rows)]
    text = (
        f"Every row was trained on the same text for {ablation.budget_seconds:g} seconds of optimizer steps, so that "
        "dear steps are fewer steps. The target's greedy text is replayed to simulate \u03c4; the engine measures it "
        "as served."
    )
    headlines: tuple[Headline, ...] = ()
    if PLAIN in rows and len(rows) > 1:
        best = max(rows, key=lambda row: _mean_tau(ablation, row))
        if best != PLAIN:
            ours, plain = _mean_tau(ablation, best), _mean_tau(ablation, PLAIN)
            headlines = (
                Headline(f"{ours:.2f}", f"tokens a round (\u03c4) of the best drafter, {best}", f"plain {plain:.2f}"),
            )
    return Section(title, (text,), tuple(blocks), headlines)


def _table(ablation: DrafterAblation, rows: Sequence[str]) -> Table:
    columns = (
        Column("row", is_number=False),
        Column("seeds"),
        Column("steps"),
        Column("step", "ms"),
        Column("\u03c4 simulated", "greedy"),
        Column("over plain"),
        Column("\u03c4 served", "greedy"),
        Column("\u03c4 served", "T = 1"),
        Column("\u03c4 served", "T = 1, shared noise"),
        Column("\u03c4 of code prompts"),
        Column("decoding", "tokens/s"),
    )
    plain = _mean_tau(ablation, PLAIN) if ablation.of(PLAIN) else None
    cells = tuple(_row(ablation, row, plain) for row in rows)
    return Table(columns, cells, "Means over seeds; extremes in brackets.").without_empty_columns()


def _row(ablation: DrafterAblation, row: str, plain: float | None) -> tuple[Cell, ...]:
    runs, time, mean = ablation.of(row), ablation.times.row(row), _mean_tau(ablation, row)
    simulated = [run.heldout.tau_simulated for run in runs]
    extremes = f" ({min(simulated):.2f}\u2013{max(simulated):.2f})" if len(runs) > 1 else ""
    return (
        Cell(row, note=compact(ablation.rows[row])),
        count(len(runs)),
        count(runs[0].num_steps),
        MISSING if time is None else number(time.median_ms, ".0f"),
        Cell(f"{mean:.3f}{extremes}", mean),
        number(mean / plain if plain else None, ".2f", suffix="\u00d7"),
        _mean([run.heldout.tau_served for run in runs], ".3f"),
        _mean([run.heldout.tau_served_t1 for run in runs], ".3f"),
        _mean([run.heldout.tau_served_t1_shared_noise for run in runs], ".3f"),
        _mean([run.code.tau_served or run.code.tau_simulated for run in runs if run.code], ".3f"),
        _mean([run.heldout.tokens_per_second for run in runs], ",.0f"),
    )


def _tau_figure(ablation: DrafterAblation, rows: Sequence[str]) -> FigureBlock:
    series: dict[str, list[tuple[float, float, float] | None]] = {"simulated": [], "served": []}
    for row in rows:
        runs = ablation.of(row)
        for name, values in (
            ("simulated", [run.heldout.tau_simulated for run in runs]),
            ("served", [run.heldout.tau_served for run in runs if run.heldout.tau_served is not None]),
        ):
            series[name].append((statistics.mean(values), min(values), max(values)) if values else None)
    label = "\u03c4, tokens a round, greedy (whiskers: extremes of seeds)"
    kept = {name: points for name, points in series.items() if any(points)}
    return FigureBlock(plots.dots("Acceptance length by drafter", rows, kept, label), "Each row's mean over its seeds.")


def _survival_figures(ablation: DrafterAblation, rows: Sequence[str]) -> list[FigureBlock]:
    """Plain and the rows above it, or the first; more curves than six are a tangle. None without curves."""
    order = sorted(rows, key=lambda row: (row != PLAIN, -_mean_tau(ablation, row)))
    curves = {row: _survival(ablation.of(row)) for row in order[:6] if _survival(ablation.of(row))}
    if not curves:
        return []
    svg = plots.survival_curves("Survival by drafter", curves)
    return [FigureBlock(svg, f"How far into a block drafts survive: {', '.join(curves)}; means over seeds.")]


def _survival(runs: Sequence[DrafterRun]) -> list[float]:
    curves = [run.heldout.survival for run in runs if run.heldout.survival]
    return [statistics.mean(column) for column in zip(*curves, strict=False)]


def _mean_tau(ablation: DrafterAblation, row: str) -> float:
    return statistics.mean(run.heldout.tau_simulated for run in ablation.of(row))


def _mean(values: Sequence[float | None], form: str) -> Cell:
    known = [value for value in values if value is not None]
    return number(statistics.mean(known), form) if known else MISSING
