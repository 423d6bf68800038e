"""MiMo-V2-Flash: sigmoid router with correction bias, sliding windows with sinks, partial RoPE, unequal head sizes."""

from typing import Any

from speedstack.runtime.model.families.family import COMMON_KEYS, Family, default_rope_theta
from speedstack.runtime.model.spec import AttentionSpec, DenseSpec, LayerSpec, MoeSpec


def _layers(config: Any) -> tuple[LayerSpec, ...]:
    if config.attention_bias:
        raise ValueError("attention_bias=True is not supported by the runtime for mimo_v2_flash")
    if config.n_group != 1:
        raise ValueError(f"expert groups (n_group={config.n_group}) are not supported by the runtime")
    layers = []
    for attention_type, mlp_type in zip(config.layer_types, config.mlp_layer_types, strict=True):
        is_sliding = attention_type == "sliding_attention"
        rope = config.rope_parameters[attention_type]
        attention = AttentionSpec(
            num_heads=config.num_attention_heads,
            # transformers hard-wires twice the key/value heads on sliding layers
            num_kv_heads=config.num_key_value_heads * (2 if is_sliding else 1),
            qk_head_dim=config.head_dim,
            v_head_dim=config.v_head_dim,
            rotary_dim=int(config.head_dim * rope.get("partial_rotary_factor", 0.334)),
            rope_theta=default_rope_theta(rope, attention_type),
            window=config.sliding_window if is_sliding else None,
            has_sinks=is_sliding,
            value_scale=1.0 if config.attention_value_scale is None else config.attention_value_scale,
        )
        mlp: DenseSpec | MoeSpec = DenseSpec(config.intermediate_size)
        if mlp_type == "sparse":
            mlp = MoeSpec(
                num_experts=config.n_routed_experts,
                top_k=config.num_experts_per_tok,
                intermediate_size=config.moe_intermediate_size,
                scoring="sigmoid",
                has_correction_bias=True,
                renormalize=config.norm_topk_prob,
                routed_scale=config.routed_scaling_factor,
            )
        layers.append(LayerSpec(attention, mlp))
    return tuple(layers)


MIMO_V2_FLASH = Family(
    "mimo_v2_flash",
    _layers,
    (*COMMON_KEYS, "head_dim", "v_head_dim", "moe_intermediate_size", "intermediate_size"),
    ("n_routed_experts", "num_local_experts"),
)
