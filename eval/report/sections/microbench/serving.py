"""Ways of speculating with one target and one drafter: tokens a round, rows of the target, tokens a second."""

from collections.abc import Sequence

from speedstack.eval.microbench.serving import ServingBench, ServingRow
from speedstack.eval.report import plots
from speedstack.eval.report.page import (
    Block,
    Cell,
    Column,
    FigureBlock,
    Headline,
    Section,
    Table,
    number,
    plural,
    words,
)
from speedstack.eval.report.page import spread_cell as spread
from speedstack.eval.report.sections import Found, each

DOCUMENT = ServingBench
NO_DRAFTER = "no drafter"


def sections(found: Sequence[Found[ServingBench]]) -> list[Section]:
    """A section a result."""
    return each("Ways to speculate", found, _section)


def _section(result: ServingBench, title: str) -> Section:
    columns = (
        *words(("way", "backend")),
        Column("temperature"),
        Column("\u03c4", "tokens a round"),
        Column("target's rows", "a token"),
        Column("proposals", "a token"),
        Column("decoding", "tokens/s"),
    )
    rows = tuple(
        (
            Cell(row.name),
            Cell(row.backend),
            number(row.temperature, "g"),
            number(row.acceptance.acceptance_length, ".2f"),
            number(row.acceptance.rows_per_token, ".2f"),
            number(row.acceptance.drafted_per_token, ".2f"),
            spread(row.decode_tokens_per_second),
        )
        for row in result.rows
    )
    blocks: list[Block] = [
        Table(columns, rows, "Medians of the repeats, with quartiles in brackets.").without_empty_columns()
    ]
    timed = [row for row in result.rows if row.decode_tokens_per_second is not None]
    if timed:
        blocks.append(_rates(timed))
    blocks.append(_lengths(result.rows))
    text = (
        f"{plural(result.num_prompts, 'prompt')}, {result.num_new_tokens} new tokens each, one sequence at a time. "
        "Every row's text is that of the row without a drafter at its temperature."
    )
    if any(row.backend == "reference" for row in result.rows):
        text += " The reference backend is built to be checked and not to be fast."
    return Section(title, (text,), tuple(blocks), _headlines(timed))


def _headlines(timed: Sequence[ServingRow]) -> tuple[Headline, ...]:
    plain = next((row for row in timed if row.name == NO_DRAFTER and row.temperature == 0), None)
    if plain is None or plain.decode_tokens_per_second is None:
        return ()
    rates = {
        row.name: row.decode_tokens_per_second.median
        for row in timed
        if row.decode_tokens_per_second is not None and row.temperature == 0 and row.backend == plain.backend
    }
    best = max(rates, key=lambda name: rates[name])
    base = plain.decode_tokens_per_second.median
    return (
        Headline(
            f"{rates[best] / base:.2f}\u00d7",
            f"decoding by {best}, greedy, against no drafter",
            f"{rates[best]:,.0f} and {base:,.0f} tokens/s (medians)",
        ),
    )


def _rates(timed: Sequence[ServingRow]) -> FigureBlock:
    rates = [row.decode_tokens_per_second for row in timed if row.decode_tokens_per_second is not None]
    svg = plots.bars(
        "Decode rate by way to speculate",
        [_label(row, timed) for row in timed],
        [rate.median for rate in rates],
        "decode rate (tokens/s; whiskers: quartiles)",
        ([rate.median - rate.q1 for rate in rates], [rate.q3 - rate.median for rate in rates]),
        "{:,.0f}",
    )
    return FigureBlock(svg, "Tokens a second while decoding one sequence; higher is better.")


def _lengths(rows: Sequence[ServingRow]) -> FigureBlock:
    drafted = [row for row in rows if row.proposer != "none"]
    svg = plots.bars(
        "Tokens a round by way to speculate",
        [_label(row, drafted) for row in drafted],
        [row.acceptance.acceptance_length for row in drafted],
        "\u03c4, tokens a round of the target",
        value_format="{:.2f}",
    )
    return FigureBlock(svg, "Tokens committed a round, the target's own included; without a drafter it is 1.")


def _label(row: ServingRow, rows: Sequence[ServingRow]) -> str:
    """The way's name, with what tells it from the others of that name."""
    label = row.name if row.temperature == 0 else f"{row.name}, T\u00a0=\u00a0{row.temperature:g}"
    same = [other for other in rows if (other.name, other.temperature) == (row.name, row.temperature)]
    return label if len(same) == 1 else f"{label} ({row.backend})"
