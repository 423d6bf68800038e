"""Schemas of everything the evaluation writes, by name: quality, sensitivity, conversion, the report that holds a run.

What they are made of is in `eval.results.schema`; acceptance and timing have files of their own. All of them can
be imported from here, which is where a reader of results looks.
"""

import csv
import io
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from speedstack.eval.results.acceptance_result import AcceptanceResult, AcceptanceSet
from speedstack.eval.results.schema import (
    SCHEMA_VERSION,
    Document,
    Environment,
    Record,
    Spread,
    Unavailable,
    read_json,
    to_plain,
)
from speedstack.eval.results.timing_result import ContestantTiming, Identity, SetTiming, TimingResult, TokenTimes
from speedstack.support.files import write_atomically

__all__ = [
    "DOCUMENTS",
    "SCHEMA_VERSION",
    "AcceptanceResult",
    "AcceptanceSet",
    "Attachment",
    "ContestantTiming",
    "ConversionCost",
    "ConversionResult",
    "Curve",
    "Document",
    "Environment",
    "Example",
    "ExpertStorage",
    "Identity",
    "MethodQuality",
    "ModelSummary",
    "QualityResult",
    "Record",
    "Report",
    "SensitivityResult",
    "SetTiming",
    "Spread",
    "StageSummary",
    "TaskScore",
    "TimingResult",
    "TokenTimes",
    "Unavailable",
    "UnitSensitivity",
    "read_json",
    "to_plain",
    "write_json_schemas",
]


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


class ConversionCost(Record):
    """One conversion of a checkpoint, in a process of its own.

    `peak_bytes` is the largest resident memory above what the process held before. `max_shard_bytes` bounds the
    safetensors files that are written.
    """

    name: str
    description: str
    source_bytes: int
    num_source_shards: int
    max_shard_bytes: int
    seconds: float
    peak_bytes: int

    @property
    def peak_shards(self) -> float:
        """Peak memory in shards of the result."""
        return self.peak_bytes / self.max_shard_bytes


class ConversionResult(Document):
    """Memory and time of converting checkpoints, a peer among them."""

    kind: Literal["conversion"] = "conversion"
    conversions: tuple[ConversionCost, ...]
    environment: Environment


class Curve(Record):
    """A quantity over training steps: one line in a plot of its stage."""

    stage: str
    label: str
    quantity: str
    steps: tuple[int, ...]
    values: tuple[float, ...]


class StageSummary(Record):
    """One stage of the run: what it did, how long it took."""

    name: str
    summary: str
    seconds: float | None = None


class ModelSummary(Record):
    """The model under study."""

    name: str
    architecture: str
    num_parameters: int
    num_active_parameters: int | None = None
    num_expert_parameters: int
    description: str = ""


class ExpertStorage(Record):
    """Bytes of the routed experts' weights, packed against bfloat16, in one place ("on disk", "in memory")."""

    place: str
    packed_bytes: int
    bf16_bytes: int

    @property
    def ratio(self) -> float:
        """Packed over bfloat16."""
        return self.packed_bytes / self.bf16_bytes


class Example(Record):
    """A generated text to look at."""

    title: str
    prompt: str
    text: str


class Attachment(Record):
    """A result file as it was read, its JSON unchanged; `name` is its path as it was given."""

    name: str
    content: dict[str, Any]


class Report(Document):
    """A whole run in one file; every part may be absent, so that a report can be made of what is finished.

    `attached` are results of all other kinds, and those of a kind that the run has one of already; where those are, the
    file of the run's own is in `own_files`, by kind. Of several runs with different models, `model` is the first's.
    """

    kind: Literal["report"] = "report"
    title: str
    subtitle: str = ""
    created_utc: str
    seed: int | None = None
    environment: Environment
    model: ModelSummary | None = None
    other_models: tuple[ModelSummary, ...] = ()
    stages: tuple[StageSummary, ...] = ()
    curves: tuple[Curve, ...] = ()
    quality: QualityResult | None = None
    acceptance: AcceptanceResult | None = None
    timing: TimingResult | None = None
    attached: tuple[Attachment, ...] = ()
    own_files: dict[str, str] = Field(default={}, description="kind -> file")
    storage: tuple[ExpertStorage, ...] = ()
    memory_bytes: dict[str, dict[str, int]] = Field(default={}, description="engine name -> part -> bytes")
    examples: tuple[Example, ...] = ()
    commands: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


DOCUMENTS: tuple[type[Document], ...] = (
    QualityResult,
    AcceptanceResult,
    TimingResult,
    SensitivityResult,
    ConversionResult,
    Report,
)


def write_json_schemas(directory: str | Path) -> list[Path]:
    """Write one JSON Schema file a document kind; returns their paths."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for document in DOCUMENTS:
        path = directory / f"{document.model_fields['kind'].default}.schema.json"
        path.write_text(json.dumps(document.model_json_schema(), indent=2, sort_keys=True) + "\n", encoding="utf-8")
        paths.append(path)
    return paths
