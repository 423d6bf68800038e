"""Sections of quality: divergence and task scores of models, and sensitivity of layers and experts."""

from collections.abc import Callable
from typing import NamedTuple

from speedstack.eval.report import plots
from speedstack.eval.report.page import Block, FigureBlock, Headline, Section
from speedstack.eval.report.tables import DIVERGENCE, SENSITIVITY
from speedstack.eval.results.quality import MethodQuality, QualityResult, SensitivityResult, TaskScore
from speedstack.eval.results.table import Cell, Column, Table, count, format_number, words

# The metric of each task that a plot shows; both are shares of documents answered right.
PLOTTED_METRICS = {"next_line": "acc", "close_line": "exact_match"}
# Of single experts, a page names the worst.
NUM_EXPERTS_SHOWN = 16


def quality(result: QualityResult, title: str) -> Section:
    """Models on the same held-out text."""
    blocks: list[Block] = [Table.of(DIVERGENCE, result.methods)]
    text = (
        f"All models run in the same engine on the same held-out text. \u201c{result.teacher}\u201d is the teacher: "
        "the others are measured by how far their predictions are from its own."
    )
    if tasks := _tasks(result):
        caption = (
            "Scores of tasks; \u00b1 is one standard error. All models answer the same documents, so differences "
            "between them are surer than each score alone."
        )
        blocks.append(Table.of(_task_columns(result), tasks, caption))
    if any(entry.kl_to_teacher_nats is not None for entry in result.methods):
        caption = "Distance of each quantized model from the full-precision one (whiskers: standard error)."
        blocks.append(FigureBlock(plots.divergence_by_method(result), caption))
    known = {(task.first.task, task.first.metric) for task in tasks}
    if metrics := {task: metric for task, metric in PLOTTED_METRICS.items() if (task, metric) in known}:
        caption = "Tasks with a right answer: pick the next line of four, and close the first line of a block."
        blocks.append(FigureBlock(plots.task_scores_by_method(result, metrics), caption))
    return Section(title, (text,), tuple(blocks), _headlines(result))


class _Task(NamedTuple):
    """Scores of a task's metric by method, and any one of them."""

    first: TaskScore
    scores: dict[str, TaskScore]


def _tasks(result: QualityResult) -> list[_Task]:
    found: dict[tuple[str, str], dict[str, TaskScore]] = {}
    for entry in result.methods:
        for score in entry.tasks:
            found.setdefault((score.task, score.metric), {})[entry.method] = score
    return [_Task(next(iter(scores.values())), scores) for scores in found.values()]


def _task_columns(result: QualityResult) -> tuple[Column, ...]:
    better = {True: "higher", False: "lower", None: "\u2013"}
    return (
        words("task (lm-eval)", lambda task: task.first.task.replace("_", " ")),
        words("metric", lambda task: task.first.metric.replace("_", " ")),
        words("better", lambda task: better[task.first.higher_is_better]),
        count("documents", "first.num_documents"),
        *(Column(entry.method, "", _score_of(entry.method)) for entry in result.methods),
    )


def _score_of(method: str) -> Callable[[_Task], Cell | None]:
    """Shows the score of a method: a share in percent with its standard error, anything else as a number."""

    def cell(task: _Task) -> Cell | None:
        score = task.scores.get(method)
        if score is None:
            return None
        if score.stderr is None:
            return Cell(format_number(score.value), score.value)
        return Cell(f"{100 * score.value:.1f} \u00b1 {100 * score.stderr:.1f}%", score.value)

    return cell


def _headlines(result: QualityResult) -> tuple[Headline, ...]:
    # In the order of the methods: the baseline first, what came of it last.
    measured = [entry for entry in result.methods if entry.kl_to_teacher_nats]
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
    assert entry.kl_to_teacher_nats is not None
    return format_number(1e3 * entry.kl_to_teacher_nats, significant=3)


def sensitivity(result: SensitivityResult, title: str) -> Section:
    """Layers and experts, each quantized alone."""
    layers = result.layers()
    worst = sorted(result.experts(), key=lambda unit: -unit.kl_nats)[:NUM_EXPERTS_SHOWN]
    caption = f"The layers, and the {len(worst)} worst of {len(result.experts())} experts." if worst else ""
    blocks: list[Block] = [Table.of(SENSITIVITY, (*layers, *worst), caption)]
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
