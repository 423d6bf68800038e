"""Sections of lm-eval suites: scores with a column per model, and comparisons."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from speedstack.eval.report import plots
from speedstack.eval.report.page import Block, FigureBlock, Headline, Section
from speedstack.eval.report.plots import Point
from speedstack.eval.report.sections.found import Found
from speedstack.eval.results.labels import short_file_names, short_names
from speedstack.eval.results.schema import Z95
from speedstack.eval.results.suite import (
    Comparison,
    HeadlineMetric,
    SuiteBlock,
    SuiteResult,
    TaskRequests,
    format_p_value,
)
from speedstack.eval.results.table import (
    Cell,
    Column,
    Table,
    count,
    format_number,
    format_seconds,
    percent,
    plural,
    words,
)


def suites(found: Sequence[Found[SuiteResult]]) -> list[Section]:
    """A section per suite."""
    by_suite: dict[str, list[Found[SuiteResult]]] = {}
    for one in found:
        by_suite.setdefault(one.result.block.suite, []).append(one)
    return [_suite(suite, group) for suite, group in by_suite.items()]


def _suite(suite: str, found: Sequence[Found[SuiteResult]]) -> Section:
    # One model's scores may come from several files, of more tasks or of another limit.
    results = dict(zip(_labels(found), (one.result for one in found), strict=True))
    tasks = list(dict.fromkeys(metric for one in found for metric in one.result.block.headline))
    scores = Table.of(
        _score_columns(results),
        tasks,
        "\u00b1 is one standard error, as lm-eval computes it; below a score, the documents asked. Whether a "
        "difference is chance, speedstack compare says: it pairs the models' answers document by document.",
    )
    runs = [_Run(label, result.block) for label, result in results.items()]
    requests = [_Requests(run.label, task, counts) for run in runs for task, counts in run.block.requests.items()]
    blocks: list[Block] = [
        scores,
        *_score_figures(suite, tasks, results),
        Table.of(RUNS, runs, "How the models were run."),
        Table.of(
            REQUESTS,
            requests,
            "Requests: known from an interrupted run, with a context that was too long, generations without an end.",
        ),
    ]
    paragraphs = [f"{plural(len(tasks), 'task')} through lm-eval, answered by the engine."]
    if any(run.block.limit is not None for run in runs):
        paragraphs.append("Some tasks were cut to their first documents: no scores to compare with published ones.")
    commands = dict.fromkeys(one.command for one in found if one.command)
    names = ", ".join(one.name for one in found)
    return Section(f"Suite {suite}", tuple(paragraphs), tuple(blocks)).made_by("; ".join(commands) or None, names)


def _labels(found: Sequence[Found[SuiteResult]]) -> list[str]:
    """A short name per result: of its model's directory if models differ, else of its file."""
    targets = [Path(one.result.block.target).parts for one in found]
    if len(set(targets)) == len(targets):
        return short_names(targets)
    return short_file_names([one.name for one in found])


def _name(task: str) -> str:
    return task.removeprefix("speedstack_").replace("_", " ")


def _score_columns(results: dict[str, SuiteResult]) -> tuple[Column, ...]:
    def better(headline: HeadlineMetric) -> str | None:
        known = (_better(result, headline.task, headline.metric or "") for result in results.values())
        return next((found for found in known if found), None)

    return (
        words("task", lambda headline: _name(headline.task)),
        words("metric", lambda headline: headline.metric or ""),
        words("better", better),
        Column("examples", "", _examples),
        *(Column(label, "", partial(_score, result)) for label, result in results.items()),
    )


def _examples(headline: HeadlineMetric) -> Cell:
    number = headline.num_fewshot
    return Cell("task's own") if number is None else Cell(f"{number:,}", number)


def _score(result: SuiteResult, headline: HeadlineMetric) -> Cell | None:
    metric = headline.metric or ""
    value, stderr = result.value(headline.task, metric), result.stderr(headline.task, metric)
    if headline not in result.block.headline or value is None:
        return None
    note = plural(_num_documents(result, headline.task), "document")
    if not math.isfinite(value):
        return Cell(str(value), note=note)
    # A share is read in percent; other metrics (perplexities, bits) as they are.
    if stderr is not None and _is_share(result, headline.task, metric):
        return Cell(f"{100 * value:.2f} \u00b1 {100 * stderr:.2f}%", value, note)
    error = "" if stderr is None else f" \u00b1 {stderr:.2g}"
    return Cell(f"{format_number(value)}{error}", value, note)


def _score_figures(suite: str, tasks: Sequence[HeadlineMetric], results: dict[str, SuiteResult]) -> list[FigureBlock]:
    """Scores that are shares, with 95 % intervals."""
    points = {task: [_interval(result, task) for result in results.values()] for task in tasks}
    shown = {task: row for task, row in points.items() if any(row)}
    if not shown:
        return []
    series = dict(zip(results, zip(*shown.values(), strict=True), strict=True))
    names = [_name(headline.task) for headline in shown]
    svg = plots.dots(f"Suite {suite}", names, series, "score (%; whiskers: 95 % interval)")
    return [FigureBlock(svg, "Each score alone; the documents are the same for all models.")]


def _interval(result: SuiteResult, headline: HeadlineMetric) -> Point | None:
    metric = headline.metric or ""
    value, stderr = result.value(headline.task, metric), result.stderr(headline.task, metric)
    if value is None or stderr is None or not _is_share(result, headline.task, metric):
        return None
    return 100 * value, 100 * (value - Z95 * stderr), 100 * (value + Z95 * stderr)


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
    """Whether a score counts correct documents; perplexities and bits may lie in [0, 1] too, but less is better."""
    value = result.value(task, metric)
    return value is not None and 0 <= value <= 1 and _better(result, task, metric) == "higher"


class _Run(NamedTuple):
    """How a model was run."""

    label: str
    block: SuiteBlock


class _Requests(NamedTuple):
    """Counts of a task's requests."""

    label: str
    task: str
    counts: TaskRequests


def _drafter(run: _Run) -> str:
    block = run.block
    return "none" if block.drafter is None else f"{block.drafter} ({(block.drafter_sha256 or '')[:12]})"


def _cut_at_the_limit(requests: _Requests) -> Cell | None:
    counts = requests.counts
    if not counts.num_generations:
        return None
    warning = "not one came to its end" if counts.num_unstopped == counts.num_generations else ""
    return Cell(f"{counts.num_unstopped:,} of {counts.num_generations:,}", counts.num_unstopped, warning=warning)


RUNS = (
    words("model", "label", note=lambda run: f"weights {run.block.target_sha256[:12]}"),
    words("quantization", lambda run: run.block.quantization or "none"),
    words("computed in", lambda run: f"{run.block.dtype}, {run.block.backend} on {run.block.device}"),
    words("drafter", _drafter),
    words("chat template", lambda run: "yes" if run.block.chat_template else "no"),
    count("batch", "block.batch_size"),
    count("processes", "block.num_processes"),
    Column("time", "", "block.seconds", format_seconds),
)
REQUESTS = (
    words("task", lambda requests: _name(requests.task)),
    words("model", "label"),
    count("requests", "counts.num_requests"),
    count("answered before", "counts.num_cached"),
    count("shortened", "counts.num_shortened"),
    Column("cut at the limit", "", _cut_at_the_limit),
    Column("\u03c4", "", "counts.acceptance_length", ".2f"),
)


def comparison(result: Comparison, title: str) -> Section:
    """Results of one suite side by side."""
    caption = "\u00b1 is one standard error, of the difference over documents."
    table = Table.of(_comparison_columns(result.baseline), result.rows(), caption)
    text = (
        f"Suite {result.suite}: every result against {result.baseline}, on the same documents. A difference "
        f"is called within noise when its p-value is above {result.significance:g}; several tasks are looked at, "
        f"and at that level {100 * result.significance:.2g} in a hundred differ by chance."
    )
    if result.left_out:
        text += f" Not all results have {', '.join(result.left_out)}: left out."
    headlines = tuple(
        Headline(f"{100 * mean:.1f}%", f"mean recovery of {name}", f"suite {result.suite}, of its scores")
        for name, mean in result.mean_recovery.items()
    )
    return Section(title, (text,), (table, *_recovery_figures(result)), headlines)


def _comparison_columns(baseline: str) -> tuple[Column, ...]:
    better = {True: "more is better", False: "less is better", None: ""}
    verdict = {None: "no paired test", True: "within noise", False: "different"}
    return (
        words("task", lambda row: _name(row.entry.task)),
        words("metric", "entry.metric", note=lambda row: better[row.entry.higher_is_better]),
        words("result", "other.result"),
        count("documents", "entry.num_documents"),
        Column(baseline, "", "entry.baseline", ".4g", error="entry.baseline_stderr", error_form=".2g"),
        Column("score", "", "other.value", ".4g"),
        Column("difference", "", "other.delta", "+.3g", error="other.stderr", error_form=".2g"),
        Column("p", "", "other.p_value", format_p_value),
        words("verdict", lambda row: verdict[row.other.is_noise], note="entry.test"),
        percent("recovery", "other.recovery"),
    )


def _recovery_figures(result: Comparison) -> list[FigureBlock]:
    entries = [entry for entry in result.metrics if any(other.recovery is not None for other in entry.others)]
    if not entries:
        return []
    names = dict.fromkeys(other.result for entry in entries for other in entry.others)
    points = [{other.result: _percent(other.recovery_interval) for other in entry.others} for entry in entries]
    svg = plots.dots(
        f"Recovery, suite {result.suite}",
        [_name(entry.task) for entry in entries],
        {name: [of_task.get(name) for of_task in points] for name in names},
        f"recovery (% of {result.baseline}; whiskers: 95 % interval)",
        reference=100.0,
    )
    caption = f"What is left of the scores of {result.baseline} (the dashed line), paired over documents."
    return [FigureBlock(svg, caption)]


def _percent(point: Point | None) -> Point | None:
    return None if point is None else (100 * point[0], 100 * point[1], 100 * point[2])
