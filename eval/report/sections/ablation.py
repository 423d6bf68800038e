"""A grid of number format, modules, method, drafter and temperature: what each combination costs and gives."""

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
    format_bytes,
    format_spread,
    number,
    number_and_error,
    plural,
    words,
)
from speedstack.eval.report.sections import Found, each
from speedstack.eval.results.ablation import BUSY_CORES, AblationGrid, AblationRow
from speedstack.eval.results.schema import Z95

DOCUMENT = AblationGrid


def sections(found: Sequence[Found[AblationGrid]]) -> list[Section]:
    """A section a grid."""
    return each("Ablation", found, _section)


def _section(grid: AblationGrid, title: str) -> Section:
    rate_on_gpu = f"on {grid.gpu}, predicted" if grid.gpu else "predicted"
    columns = (
        *words(("model", "drafter")),
        Column("temperature"),
        Column("served", is_number=False),
        Column("weight", "bits, scales included"),
        Column("whole model"),
        Column("experts"),
        Column("KL", "millinats a token"),
        Column("perplexity"),
        Column("top-1 agreement"),
        Column(grid.score_metric or "score"),
        Column("\u03c4", "greedy"),
        Column("\u03c4", "at its temperature"),
        Column("decoding", "tokens/s"),
        Column("decoding", f"tokens/s {rate_on_gpu}"),
    )
    table = Table(columns, tuple(map(_row, grid.rows)), "\u00b1 is one standard error.").without_empty_columns()
    failed = plural(grid.num_failed, "row") + " failed; their errors are in the table." if grid.num_failed else ""
    return Section(
        title,
        (
            f"{plural(len(grid.rows), 'row')} of number format, modules, method, drafter and temperature, all on the "
            "same held-out text and from the same full-precision model.",
            *((failed,) if failed else ()),
            *grid.notes,
        ),
        (table, *_figures(grid)),
        _headlines(grid),
    )


def _row(row: AblationRow) -> tuple[Cell, ...]:
    rate, busy = row.tokens_per_second, row.busy_cores_of_others
    doubt = f"others kept {busy:.1f} cores busy" if busy is not None and busy > BUSY_CORES else ""
    return (
        Cell(row.model_name, warning=row.error or ""),
        Cell("none" if row.drafter == "none" else f"for the {row.drafter} model"),
        number(row.temperature, "g"),
        Cell(row.served or "\u2013"),
        number(row.bits_per_weight, ".4g"),
        _bytes(row.model_bytes),
        _bytes(row.expert_bytes),
        number_and_error(row.kl_nats, row.kl_stderr_nats, ".3g", 1e3),
        number(row.perplexity, ".3f"),
        number(row.top1_agreement, ".2f", 100, "%"),
        number_and_error(row.score, row.score_stderr, ".3f"),
        number_and_error(row.tau_greedy, row.tau_greedy_stderr, ".2f"),
        number_and_error(row.tau, row.tau_stderr, ".2f"),
        MISSING if rate is None else Cell(format_spread(rate), rate.median, doubt),
        number(row.predicted_tokens_per_second, ",.0f"),
    )


def _bytes(size: int | None) -> Cell:
    return MISSING if size is None else Cell(format_bytes(size), size)


def _figures(grid: AblationGrid) -> list[Block]:
    blocks: list[Block] = []
    models = [row for row in grid.models() if row.kl_nats]
    if models:
        points = [_interval(row.kl_nats, row.kl_stderr_nats, 1e3) for row in models]
        label = "KL from full precision (millinats a token, log scale; whiskers: 95 % interval)"
        svg = plots.dots("Divergence of the grid", [row.model_name for row in models], {"KL": points}, label, log=True)
        blocks.append(FigureBlock(svg, "Distance from the full-precision model; less is better."))
    drafted = [row for row in grid.rows if row.tau is not None and row.temperature == 0]
    if drafted:
        drafters = dict.fromkeys(row.drafter for row in drafted)
        names = list(dict.fromkeys(row.model_name for row in drafted))
        found = {(row.model_name, row.drafter): _interval(row.tau, row.tau_stderr, 1) for row in drafted}
        series = {f"drafter for the {one} model": [found.get((name, one)) for name in names] for one in drafters}
        label = "\u03c4, tokens a round, greedy (whiskers: 95 % interval)"
        svg = plots.dots("Acceptance over the grid", names, series, label)
        blocks.append(FigureBlock(svg, "Tokens a round, by the model served and the one its drafter was made for."))
    return blocks


def _interval(value: float | None, stderr: float | None, scale: float) -> tuple[float, float, float] | None:
    if value is None:
        return None
    error = Z95 * (stderr or 0.0)
    # An axis of logarithms has no place for what is not positive.
    return scale * value, scale * max(value - error, value / 10), scale * (value + error)


def _headlines(grid: AblationGrid) -> tuple[Headline, ...]:
    rows = [row for row in grid.models() if row.kl_nats]
    if not rows:
        return ()
    best = min(rows, key=lambda row: row.kl_nats or 0.0)
    bits = "" if best.bits_per_weight is None else f"{best.bits_per_weight:.4g} bits a weight"
    return (Headline(f"{1e3 * (best.kl_nats or 0.0):.3g}", f"millinats a token: least KL, {best.model_name}", bits),)
