"""Sections of a run itself: stages, model, memory, training curves, generated texts."""

from speedstack.eval.report import plots
from speedstack.eval.report.page import Block, FigureBlock, Headline, Listing, Section
from speedstack.eval.report.tables import STAGES, STORAGE
from speedstack.eval.results.report import Curve, ModelSummary, Report
from speedstack.eval.results.table import Table, format_bytes, format_count

MAX_CURVE_POINTS = 400
RECIPE = (
    "A language model writes one token at a time, and for each it must read its weights from memory. Two things make "
    "that faster here: the weights of its experts are stored in 4 bits instead of 16, with training that lets the "
    "model adapt; and a small drafter proposes several tokens at once, which the model checks in one pass and keeps "
    "only where it would have written the same. How much the first changes the model is measured below; the second "
    "changes nothing."
)


def done(report: Report) -> list[Section]:
    """The model and the stages."""
    if report.model is None and not report.stages:
        return []
    models = () if report.model is None else (report.model, *report.other_models)
    tables = (Table.of(STAGES, report.stages),) if report.stages else ()
    return [Section("What was done", (RECIPE, *map(_model_text, models)), tables, _headlines(report))]


def memory(report: Report) -> list[Section]:
    """The experts' bytes, and everything an engine holds."""
    blocks: list[Block] = []
    if report.storage:
        blocks.append(Table.of(STORAGE, report.storage))
    if report.memory_bytes:
        svg = plots.memory_by_part(report.memory_bytes)
        blocks.append(FigureBlock(svg, "What the engine holds in memory, by part."))
    return [Section("Memory", (), tuple(blocks))] if blocks else []


def training(report: Report) -> list[Section]:
    """A figure per stage and quantity, shared by runs."""
    figures: dict[tuple[str, str], list[Curve]] = {}
    for curve in report.curves:
        if curve.steps:
            run, _, stage = curve.stage.rpartition("/")
            label = f"{run}: {curve.label}" if run else curve.label
            named = thin_curve(curve).model_copy(update={"stage": stage, "label": label})
            figures.setdefault((stage, curve.quantity), []).append(named)
    blocks = tuple(
        FigureBlock(plots.training_curves(curves), f"Stage {stage}.") for (stage, _), curves in figures.items()
    )
    return [Section("Training", (), blocks)] if blocks else []


def examples(report: Report) -> list[Section]:
    if not report.examples:
        return []
    listings = tuple(Listing(example.title, example.prompt, example.text) for example in report.examples)
    return [Section("What it writes", ("Prompts from held-out files; the model's own text is in colour.",), listings)]


def thin_curve(curve: Curve, max_points: int = MAX_CURVE_POINTS) -> Curve:
    """Every n-th point of a long curve, and the last."""
    stride = -(-len(curve.steps) // max_points)
    if stride <= 1:
        return curve
    keep = sorted({*range(0, len(curve.steps), stride), len(curve.steps) - 1})
    return curve.model_copy(
        update={"steps": tuple(curve.steps[i] for i in keep), "values": tuple(curve.values[i] for i in keep)}
    )


def _model_text(model: ModelSummary) -> str:
    active = (
        f" and {format_count(model.num_active_parameters)} at work on any one token"
        if model.num_active_parameters
        else ""
    )
    description = f" {model.description}." if model.description else ""
    return (
        f"The model: {model.name} ({model.architecture}), {format_count(model.num_parameters)} parameters, of which "
        f"{format_count(model.num_expert_parameters)} in routed experts{active}.{description}"
    )


def _headlines(report: Report) -> tuple[Headline, ...]:
    first = next((entry for entry in report.storage if entry.bf16_bytes), None)
    if first is None:
        return ()
    return (
        Headline(
            f"{100 * first.ratio:.1f}%",
            f"of the experts' bytes {first.place}",
            f"{format_bytes(first.packed_bytes)} packed to MXFP4, {format_bytes(first.bf16_bytes)} in bfloat16",
        ),
    )
