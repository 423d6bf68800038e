"""The result file of a suite: lm-eval's own document, unchanged, with one more key that holds our block."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field

from speedstack.eval.results.schema import Document, Environment, Record, read_json
from speedstack.support.files import write_atomically
from speedstack.support.near_miss import nearest

BLOCK = "speedstack"


class HeadlineMetric(Record):
    """The metric a task of the suite is reported by, as lm-eval names it: metric and filter."""

    task: str
    metric: str | None
    num_fewshot: int | None


class TaskDocuments(Record):
    """Every document's scores of one task, in the task's order; `doc_hashes` are lm-eval's.

    A score is a number, or numbers that only their sums over documents make a metric of, as perplexity's; None for what
    is neither, as a text that is compared with the others at the end.
    """

    doc_hashes: tuple[str, ...]
    scores: dict[str, tuple[float | tuple[float, ...] | None, ...]]
    higher_is_better: dict[str, bool]


class TaskRequests(Record):
    """What happened to a task's requests; fields as in `speedstack.eval.lm_eval.adapter.TaskCounts`."""

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
        """Tokens a round of decoding; None where nothing was decoded in rounds."""
        return self.num_round_tokens / self.num_rounds if self.num_rounds else None


class SuiteBlock(Document):
    """What lm-eval does not know: the models, how they were run, and every document's scores.

    `quantization` is the format that the target's config names, None for none. `code_isolation` says what kept
    generated programs in; None where none was run. `num_cached` requests were known from an earlier run.
    `include_path` is the folder that `own_tasks` came from, with the SHA-256 of its files. `max_gen_toks` stands for
    each task's own; None: those. `limit` and `think_end_token` are as they were given.
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
    """`lm_eval` is the document that lm-eval made, as plain JSON types."""

    lm_eval: dict[str, Any]
    block: SuiteBlock

    def save(self, path: str | Path) -> Path:
        """Write as JSON, whole or not at all; returns the path."""
        content = self.lm_eval | {BLOCK: self.block.model_dump(mode="json")}
        return write_atomically(path, json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read and validate. Raises ValueError as `Document.load`, and for lm-eval's documents without our block."""
        return cls.check(read_json(path), path)

    @classmethod
    def check(cls, content: Any, path: str | Path) -> Self:
        """The result that `content`, read from `path`, is. Raises ValueError as `load`."""
        if not isinstance(content, dict) or BLOCK not in content:
            raise ValueError(f"{path} is no result of a suite: it has no part '{BLOCK}' (speedstack eval --suite)")
        lm_eval = {key: value for key, value in content.items() if key != BLOCK}
        block = SuiteBlock.check(content[BLOCK], path)
        if not isinstance(lm_eval.get("results"), dict):
            raise ValueError(f"{path} holds no scores: lm-eval's part 'results' is missing")
        return cls(lm_eval, block)

    def scores(self, task: str, metric: str | None) -> list[tuple[str, str, float]]:
        """(task, 'metric,filter', value) of what a task or group of the suite is reported by.

        That is the metric, or without one all it has, and where a group has no score of its own, its members'. Empty
        where lm-eval reported no such metric, or no finite number.
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
        """Raises ValueError for a task or group without the metric that the suite names, with the nearest it has, and
        where that is NaN.
        """
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
        """lm-eval's value of a task's or group's metric, such as 'acc,none', NaN included; None where it has none."""
        value = self.lm_eval["results"].get(task, {}).get(metric)
        return float(value) if isinstance(value, int | float) else None

    def stderr(self, task: str, metric: str) -> float | None:
        """lm-eval's standard error of it; None where it gives no finite one."""
        name, _, filter_name = metric.partition(",")
        stderr = self.value(task, f"{name}_stderr,{filter_name}")
        return stderr if stderr is not None and math.isfinite(stderr) else None


def no_metric(task: str, metric: str, known: Sequence[str]) -> str:
    """What to say of a metric that a task or group has not, but others of the form 'metric,filter'."""
    if not known:
        return f"{task} has no metric '{metric}', and no score of its own: name tasks of it"
    of_that_name = [name for name in known if name.partition(",")[0] == metric.partition(",")[0]]
    near = (of_that_name or nearest(metric, known, cutoff=0.3) or known)[0]
    others = ", ".join(name for name in known if name != near)
    return f"{task} has no metric '{metric}'; did you mean '{near}'?{f' It also has {others}' if others else ''}"


def _is_score(name: str) -> bool:
    """Whether lm-eval's entry of a task's results is a metric: it has a filter, and is no standard error."""
    metric, comma, _ = name.partition(",")
    return bool(comma) and not metric.endswith("_stderr")
