"""A finished run as one page: `report.json` for machines, `report.html` for a reader who never saw the project.

The page is a single file without scripts or outside resources: it can be mailed, printed, and opened in ten years.
Every figure on it comes from the `Report` document, so that the two files cannot disagree. Parts that a run has not
made yet are left out, not shown empty.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

from speedstack.eval import plots
from speedstack.eval.peers import ENGINE, ENGINE_DRAFTER, TRANSFORMERS
from speedstack.eval.results import Curve, MethodQuality, Report, Spread, TaskScore

TEMPLATES_DIR = Path(__file__).resolve().parent / "templates"
MAX_CURVE_POINTS = 400
# The metric of each task that a plot shows; both are shares of documents answered right.
PLOTTED_METRICS = {"next_line": "acc", "close_line": "exact_match"}


@dataclass(frozen=True)
class Headline:
    """One figure for the top of the page and for a terminal: value, what it is, what it stands against."""

    value: str
    label: str
    detail: str


@dataclass(frozen=True)
class FigureBlock:
    """An SVG with the caption that says how to read it."""

    svg: str
    caption: str


def write_report(report: Report, directory: str | Path) -> tuple[Path, Path]:
    """Write report.json and report.html into `directory`; returns both paths."""
    directory = Path(directory)
    json_path = report.save(directory / "report.json")
    html_path = directory / "report.html"
    temporary = directory / ".report.html.tmp"
    temporary.write_text(render_html(report), encoding="utf-8")
    temporary.replace(html_path)
    return json_path, html_path


def render_html(report: Report) -> str:
    """The page. A function of the report alone: the same report gives the same bytes."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES_DIR),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(spread=format_spread, si=format_count, bytes=format_bytes, seconds=format_seconds)
    return environment.get_template("report.html").render(
        report=report,
        headlines=headlines(report),
        figures=_figures(report),
        tasks=_task_rows(report),
    )


def utc_now() -> str:
    """The time for `Report.created_utc`, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def headlines(report: Report) -> list[Headline]:
    """The figures a run is about, as far as it has them."""
    found: list[Headline] = []
    if report.storage:
        first = report.storage[0]
        found.append(
            Headline(
                f"{100 * first.ratio:.1f}%",
                f"of the experts' bytes {first.place}",
                f"{format_bytes(first.packed_bytes)} packed to MXFP4, {format_bytes(first.bf16_bytes)} in bfloat16",
            )
        )
    if report.quality is not None:
        # In the order of the methods: the baseline first, what came of it last.
        measured = [entry for entry in report.quality.methods if entry.kl_to_teacher_nats]
        if len(measured) > 1 and measured[0].kl_to_teacher_nats and measured[-1].kl_to_teacher_nats:
            first_method, last_method = measured[0], measured[-1]
            found.append(
                Headline(
                    f"{measured[-1].kl_to_teacher_nats / measured[0].kl_to_teacher_nats:.2f}\u00d7",
                    f"divergence of {last_method.method} from the teacher, against {first_method.method}",
                    f"KL {_millinats(last_method)} and {_millinats(first_method)} millinats a token",
                )
            )
    if report.acceptance is not None:
        found.append(
            Headline(
                f"{report.acceptance.overall.acceptance_length:.2f}",
                f"tokens a pass of the target (\u03c4), of {report.acceptance.block_size}",
                f"{report.acceptance.overall.num_prompts} held-out prompts, "
                f"{report.acceptance.max_new_tokens} new tokens each, "
                + (
                    "greedy" if report.acceptance.temperature == 0 else f"temperature {report.acceptance.temperature:g}"
                ),
            )
        )
    if report.timing is not None:
        pairs = (
            (ENGINE_DRAFTER, ENGINE, "decoding with the drafter against without"),
            (ENGINE, TRANSFORMERS, "decoding against transformers, both without a drafter"),
        )
        for fast, slow, label in pairs:
            ratio_or_none = report.timing.speedup(fast, slow)
            entries = report.timing.contestant(fast), report.timing.contestant(slow)
            if ratio_or_none is not None and entries[0] is not None and entries[1] is not None:
                rates = [entry.decode_tokens_per_second.median for entry in entries if entry is not None]
                found.append(
                    Headline(
                        f"{ratio_or_none:.2f}\u00d7", label, f"{rates[0]:.0f} and {rates[1]:.0f} tokens/s (medians)"
                    )
                )
    return found


def format_spread(spread: Spread, scale: float = 1.0, digits: int = 0) -> str:
    """Median and quartiles: "412 (405-418)"."""
    median, q1, q3 = (f"{scale * value:.{digits}f}" for value in (spread.median, spread.q1, spread.q3))
    return f"{median} ({q1}\u2013{q3})"


def format_count(value: float) -> str:
    """A count with a suffix: 12.1 M."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f} {suffix}"
    return f"{value:.0f}"


def format_bytes(value: float) -> str:
    """Bytes in binary units: 4.0 MiB."""
    for size, suffix in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= size:
            return f"{value / size:.1f} {suffix}"
    return f"{value:.0f} B"


def format_seconds(value: float) -> str:
    """A duration: 0.8 s, 21 s, 6 min 42 s."""
    if value < 10:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def format_number(value: float, significant: int = 4) -> str:
    """A score with `significant` digits and without an exponent where it can do without."""
    return f"{value:.{significant}g}" if abs(value) < 10**significant else f"{value:,.0f}"


def thin_curve(curve: Curve, max_points: int = MAX_CURVE_POINTS) -> Curve:
    """Every n-th point of a long curve, the last one always: a page needs no thousand points a line."""
    stride = -(-len(curve.steps) // max_points)
    if stride <= 1:
        return curve
    keep = sorted({*range(0, len(curve.steps), stride), len(curve.steps) - 1})
    return curve.model_copy(
        update={"steps": tuple(curve.steps[i] for i in keep), "values": tuple(curve.values[i] for i in keep)}
    )


def _millinats(entry: MethodQuality) -> str:
    """A divergence in the unit in which these have a digit before the point."""
    assert entry.kl_to_teacher_nats is not None
    return format_number(1e3 * entry.kl_to_teacher_nats, significant=3)


def _figures(report: Report) -> dict[str, list[FigureBlock]]:
    """The figures of each section, in reading order."""
    figures: dict[str, list[FigureBlock]] = {key: [] for key in ("quality", "acceptance", "timing", "memory", "curves")}
    if report.quality is not None:
        if any(entry.kl_to_teacher_nats is not None for entry in report.quality.methods):
            caption = "Distance of each quantized model from the full-precision one (whiskers: standard error)."
            figures["quality"].append(FigureBlock(plots.divergence_by_method(report.quality), caption))
        if any(entry.tasks for entry in report.quality.methods):
            caption = "Two tasks with a right answer: pick the next line of four, and close the first line of a block."
            figures["quality"].append(
                FigureBlock(plots.task_scores_by_method(report.quality, PLOTTED_METRICS), caption)
            )
    if report.acceptance is not None:
        caption = "How far into a block the target agrees. The sum of a curve's points, plus 1, is about its \u03c4."
        figures["acceptance"].append(FigureBlock(plots.acceptance_by_position(report.acceptance), caption))
    if report.timing is not None and report.timing.contestants:
        caption = "Tokens a second while decoding one sequence; higher is better."
        figures["timing"].append(FigureBlock(plots.tokens_per_second(report.timing), caption))
    if report.memory_bytes:
        caption = "What the engine holds in memory, by part."
        figures["memory"].append(FigureBlock(plots.memory_by_part(report.memory_bytes), caption))
    thinned = [thin_curve(curve) for curve in report.curves]
    for stage, quantity in dict.fromkeys((curve.stage, curve.quantity) for curve in thinned):
        chosen = [curve for curve in thinned if (curve.stage, curve.quantity) == (stage, quantity)]
        figures["curves"].append(FigureBlock(plots.training_curves(chosen), f"Stage {stage}."))
    return figures


def _format_score(score: TaskScore) -> str:
    """A share as a percentage with its standard error, anything else as a number."""
    if score.stderr is None:
        return format_number(score.value)
    return f"{100 * score.value:.1f} \u00b1 {100 * score.stderr:.1f}%"


def _task_rows(report: Report) -> list[dict[str, Any]]:
    """One row a (task, metric): its scores in the order of the methods, None where a method has none."""
    if report.quality is None:
        return []
    scores = {
        (score.task, score.metric, entry.method): score for entry in report.quality.methods for score in entry.tasks
    }
    keys = dict.fromkeys((task, metric) for task, metric, _ in scores)
    rows = []
    for task, metric in keys:
        values = [scores.get((task, metric, entry.method)) for entry in report.quality.methods]
        known = next(score for score in values if score is not None)
        rows.append(
            {
                "task": task.replace("_", " "),
                "metric": metric.replace("_", " "),
                "better": {True: "higher", False: "lower", None: "-"}[known.higher_is_better],
                "num_documents": known.num_documents,
                "scores": [None if score is None else _format_score(score) for score in values],
            }
        )
    return rows
