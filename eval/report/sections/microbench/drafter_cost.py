"""What training a drafter costs: time of a step against peers, memory of the loss."""

from collections.abc import Sequence

from speedstack.eval.microbench.drafter import DrafterCost
from speedstack.eval.report.page import Cell, Column, Section, Table, format_bytes, number, words
from speedstack.eval.report.sections import Found, each

DOCUMENT = DrafterCost


def sections(found: Sequence[Found[DrafterCost]]) -> list[Section]:
    """A section a result."""
    return each("Training a drafter", found, _section)


def _section(result: DrafterCost, title: str) -> Section:
    steps = tuple(
        (
            Cell(times.shape.name),
            Cell(times.loss),
            Cell(one.contestant),
            number(one.median_ms, ",.0f"),
            number(one.median_cpu_ms, ",.0f"),
            number(times.speedup if index == 0 else None, ".2f", suffix="\u00d7"),
        )
        for times in result.times
        for index, one in enumerate(times.contestants)
    )
    memory = tuple(
        (
            Cell(one.way),
            Cell(f"{one.num_positions:,} positions, {one.vocab_size:,} tokens", float(one.num_positions)),
            Cell(format_bytes(one.logits_bytes), one.logits_bytes),
            Cell(format_bytes(one.peak_bytes), one.peak_bytes),
        )
        for one in result.memory
    )
    step_columns = (
        *words(("shape", "loss", "contestant")),
        Column("step", "ms, median"),
        Column("processor time", "ms, median"),
        Column("ours over the fastest peer"),
    )
    memory_columns = (Column("way", is_number=False), Column("size"), Column("the logits alone"), Column("peak"))
    absent = tuple(f"{one.name} did not run: {one.reason}" for one in result.unavailable)
    return Section(
        title,
        ("Optimizer steps on random features, contestants taking turns.", *absent),
        (
            Table(step_columns, steps, "Time of an optimizer step."),
            Table(memory_columns, memory, "Memory of head, loss and gradient."),
        ),
    )
