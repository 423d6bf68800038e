"""A model's shape from its config.json alone, without weights, and without a class in transformers where there is none.

What transformers has a class for is read as everywhere (`quant.checkpoint.config`), but that keys without which the
shape is unknown are asked for: here no weights contradict what a class would put in their place. The MiMo models of
type `mimo_v2` (V2.5, V2.5-Pro) are read directly, with the names of their makers' configuration files.
"""

from pathlib import Path
from typing import Any

from speedstack.quant.checkpoint.config import config_from_fields, unquantized_fields
from speedstack.quant.checkpoint.files import CONFIG_FILE, read_json
from speedstack.quant.checkpoint.spelling import transformers_fields
from speedstack.runtime.model.spec import AttentionSpec, DenseSpec, LayerSpec, ModelSpec, MoeSpec, spec_from_config
from speedstack.runtime.model.weight_formats import WeightFormats, formats_from_fields

_COMMON = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_experts_per_tok",
)
_REQUIRED = {
    "gpt_oss": (*_COMMON, "head_dim", "intermediate_size"),
    "qwen3_moe": (*_COMMON, "moe_intermediate_size"),
    "mimo_v2_flash": (*_COMMON, "head_dim", "v_head_dim", "moe_intermediate_size", "intermediate_size"),
    "mimo_v2": (
        *_COMMON,
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
    ),
}
# What the plans of `mimo_v2` compute whatever its file says: of each key, the values that mean that, beside null.
_MIMO_HARD_WIRED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "attention_bias": (False,),
    "n_shared_experts": (0,),
    "n_group": (1,),
    "rope_scaling": (),
}
# Some number of experts has to be there; which key holds it depends on who wrote the file.
_NUM_EXPERTS = {
    "gpt_oss": ("num_local_experts", "num_experts"),
    "qwen3_moe": ("num_experts", "num_local_experts"),
    "mimo_v2_flash": ("n_routed_experts", "num_local_experts"),
    "mimo_v2": ("n_routed_experts",),
}


def read_model_config(path: Path) -> tuple[ModelSpec, WeightFormats]:
    """The shape and the weight formats that a model directory's config.json, or a JSON file itself, describes.

    Raises:
        ValueError: one line, for a missing or broken file, a family that the runtime does not know, missing keys, and a
            setting that it does not compute.
    """
    file = path if path.is_file() else path / CONFIG_FILE
    if not file.is_file():
        raise ValueError(f"there is no {CONFIG_FILE} at {path}: give a model directory or a config.json")
    fields = read_json(file)
    try:
        return spec_from_fields(fields), formats_from_fields(fields)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def spec_from_fields(fields: dict[str, Any]) -> ModelSpec:
    """The spec of a parsed config.json. Raises ValueError as `read_model_config`, without the file's name."""
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in _REQUIRED:
        known = ", ".join(sorted(_REQUIRED))
        raise ValueError(f"model type {model_type!r} is none that the runtime can plan for; it can for {known}")
    if model_type != "mimo_v2":  # of which transformers has no class
        fields = transformers_fields(unquantized_fields(fields))
    missing = [key for key in _REQUIRED[model_type] if fields.get(key) is None]
    if not any(fields.get(key) is not None for key in _NUM_EXPERTS[model_type]):
        missing.append(_NUM_EXPERTS[model_type][0])
    if missing:
        raise ValueError(f"a {model_type} configuration needs {', '.join(dict.fromkeys(missing))}")
    if model_type == "mimo_v2":
        try:
            spec = _mimo(fields)
        except (ArithmeticError, LookupError, TypeError) as error:
            raise ValueError(
                f"a field of this mimo_v2 configuration must be wrong: {type(error).__name__}: {error}"
            ) from error
    else:
        spec = spec_from_config(config_from_fields(fields))
    _check_sizes(spec)
    return spec


def _check_sizes(spec: ModelSpec) -> None:
    """Raises ValueError for sizes that no weights have: here none contradict them."""
    if not spec.layers:
        raise ValueError("the configuration has no layers")
    sizes: dict[str, Any] = {
        key: getattr(spec, key) for key in ("vocab_size", "hidden_size", "max_position_embeddings")
    }
    for layer in spec.layers:
        for part in (layer.attention, layer.mlp):
            counts = ("num_", "_dim", "_size", "top_k", "window")
            sizes |= {key: value for key, value in vars(part).items() if any(count in key for count in counts)}
        for key, value in sizes.items():
            is_count = isinstance(value, int) and not isinstance(value, bool) and value > 0
            if not is_count and not (key == "window" and value is None):
                raise ValueError(f"the configuration gives {key} {value!r}, which should be a whole number above 0")
        if layer.attention.num_heads % layer.attention.num_kv_heads:
            raise ValueError(
                f"{layer.attention.num_heads} attention heads are not shared evenly by "
                f"{layer.attention.num_kv_heads} key/value heads"
            )
        if isinstance(layer.mlp, MoeSpec) and layer.mlp.top_k > layer.mlp.num_experts:
            raise ValueError(f"{layer.mlp.top_k} experts a token are more than the {layer.mlp.num_experts} there are")


def _mimo(fields: dict[str, Any]) -> ModelSpec:
    """MiMo-V2.5 and V2.5-Pro by their makers' names (as in their vLLM and SGLang model files)."""
    for key, values in _MIMO_HARD_WIRED.items():
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
            # So many tokens before the token itself.
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
