"""Values hard-wired in transformers' classes, and makers' spellings, by family."""

from collections.abc import Callable, Mapping
from typing import Any

from speedstack.quant.checkpoint.spelling.keys import Fields

# Hard-wired values: for each key, or each entry of it, the accepted values beside null.
HARD_WIRED: dict[str, dict[str, tuple[Any, ...]]] = {
    "deepseek_v2": {"scoring_func": ("softmax",), "moe_layer_freq": (1,), "norm_topk_prob": (False,)},
    "deepseek_v3": {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "moe_layer_freq": (1,)},
    "deepseek_v4": {
        "topk_method": ("noaux_tc",),
        "norm_topk_prob": (True,),
        "n_shared_experts": (1,),
        "num_key_value_heads": (1,),
        "attention_bias": (False,),
    },
    "glm4_moe": {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "moe_layer_freq": (1,)},
    "gpt_oss": {"partial_rotary_factor": (1,), "hidden_act": ("silu",), "norm_topk_prob": (True,)},
    "mimo_v2_flash": {
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
        "n_shared_experts": (0,),
        "add_swa_attention_sink_bias": (True,),
        "add_full_attention_sink_bias": (False,),
        "attention_projection_layout": ("split",),
        "moe_router_dtype": ("float32",),
        "rope_scaling": (),
    },
    "minimax_m2": {
        "scoring_func": ("sigmoid",),
        "norm_topk_prob": (True,),
        "use_qk_norm": (True,),
        "qk_norm_type": ("per_layer",),
        "use_routing_bias": (True,),
        "shared_intermediate_size": (0,),
        "shared_moe_mode": ("sigmoid",),
        "attn_type_list": (1,),
        "layernorm_full_attention_beta": (1,),
        "layernorm_linear_attention_beta": (1,),
        "layernorm_mlp_beta": (1,),
    },
    "mixtral": {"partial_rotary_factor": (1,), "norm_topk_prob": (True,)},
    "olmoe": {"partial_rotary_factor": (1,)},
    "qwen2_moe": {"partial_rotary_factor": (1,)},
    "qwen3_moe": {"partial_rotary_factor": (1,)},
}
# Pairs of keys: the second, if present, must equal the first.
SAME: dict[str, tuple[tuple[str, str], ...]] = {
    "gpt_oss": (("num_experts_per_tok", "experts_per_token"),),
    "mimo_v2_flash": (
        ("num_attention_heads", "swa_num_attention_heads"),
        ("head_dim", "swa_head_dim"),
        ("v_head_dim", "swa_v_head_dim"),
    ),
}


def check_hard_wired(fields: Fields, model_type: str) -> None:
    """Raises ValueError for a value that the family's class does not compute."""
    for key, values in HARD_WIRED.get(model_type, {}).items():
        value = fields.get(key)
        entries = value if isinstance(value, list) and value else [value]
        if value is not None and any(entry not in values for entry in entries):
            allowed = " or ".join([*map(repr, values), "null"])
            raise ValueError(f"{key} {value!r} is not what a {model_type} model computes here, which is {allowed}")


def _mimo_v2_flash(fields: Fields) -> Fields:
    """Translates the keys of MiMo's makers (those of their vLLM and SGLang files)."""
    found = dict(fields)

    def put(key: str, value: Any, source: str) -> None:
        if found.get(key) is not None and found[key] != value:
            raise ValueError(f"{key} {found[key]!r} and {source} contradict each other: correct one of the two")
        found[key] = value

    num_layers = found.get("num_hidden_layers")
    for source, key, names in (
        ("hybrid_layer_pattern", "layer_types", ("full_attention", "sliding_attention")),
        ("moe_layer_freq", "mlp_layer_types", ("dense", "sparse")),
    ):
        pattern = found.pop(source, None)
        if pattern is None:
            continue
        if not isinstance(pattern, list) or any(entry not in (0, 1) for entry in pattern):
            raise ValueError(f"{source} is no list of 0 and 1: {pattern!r}")
        if len(pattern) != num_layers:
            raise ValueError(f"{source} has {len(pattern)} entries, num_hidden_layers is {num_layers}")
        put(key, [names[int(entry)] for entry in pattern], source)
    rope = {key: found.pop(key, None) for key in ("rope_theta", "swa_rope_theta", "partial_rotary_factor")}
    if any(value is not None for value in rope.values()):
        _drop_flat_rope(found)
        lacking = [key for key, value in rope.items() if value is None]
        if lacking and found.get("rope_parameters") is None:
            raise ValueError(f"a rotary embedding needs {lacking[0]} beside the keys of it that are there")
        _mimo_rope(found, rope, put)
    epsilon = found.pop("layernorm_epsilon", None)
    if epsilon is not None:
        put("rms_norm_eps", epsilon, "layernorm_epsilon")
    # The makers' window leaves out the token itself; transformers ignores `sliding_window` beside it.
    before = found.pop("sliding_window_size", None)
    if before is not None:
        if not isinstance(before, int):
            raise ValueError(f"sliding_window_size is no integer: {before!r}")
        found["sliding_window"] = before + 1
    num_kv_heads, swa_num_kv_heads = found.get("num_key_value_heads"), found.pop("swa_num_key_value_heads", None)
    if swa_num_kv_heads is not None and isinstance(num_kv_heads, int) and swa_num_kv_heads != 2 * num_kv_heads:
        raise ValueError(
            f"swa_num_key_value_heads {swa_num_kv_heads} is not twice num_key_value_heads {num_kv_heads}, as "
            "transformers computes mimo_v2_flash"
        )
    return found


def _drop_flat_rope(found: Fields) -> None:
    """Removes one layer kind's rotary embedding, which older files have beside the makers' keys."""
    given = found.get("rope_parameters")
    if isinstance(given, Mapping) and not any(isinstance(part, Mapping) for part in given.values()):
        if given.get("rope_type", given.get("type", "default")) != "default":
            raise ValueError(f"rope_parameters {given!r} are not what a mimo_v2_flash model computes here")
        del found["rope_parameters"]


def _mimo_rope(found: Fields, rope: Fields, put: Callable[[str, Any, str], None]) -> None:
    """Three rotary keys as transformers' two, one per kind of layer."""
    given = found.get("rope_parameters")
    if given is not None:
        for layer_type, source in (("full_attention", "rope_theta"), ("sliding_attention", "swa_rope_theta")):
            part = given.get(layer_type) if isinstance(given, Mapping) else None
            theirs = part if isinstance(part, Mapping) else {}
            for key, value in (("rope_theta", rope[source]), ("partial_rotary_factor", rope["partial_rotary_factor"])):
                if value is not None and theirs.get(key) not in (None, value):
                    raise ValueError(f"{source} and rope_parameters.{layer_type} contradict each other: correct one")
        return
    parts = {
        layer_type: {
            "rope_type": "default",
            "rope_theta": rope[source],
            "partial_rotary_factor": rope["partial_rotary_factor"],
        }
        for layer_type, source in (("full_attention", "rope_theta"), ("sliding_attention", "swa_rope_theta"))
    }
    put("rope_parameters", parts, "rope_theta")


TRANSLATIONS: dict[str, Callable[[Fields], Fields]] = {"mimo_v2_flash": _mimo_v2_flash}
