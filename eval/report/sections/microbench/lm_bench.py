"""lm-eval through the engine against lm-eval's own adapter: agreement and speed."""

import math
from collections.abc import Sequence

from speedstack.eval.microbench.lm import ADAPTER, LmBench, LmTask
from speedstack.eval.report import plots
from speedstack.eval.report.page import (
    Cell,
    Column,
    FigureBlock,
    Headline,
    Section,
    Table,
    count,
    number,
    plural,
    words,
)
from speedstack.eval.report.page import spread_cell as spread
from speedstack.eval.report.sections import Found, each

DOCUMENT = LmBench


def sections(found: Sequence[Found[LmBench]]) -> list[Section]:
    """A section a result."""
    return each("Against lm-eval\u2019s adapter", found, _section)


def _section(result: LmBench, title: str) -> Section:
    text = (
        f"The same requests, in one process, {result.dtype} on {result.device} with "
        f"{plural(result.num_threads, 'thread')}, {result.batch_size} sequences together, taking turns. The adapter "
        "runs the model under the fastest of transformers' experts implementations."
    )
    return Section(title, (text,), (_agreement(result), _speed(result), *_figures(result)), _headlines(result))


def _figures(result: LmBench) -> list[FigureBlock]:
    contestants = dict.fromkeys(t.contestant for task in result.tasks for t in task.timings if t.contestant != ADAPTER)
    speedups = {name: [_speedup(task, name) for task in result.tasks] for name in contestants}
    if not any(speedup is not None for row in speedups.values() for speedup in row):
        return []
    svg = plots.dots(
        "Speed against the adapter",
        [f"{task.task} ({task.kind})" for task in result.tasks],
        speedups,
        f"times as fast as {ADAPTER} (whiskers: quartiles)",
        reference=1.0,
    )
    return [FigureBlock(svg, "Median times over the engine's; the dashed line is the adapter.")]


def _agreement(result: LmBench) -> Table:
    rows = []
    for task in result.tasks:
        found = task.agreement
        for metric, (ours, theirs) in found.scores.items():
            warning = "" if math.isclose(ours, theirs, rel_tol=1e-5) else "differ"
            rows.append(
                (
                    Cell(task.task, note=task.kind),
                    Cell(f"{found.num_equal:,} of {task.num_requests:,}", found.num_equal / max(1, task.num_requests)),
                    number(found.max_difference_nats, ".1e"),
                    number(found.engine_error_nats, ".1e"),
                    number(found.adapter_error_nats, ".1e"),
                    Cell(metric),
                    number(ours, ".6g"),
                    Cell(f"{theirs:.6g}", theirs, warning=warning),
                )
            )
    columns = (
        Column("task", is_number=False),
        Column("equal answers"),
        Column("largest difference", "nats"),
        Column("engine from float64", "nats"),
        Column("adapter from float64", "nats"),
        Column("metric", is_number=False),
        Column("engine"),
        Column("adapter"),
    )
    return Table(columns, tuple(rows), "Answers of the engine against the adapter's.")


def _speed(result: LmBench) -> Table:
    columns = (
        *words(("task", "contestant")),
        Column("requests"),
        Column("time", "s"),
        Column("rate", "requests/s"),
        Column("speed", "over the adapter"),
    )
    rows = tuple(
        (
            Cell(task.task),
            Cell(
                timing.contestant, note=f"{task.experts_implementation} experts" if timing.contestant == ADAPTER else ""
            ),
            count(task.num_requests),
            spread(timing.seconds, 1, 2),
            number(timing.requests_per_second, ".1f"),
            number(timing.speedup, ".2f", suffix="\u00d7"),
        )
        for task in result.tasks
        for timing in task.timings
    )
    return Table(columns, rows, "Medians of the repeats, with quartiles in brackets.")


def _speedup(task: LmTask, contestant: str) -> tuple[float, float, float] | None:
    """Ratio of medians, and what it would be at the quartiles of the contestant's own times."""
    own = next((timing for timing in task.timings if timing.contestant == contestant), None)
    if own is None or own.seconds.q1 <= 0:
        return None
    adapter = own.speedup * own.seconds.median
    return own.speedup, adapter / own.seconds.q3, adapter / own.seconds.q1


def _headlines(result: LmBench) -> tuple[Headline, ...]:
    best = [
        (task, max((t for t in task.timings if t.contestant != ADAPTER), key=lambda t: t.speedup, default=None))
        for task in result.tasks
        if task.kind != "loglikelihood_rolling"
    ]
    return tuple(
        Headline(f"{timing.speedup:.2f}\u00d7", f"{task.kind}, {timing.contestant}, against {ADAPTER}", task.task)
        for task, timing in best
        if timing is not None
    )
