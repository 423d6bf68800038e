"""Registers and shared memory of the GPU kernels."""

from collections.abc import Sequence

from speedstack.eval.microbench.kernel_resources import KernelResourcesResult
from speedstack.eval.report.page import Cell, Column, Section, Table, count, format_bytes, plural, words
from speedstack.eval.report.sections import Found, each

DOCUMENT = KernelResourcesResult
COLUMNS = (
    *words(("model", "experts", "phase", "operation", "grid")),
    Column("tile"),
    Column("warps"),
    Column("registers", "a thread"),
    Column("spilled", "bytes a thread"),
    Column("shared memory"),
)


def sections(found: Sequence[Found[KernelResourcesResult]]) -> list[Section]:
    """A section a result."""
    return each("GPU kernels", found, _section)


def _section(result: KernelResourcesResult, title: str) -> Section:
    rows = tuple(
        (
            Cell(one.model),
            Cell(one.expert_format),
            Cell(one.phase),
            Cell(one.op),
            Cell(" \u00d7 ".join(map(str, one.grid))),
            count(one.tile),
            count(one.num_warps),
            count(one.num_registers),
            count(one.local_bytes),
            Cell(format_bytes(one.shared_bytes), one.shared_bytes),
        )
        for one in result.kernels
    )
    num_spilling = sum(one.local_bytes > 0 for one in result.kernels)
    text = f"{plural(len(rows), 'kernel')} compiled for {result.target}, {num_spilling} of which spill registers."
    return Section(title, (text,), (Table(COLUMNS, rows),))
