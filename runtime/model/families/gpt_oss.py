"""gpt-oss: sinks on all layers, biases, YaRN, clamped SwiGLU."""

from typing import Any

from speedstack.runtime.model.families.family import COMMON_KEYS, Family, yarn_spec
from speedstack.runtime.model.spec import AttentionSpec, LayerSpec, MoeSpec


def _layers(config: Any) -> tuple[LayerSpec, ...]:
    rope = config.rope_parameters
    layers = []
    for attention_type in config.layer_types:
        attention = AttentionSpec(
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            qk_head_dim=config.head_dim,
            v_head_dim=config.head_dim,
            rotary_dim=config.head_dim,
            rope_theta=float(rope["rope_theta"]),
            window=config.sliding_window if attention_type == "sliding_attention" else None,
            has_sinks=True,
            has_bias=config.attention_bias,
            yarn=yarn_spec(rope),
        )
        moe = MoeSpec(
            num_experts=config.num_local_experts,
            top_k=config.num_experts_per_tok,
            intermediate_size=config.intermediate_size,
            # Softmax over the chosen logits equals softmax over all, renormalized over the chosen.
            scoring="softmax",
            has_correction_bias=False,
            renormalize=True,
            has_bias=True,
            # Values used by transformers releases whose config lacks these two fields.
            swiglu_limit=float(getattr(config, "swiglu_limit", 7.0)),
            swiglu_alpha=float(getattr(config, "swiglu_alpha", 1.702)),
        )
        layers.append(LayerSpec(attention, moe))
    return tuple(layers)


GPT_OSS = Family(
    "gpt_oss",
    _layers,
    (*COMMON_KEYS, "head_dim", "intermediate_size"),
    ("num_local_experts", "num_experts"),
)
