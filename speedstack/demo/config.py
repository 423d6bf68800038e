"""Config of the demo: the recipes' own configs, by size, and how much is measured.

The demo uses configs/pretrain, configs/qat and configs/drafter of its size unchanged. `stage_configs` fills in the
fields under `MANAGED` (seed, device, every path), which are refused in a file or flag.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, Field

from speedstack.support.config import Section, load_config, read_config, replaced
from speedstack.train.config.recipes import DrafterConfig, PretrainConfig, QatConfig, identity

ConfigT = TypeVar("ConfigT", bound=BaseModel)
Size = Literal["tiny", "small"]

_RUN_FIELDS = ("run.name", "run.out", "run.seed", "run.device", "run.wandb_mode", "data.corpus", "data.split_seed")
# The corpus is prepared once, as the pretrain section says.
_CORPUS_FIELDS = ("data.source", "data.vocab_size", "data.heldout_fraction")
# Set by the demo, by recipe.
MANAGED = {
    "pretrain": _RUN_FIELDS,
    "qat": (*_RUN_FIELDS, *_CORPUS_FIELDS, "qat.model"),
    "drafter": (*_RUN_FIELDS, *_CORPUS_FIELDS, "drafter.target", "drafter.text"),
}


class QualitySection(Section):
    num_tokens: int = Field(16384, ge=1, description="Held-out tokens of perplexity and divergence.")
    window: int = Field(256, ge=2, description="Tokens in one of their windows.")
    limit: int | None = Field(None, ge=1, description="Documents an lm-eval task at most; None: all.")


class AcceptanceSection(Section):
    num_prompts: int = Field(4, ge=1, description="Held-out prompts of each kind (module openings, function bodies).")
    num_prompt_tokens: int = Field(64, ge=2, description="Tokens in a prompt.")
    num_new_tokens: int = Field(128, ge=2, description="Tokens generated after each prompt, greedily.")


class TimingSection(Section):
    num_prompts: int = Field(4, ge=1, description="Held-out prompts of each kind.")
    num_prompt_tokens: int = Field(64, ge=2, description="Tokens in a prompt.")
    num_new_tokens: int = Field(128, ge=2, description="Tokens generated after each prompt.")
    num_repeats: int = Field(3, ge=1, description="Timed repeats of every contestant, interleaved.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="dtype of all contestants.")


class DemoConfig(Section):
    """The whole stack on a small model, in stages; interrupted anywhere, the same command continues."""

    size: Size = Field("tiny", description="tiny: 12M parameters, for a CPU; small: 75M parameters, for a GPU.")
    seed: int = Field(0, ge=0, description="Seed of everything; the same seed gives the same numbers on one machine.")
    out: Path = Field(Path("runs/demo"), description="Directory of all results; run again to continue there.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Device; auto takes CUDA if present.")
    pretrain: PretrainConfig = Field(
        default_factory=lambda: _preset(PretrainConfig, "tiny"), description="The model of record, from scratch."
    )
    qat: QatConfig = Field(
        default_factory=lambda: _preset(QatConfig, "tiny"),
        description="Distillation of the quantized model from the full-precision one.",
    )
    drafter: DrafterConfig = Field(
        default_factory=lambda: _preset(DrafterConfig, "tiny"),
        description="The drafter, on text that the quantized model wrote.",
    )
    quality: QualitySection = Field(QualitySection(), description="Held-out quality of the three models.")
    acceptance: AcceptanceSection = Field(AcceptanceSection(), description="Acceptance of the drafter.")
    timing: TimingSection = Field(TimingSection(), description="Decode speed against peers.")


class SmallDemoConfig(DemoConfig):
    """The whole stack at a size for one GPU, in stages; interrupted anywhere, the same command continues."""

    size: Size = Field("small", description="tiny: 12M parameters, for a CPU; small: 75M parameters, for a GPU.")
    out: Path = Field(Path("runs/demo-small"), description="Directory of all results; run again to continue there.")
    pretrain: PretrainConfig = Field(
        default_factory=lambda: _preset(PretrainConfig, "small"), description="The model of record, from scratch."
    )
    qat: QatConfig = Field(
        default_factory=lambda: _preset(QatConfig, "small"),
        description="Distillation of the quantized model from the full-precision one.",
    )
    drafter: DrafterConfig = Field(
        default_factory=lambda: _preset(DrafterConfig, "small"),
        description="The drafter, on text that the quantized model wrote.",
    )


SIZES: dict[str, type[DemoConfig]] = {"tiny": DemoConfig, "small": SmallDemoConfig}


def load_demo_config(path: Path | None, overrides: Sequence[str]) -> DemoConfig:
    """The preset of the requested size, then the file, then the flags.

    Raises ValueError as `load_config`, for an unknown size, and for a field under `MANAGED`.
    """
    size = _requested_size(path, overrides)
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; use {' or '.join(SIZES)}")
    config = load_config(SIZES[size], path, overrides)
    preset = SIZES[size]()
    for stage, names in MANAGED.items():
        for name in names:
            if _get(getattr(config, stage), name) != _get(getattr(preset, stage), name):
                raise ValueError(
                    f"{stage}.{name} is set by the demo, which takes --out, --seed, --device and the pretrain section"
                )
    return config


def stage_configs(config: DemoConfig) -> tuple[PretrainConfig, QatConfig, DrafterConfig]:
    """The recipes' configs with the fields under `MANAGED` filled in."""
    out = config.out
    shared: dict[str, Any] = {"run.out": out, "run.seed": config.seed, "run.device": config.device}
    # The demo's report shows the same curves, without an account.
    shared["run.wandb_mode"] = "disabled"
    shared |= {"data.corpus": out / "corpus", "data.split_seed": config.seed}
    pretrain = replaced(config.pretrain, shared | {"run.name": "pretrain"})
    shared |= {name: _get(pretrain, name) for name in _CORPUS_FIELDS}
    qat = replaced(config.qat, shared | {"run.name": "qad", "qat.model": out / "pretrain" / "export"})
    drafter = replaced(
        config.drafter,
        shared | {"run.name": "drafter", "drafter.target": out / "qad" / "export", "drafter.text": out / "text"},
    )
    return pretrain, qat, drafter


def training_settings(config: DemoConfig) -> dict[str, Any]:
    """Everything that decides the models of a demo, by dotted name: what its directory is bound to once it began."""
    settings: dict[str, Any] = {"size": config.size, "seed": config.seed, "device": config.device}
    for recipe, managed in MANAGED.items():
        fields = identity(getattr(config, recipe))
        settings |= {f"{recipe}.{name}": value for name, value in fields.items() if name not in managed}
    return settings


def _preset(config_type: type[ConfigT], size: Size) -> ConfigT:
    """The recipe's config file of that size; `configs` is beside this module, as a link or installed."""
    recipe = config_type.model_fields["kind"].default
    return read_config(config_type, Path(__file__).resolve().parents[1] / "configs" / recipe / f"{size}.yaml")


def _requested_size(path: Path | None, overrides: Sequence[str]) -> str:
    """The requested `size`; `load_config` reports other problems of the file."""
    for index, argument in enumerate(overrides):
        if argument == "--size" and index + 1 < len(overrides):
            return overrides[index + 1]
        if argument.startswith("--size="):
            return argument.partition("=")[2]
    if path is not None and path.is_file():
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            return "tiny"
        if isinstance(data, dict):
            return str(data.get("size", "tiny"))
    return "tiny"


def _get(config: BaseModel, name: str) -> Any:
    section, _, leaf = name.partition(".")
    return getattr(getattr(config, section), leaf, None)
