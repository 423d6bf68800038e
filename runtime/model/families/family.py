"""The description of a family, and config fields that several families share."""

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
    """A family with a class in transformers.

    layers: builds the layer specs; raises ValueError for an unsupported setting.
    required_keys: config.json keys that determine the shape.
    num_experts_keys: at least one is required; writers use different ones.
    """

    model_type: str
    layers: Callable[[Any], tuple[LayerSpec, ...]]
    required_keys: tuple[str, ...]
    num_experts_keys: tuple[str, ...]


def default_rope_theta(parameters: dict[str, Any], where: str) -> float:
    """The base of an unscaled rotary embedding. Raises ValueError for a scaled one."""
    if parameters.get("rope_type", "default") != "default":
        raise ValueError(f"rotary type {parameters['rope_type']!r} of {where} is not supported, only 'default' is")
    return float(parameters["rope_theta"])


def yarn_spec(parameters: dict[str, Any]) -> YarnSpec | None:
    """The YaRN scaling of a rotary embedding, None without one; defaults as in transformers."""
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
