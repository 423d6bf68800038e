"""The format of transformers' MuseGlimmerAssistantModel (5.15 and later).

Only the fusion's names differ, and the window: transformers' includes keys exactly the window away, ours and others' do
not. Its config lacks vocabulary size and number of target layers; we write both as keys that transformers ignores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from speedstack.dflash.config import OPTIONS, DFlashConfig
from speedstack.dflash.formats.format import DrafterFormat, Target, Tensors
from speedstack.dflash.formats.reader import Reader

RENAMED = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}
MODEL_TYPE = "muse_glimmer_assistant"


def recognizes(raw: Mapping[str, Any]) -> bool:
    return raw.get("model_type") == MODEL_TYPE


def to_json(config: DFlashConfig, dtype: str, target: Target) -> dict[str, Any]:
    """The config.json as a dict. Raises ValueError for unsupported sliding windows."""
    raw: dict[str, Any] = {
        "architectures": ["MuseGlimmerAssistantModel"],
        "attention_dropout": 0.0,
        "block_size": config.block_size,
        "dtype": dtype,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "layer_types": list(config.layer_types or ["full_attention"] * config.num_hidden_layers),
        "mask_token_id": config.mask_token_id,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": MODEL_TYPE,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "num_target_layers": config.num_target_layers,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "target_layer_ids": list(config.target_layer_ids),
        "target_sha256": config.target_sha256,
        "vocab_size": config.vocab_size,
    }
    if config.sliding_window is not None:
        if config.sliding_is_causal:
            raise ValueError("transformers' drafter class has no windows that are causal within the block")
        if config.sliding_window < 2:
            raise ValueError("transformers' drafter class has no window of a single position")
        raw["sliding_window"] = config.sliding_window - 1
    return raw


def from_json(raw: Mapping[str, Any]) -> DFlashConfig:
    """Reads a config.json. Raises ValueError naming a missing or unsupported key."""
    read = Reader(raw)
    read.refuse_unknown_numerics()
    if not read.has("vocab_size"):
        raise ValueError("drafter config.json lacks vocab_size, as transformers writes it: add the target's")
    kinds = read.layer_types() or ["sliding_attention"] * read.integer("num_hidden_layers")
    slides = "sliding_attention" in kinds
    return DFlashConfig(
        **read.shapes(),
        target_layer_ids=read.integers("target_layer_ids"),
        num_target_layers=read.integer("num_target_layers") if read.has("num_target_layers") else None,
        layer_types=tuple(kinds),  # type: ignore[arg-type]
        sliding_window=read.integer("sliding_window") + 1 if slides else None,
        sliding_is_causal=not slides,
    )


def to_tensors(tensors: Tensors, config: DFlashConfig, target: Target) -> Tensors:
    return {RENAMED.get(name, name): tensor for name, tensor in tensors.items()}


def from_tensors(tensors: Tensors, config: DFlashConfig) -> Tensors:
    ours = {theirs: name for name, theirs in RENAMED.items()}
    return {ours.get(name, name): tensor for name, tensor in tensors.items()}


TRANSFORMERS = DrafterFormat(
    "transformers",
    "transformers' drafter class",
    frozenset(OPTIONS) - {"layer_types", "sliding_window", "sliding_is_causal"},
    recognizes,
    from_json,
    to_json,
    from_tensors,
    to_tensors,
)
