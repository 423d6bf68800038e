"""MXFP4 kernels against other libraries."""

from collections.abc import Sequence

from speedstack.eval.microbench.quant import QuantBench
from speedstack.eval.report.page import Cell, Column, Section, Table, number, words
from speedstack.eval.report.page import spread_cell as spread
from speedstack.eval.report.sections import Found, each

DOCUMENT = QuantBench
COLUMNS = (
    *words(("operation", "dtype", "contestant")),
    Column("time", "ms"),
    Column("rate", "GB/s"),
    Column("of a copy's rate"),
    Column("times ours"),
    Column("relative squared error"),
)


def sections(found: Sequence[Found[QuantBench]]) -> list[Section]:
    """A section a result."""
    return each("MXFP4 kernels", found, _section)


def _section(result: QuantBench, title: str) -> Section:
    rows = tuple(
        (
            Cell(one.operation),
            Cell(one.dtype),
            Cell(one.contestant),
            spread(one.seconds, 1e3, 1),
            number(one.bytes_per_second, ".2f", 1e-9),
            number(one.fraction_of_copy, ".1f", 100, "%"),
            number(one.times_ours, ".2f", suffix="\u00d7"),
            number(one.relative_squared_error, ".4f"),
        )
        for one in result.timings
    )
    absent = tuple(f"{one.name} did not run: {one.reason}" for one in result.unavailable)
    shape = " \u00d7 ".join(map(str, result.shape))
    text = f"A weight of {shape} on {result.device}, scale rule {result.scale_rule}."
    return Section(title, (text, *absent), (Table(COLUMNS, rows, "Medians, with quartiles in brackets."),))
