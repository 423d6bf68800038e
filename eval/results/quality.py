"""Quality of models on held-out text: distance to a teacher, scores of tasks, and what each layer costs alone."""

import csv
import io
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from speedstack.eval.results.schema import Document, Environment, Record
from speedstack.support.files import write_atomically


class TaskScore(Record):
    """One metric of one lm-eval task. `stderr` is the standard error of the mean for scores that are means;
    `higher_is_better` is None where a task does not say.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    num_documents: int


class MethodQuality(Record):
    """One model under test: held-out perplexity, distance to the teacher (None for the teacher itself), task scores."""

    method: str
    num_tokens: int
    nll_nats: float
    perplexity: float
    kl_to_teacher_nats: float | None
    kl_stderr_nats: float | None
    top1_agreement: float | None
    tasks: tuple[TaskScore, ...] = ()


class QualityResult(Document):
    """Quality of several models on the same held-out text, and lm-eval's own results of each, unchanged.

    `limit` as it was given; `include_path`: a folder of the user's own tasks, with the SHA-256 of its files.
    """

    kind: Literal["quality"] = "quality"
    teacher: str
    methods: tuple[MethodQuality, ...]
    limit: int | float | None = None
    include_path: str | None = None
    include_path_sha256: str | None = None
    lm_eval: dict[str, dict[str, Any]] = Field(default={})
    environment: Environment | None = None

    def method(self, name: str) -> MethodQuality:
        """The entry named `name`. Raises ValueError naming those there are."""
        for entry in self.methods:
            if entry.method == name:
                return entry
        raise ValueError(f"no method {name!r}; there are {', '.join(entry.method for entry in self.methods)}")


class UnitSensitivity(Record):
    """A layer's routed experts, or one of them, quantized alone: the distance to full precision that this makes.

    `expert` is None for the whole layer; `num_tokens` counts the tokens sent to it, a token once an expert.
    """

    layer: int
    expert: int | None
    num_parameters: int
    num_tokens: int
    kl_nats: float
    kl_stderr_nats: float | None
    top1_agreement: float


class SensitivityResult(Document):
    """KL to the full-precision model when only one layer or expert is quantized; `all_kl_nats` when all are.

    `model_sha256` is of the model directory's weights; None for a model that came from none.
    """

    kind: Literal["sensitivity"] = "sensitivity"
    model_sha256: str | None = None
    rounding: str
    num_tokens: int
    all_kl_nats: float
    units: tuple[UnitSensitivity, ...]
    environment: Environment

    def layers(self) -> tuple[UnitSensitivity, ...]:
        """The whole layers, in order."""
        return tuple(unit for unit in self.units if unit.expert is None)

    def experts(self) -> tuple[UnitSensitivity, ...]:
        """The single experts, in order; empty when only layers were measured."""
        return tuple(unit for unit in self.units if unit.expert is not None)

    def save_csv(self, path: str | Path) -> Path:
        """Write the units as CSV, a row each, an empty `expert` for whole layers; returns the path."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=list(UnitSensitivity.model_fields))
        writer.writeheader()
        writer.writerows(unit.model_dump() for unit in self.units)
        return write_atomically(path, text.getvalue())
