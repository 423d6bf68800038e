"""What each layer, and each expert, costs when it alone is quantized."""

from collections.abc import Sequence

from speedstack.eval.report import plots
from speedstack.eval.report.page import (
    Block,
    Cell,
    Column,
    FigureBlock,
    Section,
    Table,
    count,
    number,
    number_and_error,
)
from speedstack.eval.report.sections import Found, each
from speedstack.eval.results.quality import SensitivityResult

DOCUMENT = SensitivityResult
# Of single experts, a page names the worst.
NUM_EXPERTS_SHOWN = 16


def sections(found: Sequence[Found[SensitivityResult]]) -> list[Section]:
    """A section a result."""
    return each("Sensitivity", found, _section)


def _section(result: SensitivityResult, title: str) -> Section:
    layers = result.layers()
    worst = sorted(result.experts(), key=lambda unit: -unit.kl_nats)[:NUM_EXPERTS_SHOWN]
    columns = (
        Column("unit", is_number=False),
        Column("KL", "millinats a token"),
        Column("top-1 agreement"),
        Column("parameters"),
        Column("tokens sent to it"),
    )
    rows = tuple(
        (
            Cell(f"layer {unit.layer}" + ("" if unit.expert is None else f", expert {unit.expert}")),
            number_and_error(unit.kl_nats, unit.kl_stderr_nats, ".4f", 1e3),
            number(unit.top1_agreement, ".2f", 100, "%"),
            count(unit.num_parameters),
            count(unit.num_tokens),
        )
        for unit in (*layers, *worst)
    )
    shown = f"The layers, and the {len(worst)} worst of {len(result.experts())} experts." if worst else ""
    blocks: list[Block] = [Table(columns, rows, shown)]
    if layers:
        svg = plots.bars(
            "Sensitivity by layer",
            [f"layer {unit.layer}" for unit in layers],
            [1e3 * unit.kl_nats for unit in layers],
            "KL from full precision (millinats a token; less is better)",
            [1e3 * (unit.kl_stderr_nats or 0.0) for unit in layers],
        )
        blocks.append(FigureBlock(svg, "One layer's experts quantized, the others not (whiskers: standard error)."))
    text = (
        f"Distance from full precision when one unit alone is quantized ({result.rounding}), on "
        f"{result.num_tokens:,} tokens; all together it is {1e3 * result.all_kl_nats:.3f} millinats a token."
    )
    return Section(title, (text,), tuple(blocks))
