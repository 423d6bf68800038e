"""Qwen3-MoE: softmax router, QK-norm."""

from typing import Any

from speedstack.runtime.model.families.family import COMMON_KEYS, Family, yarn_spec
from speedstack.runtime.model.spec import AttentionSpec, DenseSpec, LayerSpec, MoeSpec


def _layers(config: Any) -> tuple[LayerSpec, ...]:
    if config.use_sliding_window:
        raise ValueError("use_sliding_window=True is not supported by the runtime for qwen3_moe")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = AttentionSpec(
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        qk_head_dim=head_dim,
        v_head_dim=head_dim,
        rotary_dim=head_dim,
        rope_theta=float(config.rope_parameters["rope_theta"]),
        has_qk_norm=True,
        has_bias=config.attention_bias,
        yarn=yarn_spec(config.rope_parameters),
    )
    moe = MoeSpec(
        num_experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        intermediate_size=config.moe_intermediate_size,
        scoring="softmax",
        has_correction_bias=False,
        renormalize=config.norm_topk_prob,
    )
    layers = []
    for index in range(config.num_hidden_layers):
        is_sparse = index not in config.mlp_only_layers and (index + 1) % config.decoder_sparse_step == 0
        layers.append(LayerSpec(attention, moe if is_sparse else DenseSpec(config.intermediate_size)))
    return tuple(layers)


QWEN3_MOE = Family("qwen3_moe", _layers, (*COMMON_KEYS, "moe_intermediate_size"), ("num_experts", "num_local_experts"))
