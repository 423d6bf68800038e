"""A whole run in one file: stages, measurements, curves and texts."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from speedstack.eval.results.microbench import ConversionResult
from speedstack.eval.results.quality import QualityResult, SensitivityResult
from speedstack.eval.results.schema import Document, Environment, Record
from speedstack.eval.results.speed import AcceptanceResult, TimingResult


class Curve(Record):
    """A quantity over training steps."""

    stage: str
    label: str
    quantity: str
    steps: tuple[int, ...]
    values: tuple[float, ...]


class StageSummary(Record):
    name: str
    summary: str
    seconds: float | None = None


class ModelSummary(Record):
    name: str
    architecture: str
    num_parameters: int
    num_active_parameters: int | None = None
    num_expert_parameters: int
    description: str = ""


class ExpertStorage(Record):
    """Bytes of the routed experts' weights, packed and in bfloat16, in one place ("on disk", "in memory")."""

    place: str
    packed_bytes: int
    bf16_bytes: int

    @property
    def ratio(self) -> float:
        """Packed over bfloat16."""
        return self.packed_bytes / self.bf16_bytes


class Example(Record):
    """A generated text."""

    title: str
    prompt: str
    text: str


class Attachment(Record):
    """The JSON of a result file, unchanged; `name` is its path as given."""

    name: str
    content: dict[str, Any]


class Report(Document):
    """A whole run in one file; every part may be absent.

    `attached` are results of other kinds, and further ones of a kind the run has; `own_files` maps a kind to the file
    of the run's own. If runs have different models, `model` is the first's.
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
    """Write one JSON Schema file per document kind; returns their paths."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for document in DOCUMENTS:
        path = directory / f"{document.model_fields['kind'].default}.schema.json"
        path.write_text(json.dumps(document.model_json_schema(), indent=2, sort_keys=True) + "\n", encoding="utf-8")
        paths.append(path)
    return paths
