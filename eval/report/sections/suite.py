"""Results of lm-eval suites: a section a suite, a column a model, and how the requests were answered."""

import math
from collections.abc import Sequence
from pathlib import Path

from speedstack.eval.report import plots
from speedstack.eval.report.page import (
    MISSING,
    Block,
    Cell,
    Column,
    FigureBlock,
    Section,
    Table,
    count,
    format_number,
    format_seconds,
    number,
    plural,
    words,
)
from speedstack.eval.report.sections import Found
from speedstack.eval.results.labels import short_file_names, short_names
from speedstack.eval.results.schema import Z95
from speedstack.eval.results.suite import HeadlineMetric, SuiteResult

DOCUMENT = SuiteResult


def sections(found: Sequence[Found[SuiteResult]]) -> list[Section]:
    """A section a suite."""
    by_suite: dict[str, list[Found[SuiteResult]]] = {}
    for one in found:
        by_suite.setdefault(one.result.block.suite, []).append(one)
    return [_section(suite, group) for suite, group in by_suite.items()]


def _section(suite: str, found: Sequence[Found[SuiteResult]]) -> Section:
    # One model's scores may come from several files, of more tasks or of another limit.
    labels = _labels(found)
    commands = list(dict.fromkeys(one.command for one in found if one.command))
    tasks = list(dict.fromkeys(metric for one in found for metric in one.result.block.headline))
    columns = (*words(("task", "metric", "better")), Column("examples"), *(Column(label) for label in labels))
    scores = Table(
        columns,
        tuple(_score_row(metric, found) for metric in tasks),
        "\u00b1 is one standard error, as lm-eval computes it; below a score, the documents asked. Whether a "
        "difference is chance, speedstack compare says: it pairs the models' answers document by document.",
    )
    blocks: list[Block] = [scores, _runs(found, labels), _requests(found, labels)]
    if figure := _figure(suite, tasks, found, labels):
        blocks.insert(1, figure)
    paragraphs = [f"{plural(len(tasks), 'task')} through lm-eval, answered by the engine."]
    if any(one.result.block.limit is not None for one in found):
        paragraphs.append("Some tasks were cut to their first documents: no scores to compare with published ones.")
    names = ", ".join(one.name for one in found)
    return Section(f"Suite {suite}", tuple(paragraphs), tuple(blocks)).made_by("; ".join(commands) or None, names)


def _labels(found: Sequence[Found[SuiteResult]]) -> list[str]:
    """A short name a result: the end of its model's directory where models differ, else that of its file."""
    targets = [Path(one.result.block.target).parts for one in found]
    if len(set(targets)) == len(targets):
        return short_names(targets)
    return short_file_names([one.name for one in found])


def _score_row(headline: HeadlineMetric, found: Sequence[Found[SuiteResult]]) -> tuple[Cell, ...]:
    metric = headline.metric or ""
    better = next((better for one in found if (better := _better(one.result, headline.task, metric))), "\u2013")
    cells = []
    for one in found:
        value, stderr = one.result.value(headline.task, metric), one.result.stderr(headline.task, metric)
        if headline not in one.result.block.headline or value is None:
            cells.append(MISSING)
            continue
        note = plural(_num_documents(one.result, headline.task), "document")
        if not math.isfinite(value):
            cells.append(Cell(str(value), note=note))
            continue
        # A share is read in percent; other metrics (perplexities, bits) as they are.
        if stderr is not None and _is_share(one.result, headline.task, metric):
            cells.append(Cell(f"{100 * value:.2f} \u00b1 {100 * stderr:.2f}%", value, note))
        else:
            error = "" if stderr is None else f" \u00b1 {stderr:.2g}"
            cells.append(Cell(f"{format_number(value)}{error}", value, note))
    examples = count(headline.num_fewshot) if headline.num_fewshot is not None else Cell("task's own")
    return (Cell(_short(headline.task)), Cell(metric), Cell(better), examples, *cells)


def _figure(
    suite: str, tasks: Sequence[HeadlineMetric], found: Sequence[Found[SuiteResult]], labels: Sequence[str]
) -> FigureBlock | None:
    """The shares among the scores, with 95 % intervals; other metrics share no axis with them."""
    points: dict[str, list[tuple[float, float, float] | None]] = {label: [] for label in labels}
    names = []
    for headline in tasks:
        metric = headline.metric or ""
        row: list[tuple[float, float, float] | None] = []
        for one in found:
            value, stderr = one.result.value(headline.task, metric), one.result.stderr(headline.task, metric)
            if (
                value is None
                or stderr is None
                or math.isnan(stderr)
                or not _is_share(one.result, headline.task, metric)
            ):
                row.append(None)
            else:
                row.append((100 * value, 100 * (value - Z95 * stderr), 100 * (value + Z95 * stderr)))
        if any(row):
            names.append(_short(headline.task))
            for label, point in zip(labels, row, strict=True):
                points[label].append(point)
    if not names:
        return None
    svg = plots.dots(f"Suite {suite}", names, points, "score (%; whiskers: 95 % interval)")
    return FigureBlock(svg, "Each score alone; the documents are the same for all models.")


def _runs(found: Sequence[Found[SuiteResult]], labels: Sequence[str]) -> Table:
    rows = []
    for label, one in zip(labels, found, strict=True):
        block = one.result.block
        drafter = "none" if block.drafter is None else f"{block.drafter} ({(block.drafter_sha256 or '')[:12]})"
        rows.append(
            (
                Cell(label, note=f"weights {block.target_sha256[:12]}"),
                Cell(block.quantization or "none"),
                Cell(f"{block.dtype}, {block.backend} on {block.device}"),
                Cell(drafter),
                Cell("yes" if block.chat_template else "no"),
                count(block.batch_size),
                count(block.num_processes),
                Cell(format_seconds(block.seconds), block.seconds),
            )
        )
    columns = (
        *words(("model", "quantization", "computed in", "drafter", "chat template")),
        Column("batch"),
        Column("processes"),
        Column("time"),
    )
    return Table(columns, tuple(rows), "How the models were run.")


def _requests(found: Sequence[Found[SuiteResult]], labels: Sequence[str]) -> Table:
    rows = []
    for label, one in zip(labels, found, strict=True):
        for task, counts in one.result.block.requests.items():
            never = counts.num_unstopped == counts.num_generations > 0
            rows.append(
                (
                    Cell(_short(task)),
                    Cell(label),
                    count(counts.num_requests),
                    count(counts.num_cached),
                    count(counts.num_shortened),
                    Cell(
                        f"{counts.num_unstopped:,} of {counts.num_generations:,}"
                        if counts.num_generations
                        else "\u2013",
                        counts.num_unstopped if counts.num_generations else None,
                        warning="not one came to its end" if never else "",
                    ),
                    number(counts.acceptance_length, ".2f"),
                )
            )
    columns = (
        *words(("task", "model")),
        Column("requests"),
        Column("answered before"),
        Column("shortened"),
        Column("cut at the limit"),
        Column("\u03c4"),
    )
    caption = "Requests: known from an interrupted run, with a context that was too long, generations without an end."
    return Table(columns, tuple(rows), caption)


def _short(task: str) -> str:
    return task.removeprefix("speedstack_").replace("_", " ")


def _num_documents(result: SuiteResult, task: str) -> int:
    counts = result.lm_eval.get("n-samples", {}).get(task)
    if counts is not None:
        return int(counts["effective"])
    members = result.lm_eval.get("group_subtasks", {}).get(task, [])
    return sum(_num_documents(result, member) for member in members)


def _better(result: SuiteResult, task: str, metric: str) -> str | None:
    found = result.lm_eval.get("higher_is_better", {}).get(task, {}).get(metric.partition(",")[0])
    return {True: "higher", False: "lower"}.get(found)


def _is_share(result: SuiteResult, task: str, metric: str) -> bool:
    """Whether a score counts documents done right: bits and perplexities may lie in [0, 1] too, but less is better."""
    value = result.value(task, metric)
    return value is not None and 0 <= value <= 1 and _better(result, task, metric) == "higher"
