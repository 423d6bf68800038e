"""Schemas of everything the evaluation writes: quality, acceptance, timing, and the report that holds them all.

Each file is one JSON document that names its `kind` and `schema_version`; a reader refuses another version rather than
guess. Units are in the names. Not-a-number and infinity are refused when a result is made: JSON has neither, and a
result that holds one is a bug upstream, not a value.
"""

import csv
import json
import os
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

SCHEMA_VERSION: Literal[1] = 1


class Record(BaseModel):
    """Immutable, no unknown fields, finite numbers; numpy and torch scalars become plain Python numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Document(Record):
    """A result that is a file of its own."""

    schema_version: Literal[1] = SCHEMA_VERSION

    def save(self, path: str | Path) -> Path:
        """Write as JSON, whole or not at all; returns the path. Raises OSError as the file system does."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read and validate. Raises ValueError, one line, for a missing file, broken JSON or another schema version."""
        return cls.check(read_json(path), path)

    @classmethod
    def check(cls, content: Any, path: str | Path) -> Self:
        """The document that `content`, read from `path`, is. Raises ValueError as `load`."""
        kind = cls.model_fields["kind"].default
        if not isinstance(content, dict) or content.get("kind") != kind:
            found = content.get("kind", "none") if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"{path} holds no {kind} result (its kind: {found})")
        if content.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(
                f"{path} has schema version {content.get('schema_version')}, this release reads version "
                f"{SCHEMA_VERSION}: measure again, or read it with the release that wrote it"
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"{path} does not fit the {kind} schema: {place}: {first['msg']}") from error


def read_json(path: str | Path) -> Any:
    """Content of a JSON file. Raises ValueError, one line, for a missing file and for anything but JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"no result file at {path}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error


class Environment(Record):
    """The machine and the software a result was measured with; `command` is the line that did it, None for a caller
    in Python.
    """

    machine: str
    operating_system: str
    cpu_model: str
    num_cores: int
    num_threads: int
    memory_bytes: int
    gpus: tuple[str, ...]
    python: str
    packages: dict[str, str]
    git_sha: str | None
    command: str | None = None


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
    """Quality of several models on the same held-out text, and lm-eval's own results of each, unchanged."""

    kind: Literal["quality"] = "quality"
    teacher: str
    methods: tuple[MethodQuality, ...]
    lm_eval: dict[str, dict[str, Any]] = {}
    environment: Environment | None = None

    def method(self, name: str) -> MethodQuality:
        """The entry named `name`. Raises ValueError naming those there are."""
        for entry in self.methods:
            if entry.method == name:
                return entry
        raise ValueError(f"no method {name!r}; there are {', '.join(entry.method for entry in self.methods)}")


class AcceptanceSet(Record):
    """Acceptance on one set of prompts.

    `acceptance_length` is tokens committed / decode rounds, the bonus token included (tau); `mean_of_responses` is the
    same ratio a response, then averaged, as the DFlash paper reports it. `survival[i]` is the share of the rounds that
    drafted position i + 1 in which the drafts up to it were all accepted. `rows_per_token` are rows of the target, and
    `drafted_per_token` proposals made, a token committed; None in files written before they were counted.
    """

    name: str
    num_prompts: int
    num_rounds: int
    num_committed: int
    acceptance_length: float
    mean_of_responses: float
    survival: tuple[float, ...]
    rows_per_token: float | None = None
    drafted_per_token: float | None = None


class AcceptanceResult(Document):
    """Acceptance of one drafter by one target.

    `block_size`: the most tokens that a round commits. `strategy`: the fields of the engine's `DraftStrategy`.
    """

    kind: Literal["acceptance"] = "acceptance"
    block_size: int
    strategy: dict[str, Any] = {}
    temperature: float
    seed: int
    max_new_tokens: int
    overall: AcceptanceSet
    sets: tuple[AcceptanceSet, ...]
    environment: Environment | None = None


class Spread(Record):
    """A repeated measurement: median, quartiles, extremes, and how many repeats."""

    median: float
    q1: float
    q3: float
    minimum: float
    maximum: float
    num_repeats: int


class Identity(Record):
    """Whether a contestant's tokens are those of `reference`, and whether it promises so."""

    reference: str
    promised: bool
    num_identical: int
    num_prompts: int
    first_difference: str | None = None

    @property
    def is_broken(self) -> bool:
        """A promise was made and not kept."""
        return self.promised and self.num_identical < self.num_prompts


class ContestantTiming(Record):
    """One way of generating. Rates are tokens a second over all prompts of a repeat; the first token is timed apart.

    `decode_tokens_per_second` counts the tokens after the first one and the time after it;
    `tokens_per_second` counts all of them over the whole call, prefill included.
    """

    name: str
    description: str
    prepare_seconds: float
    warmup_seconds: float
    decode_tokens_per_second: Spread
    tokens_per_second: Spread
    first_token_seconds: Spread
    acceptance_length: float | None = None
    identity: Identity | None = None


class Unavailable(Record):
    """A peer that was to run and could not, with its reason."""

    name: str
    reason: str


class TimingResult(Document):
    """A race: every contestant on the same prompts, in one process, repeats interleaved."""

    kind: Literal["timing"] = "timing"
    device: str
    dtype: str
    num_threads: int
    num_prompts: int
    num_prompt_tokens: tuple[int, ...]
    num_new_tokens: int
    num_repeats: int
    contestants: tuple[ContestantTiming, ...]
    unavailable: tuple[Unavailable, ...] = ()
    environment: Environment | None = None

    def contestant(self, name: str) -> ContestantTiming | None:
        """The entry named `name`, None if it did not run."""
        return next((entry for entry in self.contestants if entry.name == name), None)

    def speedup(self, name: str, over: str) -> float | None:
        """Ratio of median decode rates, None if either did not run."""
        fast, slow = self.contestant(name), self.contestant(over)
        if fast is None or slow is None:
            return None
        return fast.decode_tokens_per_second.median / slow.decode_tokens_per_second.median


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
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(UnitSensitivity.model_fields))
            writer.writeheader()
            writer.writerows(unit.model_dump() for unit in self.units)
        os.replace(temporary, path)
        return path


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

    `attached` are results of all other kinds, and those of a kind that the run has one of already.
    """

    kind: Literal["report"] = "report"
    title: str
    subtitle: str = ""
    created_utc: str
    seed: int | None = None
    environment: Environment
    model: ModelSummary | None = None
    stages: tuple[StageSummary, ...] = ()
    curves: tuple[Curve, ...] = ()
    quality: QualityResult | None = None
    acceptance: AcceptanceResult | None = None
    timing: TimingResult | None = None
    attached: tuple[Attachment, ...] = ()
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


def to_plain(value: object) -> Any:
    """`value` as plain JSON types: numpy and torch scalars and arrays too; any other object as its str()."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return to_plain(value.tolist())
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    return str(value)


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
