"""Config of the verb `ablate`: axes, rows that are added or left out, and how each row is made and measured.

    grid      the product of formats, modules, methods, drafters and temperatures
    include   further products; a missing axis has its default: mxfp4, experts, rtn, no drafter, greedy
    exclude   patterns; matching rows of the grid are left out, those of `include` are not

Equal rows are merged: without a method there is no format, without a drafter no temperature, and the full-precision
model has one kind of drafter. Impossible combinations are refused by name.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import tyro
from pydantic import Field, field_validator, model_validator

from speedstack.eval.config import DEMO_RUN, Limit
from speedstack.quant.formats import FORMATS, number_format
from speedstack.quant.ptq import ModuleGroup
from speedstack.support.config import Section, load_config, read_config, replaced, validated
from speedstack.support.near_miss import did_you_mean
from speedstack.train.config.recipes import DrafterConfig, JobConfig, QatConfig

JobT = TypeVar("JobT", bound=JobConfig)
MaybeMany = str | float | list[Any] | tuple[Any, ...]

FULL_PRECISION = "full precision"
# Values of each axis; temperatures are numbers.
AXES: dict[str, tuple[str, ...]] = {
    "format": tuple(FORMATS),
    "modules": get_args(ModuleGroup),
    "method": ("none", "rtn", "mse", "gptq", "qat-ce", "qad"),
    "drafter": ("none", "full", "quantized"),
}
TRAINED = {"qat-ce": "ce", "qad": "kl"}  # method -> objective of the qat recipe
# Sections and fields of a training config that the grid sets.
_MANAGED = {
    "qat": ("run", "data.corpus", "data.source", "data.split_seed", "data.heldout_fraction", "qat.model",
            "qat.objective", "distributed"),
    "drafter": ("run", "data.corpus", "data.source", "data.split_seed", "data.heldout_fraction", "drafter.target",
                "drafter.text", "drafter.features_path", "distributed"),
}  # fmt: skip


@dataclass(frozen=True)
class RowSpec:
    """A row of the table before it is measured. Format and modules are empty without a method."""

    format: str
    modules: str
    method: str
    drafter: str
    temperature: float

    @property
    def is_packed(self) -> bool:
        """Whether the runtime serves the weights packed, not as ordinary weights of the same values."""
        return self.format == "mxfp4" and self.modules == "experts"

    @property
    def model_name(self) -> str:
        """The row's model, whatever its drafter."""
        return FULL_PRECISION if self.method == "none" else f"{self.format} {self.modules} {self.method}"

    @property
    def name(self) -> str:
        """The whole row in words."""
        if self.drafter == "none":
            return self.model_name
        return f"{self.model_name}, drafter of the {self.drafter} model, T={self.temperature:g}"

    def normalized(self) -> RowSpec:
        """The same row without settings that have no effect on it."""
        row = self
        if row.method == "none":
            row = replace(row, format="", modules="", drafter="none" if row.drafter == "none" else "full")
        return replace(row, temperature=0.0) if row.drafter == "none" else row

    def problem(self) -> str | None:
        """Why such a row cannot be made, or None."""
        if self.method in ("none", "rtn"):
            return None
        if self.method == "mse":
            fits = FORMATS[number_format(self.format).name].has_scale_rule
            return None if fits else f"{self.format} has no scale rule that could be searched: use rtn"
        what = "trains experts" if self.method in TRAINED else "rounds experts"
        return None if self.is_packed else f"{self.method} {what} in mxfp4, not {self.modules} in {self.format}"


def _check_axis(axis: str, values: Sequence[Any]) -> None:
    for value in values:
        if axis == "temperature":
            if not isinstance(value, int | float) or isinstance(value, bool) or value < 0:
                raise ValueError(f"temperature {value!r} is no number from 0 on")
        elif value not in AXES[axis]:
            hint = did_you_mean(str(value), AXES[axis]) or f"; choose from {', '.join(AXES[axis])}"
            raise ValueError(f"unknown {axis} '{value}'{hint}")


class Axes(Section):
    """A product of values; a value alone stands for a list of one."""

    format: tuple[str, ...] = Field(("mxfp4",), min_length=1, description=f"Number formats: {', '.join(FORMATS)}.")
    modules: tuple[str, ...] = Field(
        ("experts",), min_length=1, description="What is quantized: experts, attention, lm_head, or all linear layers."
    )
    method: tuple[str, ...] = Field(
        ("rtn",),
        min_length=1,
        description="none: full precision. rtn: round to nearest. mse: the same with searched scales. gptq. qat-ce, "
        "qad: trained on cross-entropy, or on KL from the full-precision model.",
    )
    drafter: tuple[str, ...] = Field(
        ("none",),
        min_length=1,
        description="none, or the model a drafter is trained for: the full-precision one, or the row's quantized one.",
    )
    temperature: tuple[float, ...] = Field(
        (0.0,), min_length=1, description="Temperatures that rows with a drafter decode at."
    )

    @field_validator("*", mode="before")
    @classmethod
    def _many(cls, value: MaybeMany) -> tuple[Any, ...]:
        return tuple(value) if isinstance(value, list | tuple) else (value,)

    @model_validator(mode="after")
    def _values_are_known(self) -> Axes:
        for axis in type(self).model_fields:
            _check_axis(axis, getattr(self, axis))
        return self

    def rows(self) -> list[RowSpec]:
        """The product, not normalized."""
        values = itertools.product(self.format, self.modules, self.method, self.drafter, self.temperature)
        return [RowSpec(*each) for each in values]


class Pattern(Section):
    """Rows that have one of the values on every axis that is named."""

    format: tuple[str, ...] | None = None
    modules: tuple[str, ...] | None = None
    method: tuple[str, ...] | None = None
    drafter: tuple[str, ...] | None = None
    temperature: tuple[float, ...] | None = None

    @field_validator("*", mode="before")
    @classmethod
    def _many(cls, value: MaybeMany | None) -> tuple[Any, ...] | None:
        return value if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)

    @model_validator(mode="after")
    def _values_are_known(self) -> Pattern:
        if not self.named():
            raise ValueError("a pattern of exclude names at least one axis")
        for axis, values in self.named().items():
            _check_axis(axis, values)
        return self

    def named(self) -> dict[str, tuple[Any, ...]]:
        """Values by axis."""
        return {axis: values for axis in type(self).model_fields if (values := getattr(self, axis)) is not None}

    def matches(self, row: RowSpec) -> bool:
        return all(getattr(row, axis) in values for axis, values in self.named().items())


class GptqSection(Section):
    """Calibration of gptq, on the training part of the corpus."""

    num_sequences: int = Field(128, ge=1, description="Sequences.")
    sequence_length: int = Field(256, ge=2, description="Tokens in each.")
    batch_size: int = Field(8, ge=1, description="Sequences computed together.")
    damping: float = Field(0.01, ge=0, description="Added to the diagonal of the second moments, as part of its mean.")


class TrainingSection(Section):
    """A recipe's config, and what the grid changes in it."""

    base: Path = Field(Path("configs/qat/tiny.yaml"), description="Config of the recipe that every run starts from.")
    set: Annotated[dict[str, Any], tyro.conf.Fixed] = Field(
        {}, description="Fields changed in it, by dotted name, such as loop.num_steps."
    )

    def config(self, config_type: type[JobT], values: Mapping[str, Any]) -> JobT:
        """One run's config: `base`, `set`, and the grid's own `values`. Raises ValueError."""
        kind = config_type.model_fields["kind"].default
        for name in self.set:
            if name in _MANAGED[kind] or name.partition(".")[0] in _MANAGED[kind]:
                raise ValueError(f"{kind}.set: {name} is set by the grid")
        base = read_config(config_type, self.base)
        try:
            return replaced(base, {**self.set, **values})
        except ValueError as error:
            raise ValueError(f"{kind}.set: {error}") from error


class HeldoutSection(Section):
    """Held-out text of perplexity, KL and top-1 agreement."""

    num_tokens: int = Field(8192, ge=1, description="Predicted tokens.")
    window: int = Field(256, ge=2, description="Tokens in one window.")


class SuiteSection(Section):
    """The suite of lm-eval tasks that gives the score, through the engine."""

    name: str | None = Field("offline", description="Suite, or its YAML file; None: rows have no score.")
    tasks: tuple[str, ...] = Field(("same_text",), description="Tasks of the suite that are run; none named: all.")
    score: str = Field("same_text", description="Task whose headline metric is the score.")
    limit: Limit = Field(
        None, description="Documents a task at most: so many, or a share of them between 0 and 1; None: all."
    )
    data: Path | None = Field(None, description="Directory of local data sets, as of the verb eval.")
    max_length: int | None = Field(None, ge=2, description="Positions of a sequence's buffers; None: the model's.")
    batch_size: int = Field(8, ge=1, description="Sequences decoded together.")


class SpeedSection(Section):
    """Prompts, held out, that acceptance and tokens/s are measured on, one sequence at a time."""

    num_prompts: int = Field(8, ge=1, description="Prompts of each kind (module openings, function bodies).")
    num_prompt_tokens: int = Field(64, ge=2, description="Tokens in a prompt.")
    num_new_tokens: int = Field(128, ge=2, description="Tokens generated after each prompt.")
    num_repeats: int = Field(3, ge=0, description="Timed passes over the prompts after a warm-up; 0: no tokens/s.")
    draft_noise: Literal["none", "shared"] = Field(
        "shared", description="Proposals above temperature 0: the most probable, or drawn with the target's own noise."
    )


class PredictSection(Section):
    """Tokens/s by the cost model, of one sequence."""

    gpu: str | None = Field("H200", description="GPU, by name, as of the verb plan; None: no prediction.")
    context: int = Field(1024, ge=1, description="Positions that each row attends to.")
    handoff_us: float = Field(1.0, ge=0, description="Assumed time from a phase's last signal to the next one's start.")
    bandwidth_fraction: float = Field(1.0, gt=0, le=1, description="Part of the memory bandwidth that is reached.")


class AblateConfig(Section):
    """A grid over number format, modules, method, drafter and temperature; one table, four plots."""

    model: Path = Field(DEMO_RUN / "pretrain" / "export", description="Full-precision model directory.")
    corpus: Path = Field(DEMO_RUN / "corpus", description="Prepared corpus: its training part is trained and "
                         "calibrated on, its held-out part measured on.")  # fmt: skip
    out: Path = Field(Path("runs/ablate"), description="Directory of the results and of all steps; go on there.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Device; auto takes CUDA if present.")
    jobs: int | None = Field(
        None, ge=1, description="Rows made at once, a process each; None: as many as there are GPUs, or 1 on a CPU."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="dtype that models are compared and decoded in; auto: float32 on a CPU, bfloat16 on a GPU."
    )
    serving: Literal["auto", "packed"] = Field(
        "auto",
        description="packed: refuse rows whose weights the runtime does not serve packed. auto: serve them as ordinary "
        "weights of the same values.",
    )
    seed: int = Field(0, ge=0, description="Seed of training, of calibration, of prompts and of sampling.")
    grid: Axes = Field(Axes(), description="The axes.")
    include: Annotated[tuple[Axes, ...], tyro.conf.Fixed] = Field((), description="Further products.")
    exclude: Annotated[tuple[Pattern, ...], tyro.conf.Fixed] = Field((), description="Rows of the grid to leave out.")
    gptq: GptqSection = Field(GptqSection(), description="Calibration of gptq.")
    qat: TrainingSection = Field(TrainingSection(), description="Training of qat-ce and qad.")
    drafter: TrainingSection = Field(
        TrainingSection(base=Path("configs/drafter/tiny.yaml")), description="Training of drafters."
    )
    heldout: HeldoutSection = Field(HeldoutSection(), description="Text of KL and perplexity.")
    suite: SuiteSection = Field(SuiteSection(), description="Tasks of the score.")
    speed: SpeedSection = Field(SpeedSection(), description="Prompts of acceptance and tokens/s.")
    predict: PredictSection = Field(PredictSection(), description="The GPU that tokens/s are predicted for.")

    @model_validator(mode="after")
    def _rows_can_be_made(self) -> AblateConfig:
        problems = [f"{row.name}: {problem}" for row in self.rows() if (problem := self._problem(row)) is not None]
        if problems:
            more = f"; and {len(problems) - 3} more rows" if len(problems) > 3 else ""
            raise ValueError(f"{'; '.join(problems[:3])}{more}: leave them out with exclude")
        return self

    def _problem(self, row: RowSpec) -> str | None:
        if self.serving == "packed" and row.method != "none" and not row.is_packed:
            return f"the runtime serves no {row.modules} packed in {row.format}, and serving is packed"
        return row.problem()

    def rows(self) -> list[RowSpec]:
        """All rows without duplicates, full precision first. Raises ValueError for an idle exclude and for no rows."""
        products = self.grid.rows()
        for pattern in self.exclude:
            if not any(map(pattern.matches, products)):
                raise ValueError(f"exclude: no row of the grid has {pattern.named()}")
        products = [row for row in products if not any(pattern.matches(row) for pattern in self.exclude)]
        products += [row for block in self.include for row in block.rows()]
        if not products:
            raise ValueError("exclude leaves no row")
        rows = dict.fromkeys(row.normalized() for row in products)
        return sorted(rows, key=lambda row: row.method != "none")


class Grids(Section):
    """Several grids, one after the other."""

    grids: tuple[AblateConfig, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _directories_differ(self) -> Grids:
        outs = [grid.out for grid in self.grids]
        if len(set(outs)) < len(outs):
            raise ValueError(f"two grids have the same out ({', '.join(map(str, outs))}): give each its own")
        return self


def load_ablate_config(path: Path | None, overrides: Sequence[str]) -> AblateConfig | Grids:
    """The verb's config; several YAML files may be named, and flags then apply to all."""
    flags = list(itertools.dropwhile(lambda argument: not argument.startswith("-"), overrides))
    more = overrides[: len(overrides) - len(flags)]
    if path is None or not more:
        return load_config(AblateConfig, path, overrides)
    grids = []
    for file in (path, *map(Path, more)):
        try:
            grids.append(load_config(AblateConfig, file, flags))
        except ValueError as error:
            raise ValueError(str(error) if str(file) in str(error) else f"{file}: {error}") from error
    return validated(Grids, {"grids": tuple(grids)})


def qat_config(config: AblateConfig, method: str, out: Path) -> QatConfig:
    """The run of a trained method, in `out`/run. Raises ValueError as `TrainingSection.config`."""
    return config.qat.config(
        QatConfig,
        {**_run_values(config, out), "qat.model": config.model.resolve(), "qat.objective": TRAINED[method]},
    )


def drafter_config(config: AblateConfig, target: Path, out: Path) -> DrafterConfig:
    """A drafter's run for the model in `target`, in `out`/run with its text and features. Raises as `qat_config`."""
    places = {"drafter.target": target, "drafter.text": None, "drafter.features_path": None}
    return config.drafter.config(DrafterConfig, {**_run_values(config, out), **places})


def _run_values(config: AblateConfig, out: Path) -> dict[str, Any]:
    from speedstack.quant.checkpoint.files import read_json

    corpus = read_json(config.corpus / "corpus.json")
    return {
        "run.out": out,
        "run.name": "run",
        "run.seed": config.seed,
        "run.device": config.device,
        "run.wandb_mode": "disabled",
        # Resolved, because a resumed run compares its inputs by path.
        "data.corpus": config.corpus.resolve(),
        # Loading a corpus requires the settings it was made with.
        "data.source": corpus["source"],
        "data.split_seed": corpus["seed"],
        "data.heldout_fraction": corpus["heldout_fraction"],
    }
