"""MiMo-V2.5 and V2.5-Pro with the names of their vLLM and SGLang files; transformers has no class.

Their steps can be planned; loading their weights is not implemented.
"""

from typing import Any

from speedstack.runtime.model.families.family import COMMON_KEYS
from speedstack.runtime.model.spec import AttentionSpec, DenseSpec, LayerSpec, ModelSpec, MoeSpec

MODEL_TYPE = "mimo_v2"
NUM_EXPERTS_KEYS: tuple[str, ...] = ("n_routed_experts",)
REQUIRED_KEYS: tuple[str, ...] = (
    *COMMON_KEYS,
    "head_dim",
    "v_head_dim",
    "moe_intermediate_size",
    "intermediate_size",
    "n_routed_experts",
    "hybrid_layer_pattern",
    "moe_layer_freq",
    "partial_rotary_factor",
    "rope_theta",
    "swa_rope_theta",
    "swa_num_attention_heads",
    "swa_num_key_value_heads",
    "swa_head_dim",
    "swa_v_head_dim",
)
# Settings fixed in the plans of `mimo_v2`: for each key, the accepted values beside null.
_HARD_WIRED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "attention_bias": (False,),
    "n_shared_experts": (0,),
    "n_group": (1,),
    "rope_scaling": (),
}


def mimo_v2_spec(fields: dict[str, Any]) -> ModelSpec:
    """The spec of a parsed config.json. Raises ValueError for unsupported settings."""
    for key, values in _HARD_WIRED.items():
        value = fields.get(key)
        if value is not None and value not in values:
            only = " or ".join([*map(repr, values), "null"])
            raise ValueError(f"{key} {value!r} of mimo_v2 is not supported, only {only} is")
    pattern, is_sparse = fields["hybrid_layer_pattern"], fields["moe_layer_freq"]
    num_layers = fields["num_hidden_layers"]
    if not len(pattern) == len(is_sparse) == num_layers:
        raise ValueError(
            f"hybrid_layer_pattern has {len(pattern)} entries and moe_layer_freq {len(is_sparse)}, not {num_layers}"
        )
    window = fields.get("sliding_window_size") or fields.get("sliding_window")
    if any(pattern) and not window:
        raise ValueError("a configuration with sliding layers needs sliding_window_size")

    def attention(is_sliding: bool) -> AttentionSpec:
        prefix = "swa_" if is_sliding else ""
        head_dim = fields[prefix + "head_dim"]
        scale = fields.get("attention_value_scale")
        has_sinks = fields.get(f"add_{'swa' if is_sliding else 'full'}_attention_sink_bias", is_sliding)
        return AttentionSpec(
            num_heads=fields[prefix + "num_attention_heads"],
            num_kv_heads=fields[prefix + "num_key_value_heads"],
            qk_head_dim=head_dim,
            v_head_dim=fields[prefix + "v_head_dim"],
            rotary_dim=int(head_dim * fields["partial_rotary_factor"]),
            rope_theta=float(fields[prefix + "rope_theta"]),
            # The file's window leaves out the token itself.
            window=int(window) + 1 if is_sliding and window else None,
            has_sinks=bool(has_sinks),
            value_scale=1.0 if scale is None else float(scale),
        )

    moe = MoeSpec(
        num_experts=fields["n_routed_experts"],
        top_k=fields["num_experts_per_tok"],
        intermediate_size=fields["moe_intermediate_size"],
        scoring="sigmoid",
        has_correction_bias=True,
        renormalize=bool(fields.get("norm_topk_prob", True)),
        routed_scale=float(fields.get("routed_scaling_factor") or 1.0),
    )
    dense = DenseSpec(fields["intermediate_size"])
    eos = fields.get("eos_token_id")
    return ModelSpec(
        model_type=fields["model_type"],
        vocab_size=fields["vocab_size"],
        hidden_size=fields["hidden_size"],
        rms_norm_eps=float(fields.get("layernorm_epsilon") or fields.get("rms_norm_eps") or 1e-5),
        max_position_embeddings=fields.get("max_position_embeddings") or 131072,
        eos_token_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
        layers=tuple(
            LayerSpec(attention(bool(sliding)), moe if sparse else dense)
            for sliding, sparse in zip(pattern, is_sparse, strict=True)
        ),
    )
