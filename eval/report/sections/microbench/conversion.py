"""Memory and time of converting checkpoints."""

from collections.abc import Sequence

from speedstack.eval.report.page import Cell, Column, Section, Table, count, format_bytes, number
from speedstack.eval.report.sections import Found, each
from speedstack.eval.results.microbench import ConversionResult

DOCUMENT = ConversionResult
COLUMNS = (
    Column("conversion", is_number=False),
    Column("source"),
    Column("shards"),
    Column("largest shard written"),
    Column("peak memory"),
    Column("peak", "in shards"),
    Column("time", "s"),
)


def sections(found: Sequence[Found[ConversionResult]]) -> list[Section]:
    """A section a result."""
    return each("Conversion", found, _section)


def _section(result: ConversionResult, title: str) -> Section:
    rows = tuple(
        (
            Cell(one.name, note=one.description),
            Cell(format_bytes(one.source_bytes), one.source_bytes),
            count(one.num_source_shards),
            Cell(format_bytes(one.max_shard_bytes), one.max_shard_bytes),
            Cell(format_bytes(one.peak_bytes), one.peak_bytes),
            number(one.peak_shards if one.max_shard_bytes else None, ".2f"),
            number(one.seconds, ".1f"),
        )
        for one in result.conversions
    )
    text = "Each in a process of its own; memory is the most it held above what it began with."
    return Section(title, (text,), (Table(COLUMNS, rows),))
