"""The `convert` verb: a checkpoint of one format becomes one of another. A drafter is told from a model by its config.

The checkpoint may stand before the flags: `speedstack convert SRC --to FORMAT --out DIR`. A name that ends in .yaml or
.yml is a config file.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from speedstack.eval.config import DEMO_RUN
from speedstack.support.config import Section, load_config_of

# Settings that only one kind of source uses.
_MODEL_SETTINGS = ("scale_rule", "linears", "lm_head", "max_shard_bytes")
_DRAFTER_SETTINGS = ("target",)


class ConvertConfig(Section):
    """Convert a checkpoint to another format."""

    source: Path = Field(DEMO_RUN / "qad" / "export", description="Model directory, in any of the formats.")
    to: str = Field(
        "plain",
        description="Format to write. A model: compressed-tensors, gpt-oss, mimo, deepseek-v4, gguf or plain. "
        "A drafter: speedstack, zlab, mimo, speculators or transformers.",
    )
    out: Path = Field(Path("runs/convert"), description="Directory of the result; a model already there is replaced.")
    scale_rule: Literal["auto", "floor", "rceil", "even", "mse"] = Field(
        "auto",
        description="How scales are chosen where an unquantized source is rounded to MXFP4; auto: even.",
    )
    linears: Literal["keep", "fp8"] = Field(
        "keep",
        description="Linear layers other than experts: keep them as they are, or (mimo, deepseek-v4) round them to FP8 "
        "in tiles of 128 x 128. Layers that are no whole tiles stay.",
    )
    lm_head: Literal["keep", "fp8"] = Field(
        "keep",
        description="The language-model head: keep it as it is, or (mimo, deepseek-v4) round it to FP8 as well, which "
        "speedstack reads and most loaders of these formats do not.",
    )
    target: Path | None = Field(
        None,
        description="The model that a drafter is for from now on, such as its old target in another format; what "
        "speculators' format names, and whose LM head it stores. None: the one it was trained for.",
    )
    max_shard_bytes: int = Field(5 * 10**9, ge=1, description="Largest safetensors file written, in bytes.")


def load_convert_config(path: Path | None, overrides: Sequence[str]) -> ConvertConfig:
    """The config of a file and flags, or of a source directory and flags. Raises as `load_config`."""
    return load_config_of(ConvertConfig, "source", path, overrides)


def convert(config: ConvertConfig) -> None:
    """Convert, with a progress bar, and print where the result is."""
    from speedstack.dflash.checkpoint import is_drafter
    from speedstack.quant.checkpoint import convert as run
    from speedstack.quant.checkpoint.config import read_config
    from speedstack.quant.checkpoint.files import checkpoint_directory
    from speedstack.runtime.model.loading import warn_if_not_decodable
    from speedstack.support.progress import counting_bar

    if is_drafter(checkpoint_directory(config.source)):
        _check_used(config, _MODEL_SETTINGS, "drafter")
        _convert_drafter(config)
        return
    _check_used(config, _DRAFTER_SETTINGS, "model")
    warn_if_not_decodable(read_config(config.source)[0])

    with counting_bar(f"to {config.to}", " tensors") as show:
        result = run(
            config.source,
            config.to,
            config.out,
            scale_rule=None if config.scale_rule == "auto" else config.scale_rule,
            linears=config.linears,
            lm_head=config.lm_head,
            max_shard_bytes=config.max_shard_bytes,
            on_progress=show,
        )
    print(
        f"{result.source_format} to {result.target_format}: {result.num_expert_weights} expert weights, "
        f"{result.num_other_tensors} other tensors"
    )
    print(f"written: {config.out}")


def _check_used(config: ConvertConfig, others: Sequence[str], kind: str) -> None:
    """Raise ValueError for a setting that this kind of source does not use."""
    for name in others:
        if getattr(config, name) != ConvertConfig.model_fields[name].default:
            raise ValueError(f"{config.source} is a {kind}, for which the setting {name} does nothing: leave it out")


def _convert_drafter(config: ConvertConfig) -> None:
    from speedstack.dflash.checkpoint import check_target, convert_drafter, load_config
    from speedstack.dflash.formats.format import Target
    from speedstack.quant.checkpoint import load_tensor, weights_sha256
    from speedstack.quant.checkpoint.config import read_config
    from speedstack.quant.checkpoint.files import checkpoint_directory

    target, taken_over = Target(), None
    if config.target is not None:
        target_config = read_config(checkpoint_directory(config.target))[0]
        text = target_config.get_text_config()
        drafter, sha256 = load_config(config.source), weights_sha256(config.target)
        check_target(drafter, None, text.hidden_size, text.num_hidden_layers, text.vocab_size)
        if drafter.target_sha256 not in (None, sha256):
            taken_over = sha256
            warnings.warn(
                f"{config.source} was trained for weights with SHA-256 {drafter.target_sha256[:12]}..., "
                f"{config.target} has {sha256[:12]}...: the result is for the latter. Its texts are the target's own "
                "either way; fewer of its proposals stand where the weights differ in more than their format",
                stacklevel=2,
            )
        names = tuple(target_config.architectures or ())
        target = Target(str(config.target), names, load_tensor(config.target, "lm_head.weight"))
    drafter = convert_drafter(config.source, config.to, config.out, target, taken_over)
    print(f"drafter of {drafter.num_hidden_layers} layers for blocks of {drafter.block_size}: to {config.to}")
    print(f"written: {config.out}")
