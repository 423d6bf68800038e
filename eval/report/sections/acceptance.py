"""Acceptance of one drafter by one target, by set of prompts and by position in the block."""

from collections.abc import Sequence

from speedstack.eval.report import plots
from speedstack.eval.report.page import Cell, Column, FigureBlock, Headline, Section, Table, count, number
from speedstack.eval.report.sections import Found, each
from speedstack.eval.results.speed import AcceptanceResult

DOCUMENT = AcceptanceResult


def sections(found: Sequence[Found[AcceptanceResult]]) -> list[Section]:
    """A section a result."""
    return each("Drafting", found, _section)


def _section(acceptance: AcceptanceResult, title: str) -> Section:
    sets = (acceptance.overall, *acceptance.sets)
    counts_rows = all(entry.rows_per_token is not None for entry in sets)
    columns = [
        Column("prompts", is_number=False),
        Column("count"),
        Column("rounds"),
        Column("tokens"),
        Column("\u03c4", "pooled"),
        Column("\u03c4", "mean of responses"),
    ]
    if counts_rows:
        columns += [Column("target's rows", "a token"), Column("proposals", "a token")]
    rows = []
    for entry in sets:
        cells = [
            Cell(entry.name),
            count(entry.num_prompts),
            count(entry.num_rounds),
            count(entry.num_committed),
            number(entry.acceptance_length, ".2f"),
            number(entry.mean_of_responses, ".2f"),
        ]
        if counts_rows:
            cells += [number(entry.rows_per_token, ".2f"), number(entry.drafted_per_token, ".2f")]
        rows.append(tuple(cells))
    caption = "How far into a block the target agrees. The sum of a curve's points, plus 1, is about its \u03c4."
    sampling = "greedy" if acceptance.temperature == 0 else f"temperature {acceptance.temperature:g}"
    return Section(
        title,
        (
            f"Each round the drafter proposes up to {acceptance.block_size - 1} tokens and the target checks them in "
            "one pass. What the target would not have written itself is dropped, so the text is the same with the "
            "drafter and without.",
        ),
        (
            Table(tuple(columns), tuple(rows)),
            FigureBlock(plots.acceptance_by_position(acceptance), caption),
        ),
        (
            Headline(
                f"{acceptance.overall.acceptance_length:.2f}",
                f"tokens a pass of the target (\u03c4), of {acceptance.block_size}",
                f"{acceptance.overall.num_prompts} held-out prompts, {acceptance.max_new_tokens} new tokens each, "
                f"{sampling}",
            ),
        ),
    )
