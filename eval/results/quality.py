"""Results of quality on held-out text: divergence, task scores, and sensitivity of layers and experts."""

import csv
import io
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from speedstack.eval.results.schema import Document, Environment, Record
from speedstack.support.files import write_atomically


class TaskScore(Record):
    """One metric of one lm-eval task. `stderr` is of the mean; None for scores that are no means."""

    task: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    num_documents: int


class MethodQuality(Record):
    """One model; KL and agreement are with the teacher, None for the teacher itself."""

    method: str
    num_tokens: int
    nll_nats: float
    perplexity: float
    kl_to_teacher_nats: float | None
    kl_stderr_nats: float | None
    top1_agreement: float | None
    tasks: tuple[TaskScore, ...] = ()


class QualityResult(Document):
    """Models on the same held-out text, with lm-eval's own results.

    `include_path` is a folder of the user's tasks, with the SHA-256 of its files.
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
        """The entry named `name`. Raises ValueError naming the known ones."""
        for entry in self.methods:
            if entry.method == name:
                return entry
        raise ValueError(f"no method {name!r}; there are {', '.join(entry.method for entry in self.methods)}")


class UnitSensitivity(Record):
    """KL when only a layer's routed experts, or one expert, are quantized.

    `expert` is None for the layer; `num_tokens` counts tokens per expert they are routed to.
    """

    layer: int
    expert: int | None
    num_parameters: int
    num_tokens: int
    kl_nats: float
    kl_stderr_nats: float | None
    top1_agreement: float


class SensitivityResult(Document):
    """KL of units quantized alone; `all_kl_nats` when all are. `model_sha256` is of the model directory's weights."""

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
        """The single experts, in order."""
        return tuple(unit for unit in self.units if unit.expert is not None)

    def save_csv(self, path: str | Path) -> Path:
        """Write a CSV row per unit; returns the path."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=list(UnitSensitivity.model_fields))
        writer.writeheader()
        writer.writerows(unit.model_dump() for unit in self.units)
        return write_atomically(path, text.getvalue())
