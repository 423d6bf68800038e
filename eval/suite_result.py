"""The result file of a suite: lm-eval's own document, unchanged, with one more key that holds our block."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from speedstack.eval.document import Document, Environment, Record, read_json, write_whole

BLOCK = "speedstack"


class HeadlineMetric(Record):
    """The metric a task of the suite is reported by, as lm-eval names it: metric and filter."""

    task: str
    metric: str | None
    num_fewshot: int | None


class TaskDocuments(Record):
    """Every document's scores of one task, in the task's order; `doc_hashes` are lm-eval's.

    A score is a number, or numbers that only their sums over documents make a metric of, as perplexity's.
    """

    doc_hashes: tuple[str, ...]
    scores: dict[str, tuple[float | tuple[float, ...], ...]]
    higher_is_better: dict[str, bool]


class TaskRequests(Record):
    """What happened to a task's requests; fields as in `speedstack.eval.lm.TaskCounts`."""

    num_requests: int
    num_cached: int
    num_shortened: int
    num_generations: int
    num_unstopped: int
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
    limit: int | None
    chat_template: bool
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
        return write_whole(path, json.dumps(content, indent=1) + "\n")

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

    def value(self, task: str, metric: str) -> float | None:
        """lm-eval's value of a task's or group's metric, such as 'acc,none'; None where it has none."""
        value = self.lm_eval["results"].get(task, {}).get(metric)
        return float(value) if isinstance(value, int | float) else None

    def stderr(self, task: str, metric: str) -> float | None:
        """lm-eval's standard error of it; None where it gives none."""
        name, _, filter_name = metric.partition(",")
        return self.value(task, f"{name}_stderr,{filter_name}")
