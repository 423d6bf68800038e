"""What fake-quant costs in training: memory of a layer, time of a step."""

from collections.abc import Sequence

from speedstack.eval.microbench.qat import QatCost
from speedstack.eval.report.page import Cell, Column, Section, Table, compact, format_bytes, number
from speedstack.eval.report.sections import Found, each

DOCUMENT = QatCost


def sections(found: Sequence[Found[QatCost]]) -> list[Section]:
    """A section a result."""
    return each("Cost of fake-quant", found, _section)


def _section(result: QatCost, title: str) -> Section:
    layers = tuple(
        (
            Cell(one.way),
            *(
                Cell(format_bytes(size), size)
                for size in (one.kept_weight_bytes, one.kept_other_bytes, one.forward_bytes, one.peak_bytes)
            ),
        )
        for one in result.layers
    )
    steps = tuple(
        (Cell(one.precision), number(one.ratio, ".3f", suffix="\u00d7"), number(one.cpu_ratio, ".3f", suffix="\u00d7"))
        for one in result.steps
    )
    layer_columns = (
        Column("way", is_number=False),
        Column("kept for backward, weights"),
        Column("kept for backward, others"),
        Column("after the last forward"),
        Column("peak"),
    )
    step_columns = (
        Column("precision", is_number=False),
        Column("step, fake-quant over plain"),
        Column("its processor time"),
    )
    return Section(
        title,
        (f"Layers of {compact(result.layer_shape)}.",),
        (
            Table(layer_columns, layers, "Memory of experts that are trained through their quantization."),
            Table(step_columns, steps, "Time of an optimizer step; ratios of medians."),
        ),
    )
