"""Results of a suite (lm-eval's document, unchanged, with our block under one more key), and comparisons of several."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field

from speedstack.eval.results.schema import Z95, Document, Environment, Record, read_json
from speedstack.eval.results.table import Column, Table, words
from speedstack.support.files import write_atomically
from speedstack.support.near_miss import nearest

BLOCK = "speedstack"


class HeadlineMetric(Record):
    """The metric a task is reported by, as lm-eval's 'metric,filter'."""

    task: str
    metric: str | None
    num_fewshot: int | None


class TaskDocuments(Record):
    """Scores of every document of a task, in its order; `doc_hashes` are lm-eval's.

    A score is a number, or several that only make a metric in sum (perplexity); None for others.
    """

    doc_hashes: tuple[str, ...]
    scores: dict[str, tuple[float | tuple[float, ...] | None, ...]]
    higher_is_better: dict[str, bool]


class TaskRequests(Record):
    """Counts of a task's requests, as in `speedstack.eval.lm_eval.adapter.TaskCounts`."""

    num_requests: int
    num_cached: int
    num_shortened: int
    num_generations: int
    num_unstopped: int
    num_without_answer: int = 0
    num_new_tokens: int
    num_rounds: int
    num_round_tokens: int

    @property
    def acceptance_length(self) -> float | None:
        """Tokens per round; None without rounds."""
        return self.num_round_tokens / self.num_rounds if self.num_rounds else None


class SuiteBlock(Document):
    """What lm-eval does not record: models, settings, and the scores of every document.

    `quantization` is the format in the target's config. `code_isolation` says how generated programs were contained,
    None if none ran. `own_tasks` came from `include_path`. `max_gen_toks` overrides each task's own.
    """

    kind: Literal["eval"] = "eval"
    suite: str
    headline: tuple[HeadlineMetric, ...]
    target: str
    target_sha256: str
    drafter: str | None
    drafter_sha256: str | None
    quantization: str | None
    dtype: str
    backend: str
    device: str
    max_length: int
    batch_size: int
    num_processes: int
    limit: int | float | None
    include_path: str | None = None
    include_path_sha256: str | None = None
    own_tasks: tuple[str, ...] = ()
    chat_template: bool
    chat_template_kwargs: dict[str, Any] = Field(default={})
    think_end_token: str | int | None = None
    max_gen_toks: int | None = None
    seeds: dict[str, int]
    code_isolation: str | None
    seconds: float
    requests: dict[str, TaskRequests]
    documents: dict[str, TaskDocuments]
    environment: Environment


@dataclass(frozen=True)
class SuiteResult:
    """`lm_eval` is lm-eval's document, as plain JSON types."""

    lm_eval: dict[str, Any]
    block: SuiteBlock

    def save(self, path: str | Path) -> Path:
        """Write as JSON, atomically; returns the path."""
        content = self.lm_eval | {BLOCK: self.block.model_dump(mode="json")}
        return write_atomically(path, json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read and validate. Raises ValueError as `Document.load`, and for documents without our block."""
        return cls.check(read_json(path), path)

    @classmethod
    def check(cls, content: Any, path: str | Path) -> Self:
        """`content`, read from `path`, as a result. Raises ValueError as `load`."""
        if not isinstance(content, dict) or BLOCK not in content:
            raise ValueError(f"{path} is no result of a suite: it has no part '{BLOCK}' (speedstack eval --suite)")
        lm_eval = {key: value for key, value in content.items() if key != BLOCK}
        block = SuiteBlock.check(content[BLOCK], path)
        if not isinstance(lm_eval.get("results"), dict):
            raise ValueError(f"{path} holds no scores: lm-eval's part 'results' is missing")
        return cls(lm_eval, block)

    def scores(self, task: str, metric: str | None) -> list[tuple[str, str, float]]:
        """(task, 'metric,filter', value) of a task or group: the metric, or all; members' scores for a group without
        its own.

        Empty if lm-eval reported no such metric, or no finite number.
        """
        reported = self.lm_eval["results"].get(task, {})
        names = [metric] if metric is not None else [name for name in reported if _is_score(name)]
        values = {name: self.value(task, name) for name in names}
        found = [(task, name, value) for name, value in values.items() if value is not None and math.isfinite(value)]
        if found or metric is not None:
            return found
        members = self.lm_eval.get("group_subtasks", {}).get(task, ())
        return [score for member in members for score in self.scores(member, None)]

    def check_headline(self) -> None:
        """Raises ValueError for a headline metric that is missing, with the nearest one, or not finite."""
        for entry in self.block.headline:
            if self.scores(entry.task, entry.metric):
                continue
            reported = self.lm_eval["results"].get(entry.task, {})
            if entry.metric in reported:
                raise ValueError(
                    f"{entry.task} {entry.metric} is {reported[entry.metric]}: lm-eval made no number of it"
                )
            known = [name for task, name, _ in self.scores(entry.task, None) if task == entry.task]
            raise ValueError(no_metric(entry.task, entry.metric or "any", known))

    def value(self, task: str, metric: str) -> float | None:
        """lm-eval's value of a metric such as 'acc,none', NaN included; None if missing."""
        value = self.lm_eval["results"].get(task, {}).get(metric)
        return float(value) if isinstance(value, int | float) else None

    def stderr(self, task: str, metric: str) -> float | None:
        """lm-eval's standard error of it; None if not finite."""
        name, _, filter_name = metric.partition(",")
        stderr = self.value(task, f"{name}_stderr,{filter_name}")
        return stderr if stderr is not None and math.isfinite(stderr) else None


def no_metric(task: str, metric: str, known: Sequence[str]) -> str:
    """The message for a missing metric; `known` are of the form 'metric,filter'."""
    if not known:
        return f"{task} has no metric '{metric}', and no score of its own: name tasks of it"
    of_that_name = [name for name in known if name.partition(",")[0] == metric.partition(",")[0]]
    near = (of_that_name or nearest(metric, known, cutoff=0.3) or known)[0]
    others = ", ".join(name for name in known if name != near)
    return f"{task} has no metric '{metric}'; did you mean '{near}'?{f' It also has {others}' if others else ''}"


def _is_score(name: str) -> bool:
    """Whether an entry of lm-eval's results is a metric: it has a filter and is no standard error."""
    metric, comma, _ = name.partition(",")
    return bool(comma) and not metric.endswith("_stderr")


TestName = Literal["McNemar", "paired bootstrap"]


class Difference(Record):
    """One result's score and `delta` to the first one; `stderr` is of `delta`, over documents.

    `p_value` is two-sided, or None if documents do not make up the score. `recovery` is the score over the first one's,
    inverted if less is better; None if the scores are not positive.
    """

    result: str
    value: float
    delta: float
    stderr: float | None
    p_value: float | None
    is_noise: bool | None
    recovery: float | None

    @property
    def recovery_interval(self) -> tuple[float, float, float] | None:
        """Recovery and the ends of its 95 % interval; None without one.

        To first order, a relative error of the score is one of its ratio too.
        """
        if self.recovery is None:
            return None
        error = Z95 * (self.stderr or 0.0) * self.recovery / abs(self.value) if self.value else 0.0
        return self.recovery, self.recovery - error, self.recovery + error


class ComparedMetric(Record):
    """One task: the first result's score, and the others'."""

    task: str
    metric: str
    num_documents: int
    higher_is_better: bool | None
    test: TestName | None
    baseline: float
    baseline_stderr: float | None
    others: tuple[Difference, ...]


class ComparedResult(NamedTuple):
    """One result in one metric."""

    entry: ComparedMetric
    other: Difference


class Comparison(Document):
    """Tasks common to all results; by result, the target's SHA-256 and the mean recovery over tasks that have one.

    `left_out` are tasks that some results lack, such as those that need a teacher. `environment` is the first result's,
    with the comparison's command.
    """

    kind: Literal["comparison"] = "comparison"
    suite: str
    baseline: str
    significance: float
    metrics: tuple[ComparedMetric, ...]
    left_out: tuple[str, ...] = ()
    mean_recovery: dict[str, float]
    target_sha256: dict[str, str]
    environment: Environment

    def rows(self) -> list[ComparedResult]:
        """One per task and result."""
        return [ComparedResult(entry, other) for entry in self.metrics for other in entry.others]

    def markdown(self) -> str:
        """The table, and what qualifies it."""
        lines = [
            f"Suite {self.suite}, differences from {self.baseline}; within noise: p > {self.significance:g}",
            Table.of(_COMPARISON_COLUMNS, self.rows()).markdown(),
            *(f"Mean recovery of {result}: {100 * mean:.2f} %" for result, mean in self.mean_recovery.items()),
        ]
        if self.left_out:
            lines.append(f"Left out, because not all results have them: {', '.join(self.left_out)}")
        return "\n\n".join(lines)

    def save_markdown(self, path: Path) -> Path:
        """Write the table atomically; returns the path."""
        return write_atomically(path, self.markdown() + "\n")


def format_p_value(p_value: float) -> str:
    return f"{p_value:.3f}" if p_value >= 0.001 else f"{p_value:.0e}"


def _metric(row: ComparedResult) -> str:
    return row.entry.metric + ("" if row.entry.higher_is_better is not False else " (less is better)")


def _verdict(row: ComparedResult) -> str:
    return str({None: "no paired test", True: "within noise", False: row.entry.test}[row.other.is_noise])


_COMPARISON_COLUMNS = (
    words("task", "entry.task"),
    words("metric", _metric),
    Column("documents", "", "entry.num_documents"),
    Column("baseline", "", "entry.baseline", ".5g", error="entry.baseline_stderr", error_form=".2g"),
    words("result", "other.result"),
    Column("score", "", "other.value", ".5g"),
    Column("difference", "", "other.delta", "+.3g", error="other.stderr", error_form=".2g"),
    Column("p", "", "other.p_value", format_p_value),
    words("", _verdict),
    Column("recovery", "", "other.recovery", ".2f", 100, " %"),
)
