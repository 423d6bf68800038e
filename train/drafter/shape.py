"""A drafter's shape, from the config and its target."""

from __future__ import annotations

from typing import Any

from speedstack.dflash.config import DFlashConfig, default_target_layer_ids
from speedstack.train.config.recipes import DrafterConfig

_MAX_LAYERS_ALL_TAPPED = 8


def draft_config(
    config: DrafterConfig, target_config: Any, tokenizer_mask_id: int | None, target_sha256: str
) -> DFlashConfig:
    """The drafter's shape for a target with the transformers config `target_config`.

    Raises ValueError without a mask token, or if windows, tapped layers or options do not fit the target.
    """
    section = config.drafter
    mask_token_id = tokenizer_mask_id if section.mask_token_id is None else section.mask_token_id
    if mask_token_id is None:
        raise ValueError("the target's tokenizer has no mask token: set drafter.mask_token_id to an unused id")
    if config.data.sequence_length > target_config.max_position_embeddings:
        raise ValueError(
            f"data.sequence_length {config.data.sequence_length} exceeds the {target_config.max_position_embeddings} "
            f"positions of {section.target}"
        )
    num_target_layers = target_config.num_hidden_layers
    layer_type = "full_attention" if section.sliding_window is None else "sliding_attention"
    return DFlashConfig(
        hidden_size=target_config.hidden_size,
        intermediate_size=section.intermediate_size,
        num_hidden_layers=section.num_layers,
        num_attention_heads=section.num_attention_heads,
        num_key_value_heads=section.num_key_value_heads,
        head_dim=section.head_dim,
        vocab_size=target_config.vocab_size,
        mask_token_id=mask_token_id,
        target_layer_ids=section.target_layer_ids or _default_layer_ids(num_target_layers),
        num_target_layers=num_target_layers,
        block_size=section.block_size,
        rope_theta=section.rope_theta,
        max_position_embeddings=target_config.max_position_embeddings,
        target_sha256=target_sha256,
        sample_from_anchor=section.sample_from_anchor,
        markov_rank=section.markov_rank,
        draft_vocab_size=section.draft_vocab_size,
        layer_types=(layer_type,) * section.num_layers,  # type: ignore[arg-type]
        sliding_window=section.sliding_window,
        sliding_is_causal=section.sliding_is_causal,
        attention_sinks=section.attention_sinks,
        attention_value_scale=section.attention_value_scale,
        partial_rotary_factor=section.partial_rotary_factor,
        mask_embedding=section.mask_embedding,
    )


def _default_layer_ids(num_target_layers: int) -> tuple[int, ...]:
    """All layers of a small target, whose features cost little; z-lab's five of a large one."""
    if num_target_layers <= _MAX_LAYERS_ALL_TAPPED:
        return tuple(range(num_target_layers))
    return default_target_layer_ids(num_target_layers, 5)
