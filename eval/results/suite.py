"""Results of a suite: lm-eval's document, unchanged, with our block under one more key."""

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
