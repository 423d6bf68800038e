"""Results of one suite side by side: differences, their significance, and recovery."""

from collections.abc import Sequence

from speedstack.eval.lm_eval.compare import ComparedMetric, Comparison, Difference
from speedstack.eval.report import plots
from speedstack.eval.report.page import Block, Cell, Column, FigureBlock, Headline, Section, Table, count, number, words
from speedstack.eval.report.sections import Found, each
from speedstack.eval.results.schema import Z95

DOCUMENT = Comparison


def sections(found: Sequence[Found[Comparison]]) -> list[Section]:
    """A section a comparison."""
    return each("Comparison", found, _section)


def _section(comparison: Comparison, title: str) -> Section:
    columns = (
        *words(("task", "metric", "result")),
        Column("documents"),
        Column(comparison.baseline),
        Column("score"),
        Column("difference"),
        Column("p"),
        Column("verdict", is_number=False),
        Column("recovery"),
    )
    rows = tuple(_row(entry, other) for entry in comparison.metrics for other in entry.others)
    blocks: list[Block] = [Table(columns, rows, "\u00b1 is one standard error, of the difference over documents.")]
    if figure := _figure(comparison):
        blocks.append(figure)
    text = (
        f"Suite {comparison.suite}: every result against {comparison.baseline}, on the same documents. A difference "
        f"is called within noise when its p-value is above {comparison.significance:g}; several tasks are looked at, "
        f"and at that level {100 * comparison.significance:.2g} in a hundred differ by chance."
    )
    if comparison.left_out:
        text += f" Not all results have {', '.join(comparison.left_out)}: left out."
    headlines = tuple(
        Headline(f"{100 * mean:.1f}%", f"mean recovery of {result}", f"suite {comparison.suite}, of its scores")
        for result, mean in comparison.mean_recovery.items()
    )
    return Section(title, (text,), tuple(blocks), headlines)


def _row(entry: ComparedMetric, other: Difference) -> tuple[Cell, ...]:
    stderr = "" if other.stderr is None else f" \u00b1 {other.stderr:.2g}"
    verdict = {None: "no paired test", True: "within noise", False: "different"}[other.is_noise]
    baseline_stderr = "" if entry.baseline_stderr is None else f" \u00b1 {entry.baseline_stderr:.2g}"
    better = {True: "more is better", False: "less is better", None: ""}[entry.higher_is_better]
    return (
        Cell(_task(entry)),
        Cell(entry.metric, note=better),
        Cell(other.result),
        count(entry.num_documents),
        Cell(f"{entry.baseline:.4g}{baseline_stderr}", entry.baseline),
        number(other.value, ".4g"),
        Cell(f"{other.delta:+.3g}{stderr}", other.delta),
        Cell("\u2013" if other.p_value is None else _p_value(other.p_value), other.p_value),
        Cell(verdict, note=entry.test or ""),
        number(other.recovery, ".2f", 100, "%"),
    )


def _figure(comparison: Comparison) -> FigureBlock | None:
    entries = [entry for entry in comparison.metrics if any(other.recovery is not None for other in entry.others)]
    if not entries:
        return None
    results = list(dict.fromkeys(other.result for entry in entries for other in entry.others))
    series = {
        result: [next((_interval(o) for o in entry.others if o.result == result), None) for entry in entries]
        for result in results
    }
    svg = plots.dots(
        f"Recovery, suite {comparison.suite}",
        [_task(entry) for entry in entries],
        series,
        f"recovery (% of {comparison.baseline}; whiskers: 95 % interval)",
        reference=100.0,
    )
    return FigureBlock(
        svg, f"What is left of the scores of {comparison.baseline} (the dashed line), paired over documents."
    )


def _interval(other: Difference) -> tuple[float, float, float] | None:
    """Recovery in percent. To first order, a relative error of the score is one of its ratio too."""
    if other.recovery is None:
        return None
    error = Z95 * (other.stderr or 0.0) * other.recovery / abs(other.value) if other.value else 0.0
    return 100 * other.recovery, 100 * (other.recovery - error), 100 * (other.recovery + error)


def _task(entry: ComparedMetric) -> str:
    return entry.task.removeprefix("speedstack_").replace("_", " ")


def _p_value(p_value: float) -> str:
    return f"{p_value:.3f}" if p_value >= 0.001 else f"{p_value:.0e}"
