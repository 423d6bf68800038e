"""Perplexity, divergence from a teacher and task scores of several models on the same held-out text."""

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
    count,
    format_number,
    number,
    number_and_error,
    words,
)
from speedstack.eval.report.sections import Found, each
from speedstack.eval.results.quality import MethodQuality, QualityResult, TaskScore

DOCUMENT = QualityResult
# The metric of each task that a plot shows; both are shares of documents answered right.
PLOTTED_METRICS = {"next_line": "acc", "close_line": "exact_match"}


def sections(found: Sequence[Found[QualityResult]]) -> list[Section]:
    """A section a result."""
    return each("Quality", found, _section)


def _section(quality: QualityResult, title: str) -> Section:
    blocks: list[Block] = [_divergence_table(quality)]
    paragraphs = [
        f"All models run in the same engine on the same held-out text. \u201c{quality.teacher}\u201d is the teacher: "
        "the others are measured by how far their predictions are from its own."
    ]
    if rows := _task_rows(quality):
        columns = (*words(("task (lm-eval)", "metric", "better")), Column("documents"))
        blocks.append(
            Table(
                (*columns, *(Column(entry.method) for entry in quality.methods)),
                rows,
                "Scores of tasks; \u00b1 is one standard error. All models answer the same documents, so differences "
                "between them are surer than each score alone.",
            )
        )
    if any(entry.kl_to_teacher_nats is not None for entry in quality.methods):
        caption = "Distance of each quantized model from the full-precision one (whiskers: standard error)."
        blocks.append(FigureBlock(plots.divergence_by_method(quality), caption))
    if metrics := _plotted(quality):
        caption = "Tasks with a right answer: pick the next line of four, and close the first line of a block."
        blocks.append(FigureBlock(plots.task_scores_by_method(quality, metrics), caption))
    return Section(title, tuple(paragraphs), tuple(blocks), _headlines(quality))


def _divergence_table(quality: QualityResult) -> Table:
    return Table(
        (
            Column("model", is_number=False),
            Column("perplexity", "a token"),
            Column("KL to teacher", "millinats a token"),
            Column("top-1 agreement"),
            Column("tokens measured"),
        ),
        tuple(
            (
                Cell(entry.method),
                number(entry.perplexity, ".3f"),
                number_and_error(entry.kl_to_teacher_nats, entry.kl_stderr_nats, ".3f", 1e3),
                number(entry.top1_agreement, ".2f", 100, "%"),
                count(entry.num_tokens),
            )
            for entry in quality.methods
        ),
    )


def _plotted(quality: QualityResult) -> dict[str, str]:
    """Those of the plotted tasks that any model has a score of."""
    known = {(score.task, score.metric) for entry in quality.methods for score in entry.tasks}
    return {task: metric for task, metric in PLOTTED_METRICS.items() if (task, metric) in known}


def _headlines(quality: QualityResult) -> tuple[Headline, ...]:
    # In the order of the methods: the baseline first, what came of it last.
    measured = [entry for entry in quality.methods if entry.kl_to_teacher_nats]
    if len(measured) < 2:
        return ()
    first, last = measured[0], measured[-1]
    assert first.kl_to_teacher_nats is not None and last.kl_to_teacher_nats is not None
    return (
        Headline(
            f"{last.kl_to_teacher_nats / first.kl_to_teacher_nats:.2f}\u00d7",
            f"divergence of {last.method} from the teacher, against {first.method}",
            f"KL {_millinats(last)} and {_millinats(first)} millinats a token",
        ),
    )


def _millinats(entry: MethodQuality) -> str:
    """A divergence in the unit in which these have a digit before the point."""
    assert entry.kl_to_teacher_nats is not None
    return format_number(1e3 * entry.kl_to_teacher_nats, significant=3)


def _score_cell(score: TaskScore | None) -> Cell:
    """A share as a percentage with its standard error, anything else as a number."""
    if score is None:
        return MISSING
    if score.stderr is None:
        return Cell(format_number(score.value), score.value)
    return Cell(f"{100 * score.value:.1f} \u00b1 {100 * score.stderr:.1f}%", score.value)


def _task_rows(quality: QualityResult) -> tuple[tuple[Cell, ...], ...]:
    """One row a (task, metric): its scores in the order of the methods, a dash where a method has none."""
    scores = {(score.task, score.metric, entry.method): score for entry in quality.methods for score in entry.tasks}
    rows = []
    for task, metric in dict.fromkeys((task, metric) for task, metric, _ in scores):
        values = [scores.get((task, metric, entry.method)) for entry in quality.methods]
        known = next(score for score in values if score is not None)
        better = {True: "higher", False: "lower", None: "\u2013"}[known.higher_is_better]
        rows.append(
            (
                Cell(task.replace("_", " ")),
                Cell(metric.replace("_", " ")),
                Cell(better),
                count(known.num_documents),
                *map(_score_cell, values),
            )
        )
    return tuple(rows)
