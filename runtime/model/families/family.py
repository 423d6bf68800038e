"""What a family says of itself, and what several of them read alike."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from speedstack.runtime.model.spec import LayerSpec, YarnSpec

COMMON_KEYS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_experts_per_tok",
)


@dataclass(frozen=True)
class Family:
    """A family that transformers has a class for.

    layers: reads its config; raises ValueError for a setting that is not computed.
    required_keys: without these a config.json alone does not say what the model is.
    num_experts_keys: one of them has to be there; which one depends on who wrote the file.
    """

    model_type: str
    layers: Callable[[Any], tuple[LayerSpec, ...]]
    required_keys: tuple[str, ...]
    num_experts_keys: tuple[str, ...]


def default_rope_theta(parameters: dict[str, Any], where: str) -> float:
    """The base of an ordinary rotary embedding. Raises ValueError for a stretched one."""
    if parameters.get("rope_type", "default") != "default":
        raise ValueError(f"rotary type {parameters['rope_type']!r} of {where} is not supported, only 'default' is")
    return float(parameters["rope_theta"])


def yarn_spec(parameters: dict[str, Any]) -> YarnSpec | None:
    """The stretch of a rotary embedding, None where there is none; defaults as in transformers."""
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        return None
    if kind != "yarn":
        raise ValueError(f"rotary type {kind!r} of attention is not supported, only 'default' and 'yarn' are")
    if parameters.get("mscale") or parameters.get("mscale_all_dim"):
        raise ValueError("mscale of a 'yarn' rotary embedding is not supported by the runtime")
    factor, magnitude = float(parameters["factor"]), parameters.get("attention_factor")
    if magnitude is None:
        magnitude = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return YarnSpec(
        factor=factor,
        original_length=parameters["original_max_position_embeddings"],
        beta_fast=float(parameters.get("beta_fast") or 32),
        beta_slow=float(parameters.get("beta_slow") or 1),
        truncate=parameters.get("truncate", True),
        magnitude=float(magnitude),
    )
