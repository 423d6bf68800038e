"""config.json in transformers' own spelling, from any spelling that makers, other loaders and older releases use.

transformers keeps a key that it does not know as an attribute that nothing reads, and computes with a default in its
place. So keys of a family's makers are translated here, keys that say the same thing twice must agree, values that
transformers' class has hard-wired must be those, and any other key that it does not read and that sounds like a part of
the computation is refused by name.
"""

import dataclasses
import math
import re
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig

from speedstack.support.near_miss import nearest

Fields = dict[str, Any]

# Keys that say nothing of what a model computes, though they sound like it.
_HARMLESS = {
    *("attn_implementation", "experts_implementation", "use_flash_attn", "flash_attention", "ep_size"),
    *("initializer_range", "router_aux_loss_coef", "aux_loss_alpha", "seq_aux", "output_router_logits"),
    *("router_jitter_noise", "max_window_layers", "initial_context_length", "attention_chunk_size"),
    # Heads for multi-token prediction, which decoding leaves out.
    *("num_nextn_predict_layers", "num_mtp_layers", "num_mtp_modules", "mtp_transformer_layers", "use_mtp"),
}
_COMPUTATIONAL = re.compile(
    "rope|rotary|theta|attn|attention|head|hidden|intermediate|layer|expert|rout|gate|topk|top_k|norm|eps|scal|bias|act"
    "|window|sink|vocab|embed|emb|dim|rank|lora|glu|mlp|ffn|moe|kv|qk|softcap|logit|position|group|shared|dense|tie|clip"
    "|residual|multiplier|temperature|parallel|hybrid|pattern|freq|conv|mamba|ssm|memory|recurr|sparse|index"
)
# A size that is wrong is seen in the shapes of the tensors, but for these.
_READ = re.compile(r"""\bconfig\.(\w+)|["'](\w+)["']""")
_SIZE = re.compile(r"(?<!window)(?<!chunk)(?<!block)(?<!group)(?<!rotary)_(size|dim)$")
# Keys that do something where they are false: most classes without the key do what true would mean.
_NEVER_OFF = {"norm_topk_prob"}
# The number of a layer's routed experts, by family.
NUM_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts")
_ROPE_KEYS = {
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"),
    *("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "low_freq_factor"),
    *("high_freq_factor", "short_factor", "long_factor", "mrope_section", "mrope_interleaved", "finetuned"),
}
# Keys of a rotary embedding that stretch it, with the types that read them; what others call these, transformers drops.
_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
_STRETCHING = {
    "factor": ("linear", "dynamic", "yarn", "longrope", "llama3"),
    "attention_factor": ("yarn", "longrope"),
    "short_factor": ("longrope",),
    "long_factor": ("longrope",),
    "low_freq_factor": ("llama3",),
    "high_freq_factor": ("llama3",),
}
# Keys that transformers moves into `rope_parameters`, whatever the family.
_OLD_ROPE_KEYS = {"rope_theta", "rope_scaling", "partial_rotary_factor"}
# What transformers' classes have hard-wired: of each key, or each entry of it, the values that mean that, beside null.
_HARD_WIRED: dict[str, dict[str, tuple[Any, ...]]] = {
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
# Keys of which the second, if it is there, must have the first one's value.
_SAME: dict[str, tuple[tuple[str, str], ...]] = {
    "gpt_oss": (("num_experts_per_tok", "experts_per_token"),),
    "mimo_v2_flash": (
        ("num_attention_heads", "swa_num_attention_heads"),
        ("head_dim", "swa_head_dim"),
        ("v_head_dim", "swa_v_head_dim"),
    ),
}


def transformers_fields(fields: Fields) -> Fields:
    """A parsed config.json with transformers' keys alone, as far as they decide what is computed.

    Raises ValueError, of one line without a file name, for a `model_type` that transformers does not know, keys that
    contradict each other, values that its class does not compute, and keys that it would ignore.
    """
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(f"transformers knows no model_type {model_type!r}")
    config_class = CONFIG_MAPPING[model_type]
    fields = _with_text_part(fields, config_class)
    _check_numbers(fields)
    _check_hard_wired(fields, model_type)
    _check_same(_dtypes(fields), "dtype", "torch_dtype")
    for first, second in (*_SAME.get(model_type, ()), *config_class.attribute_map.items()):
        _check_same(fields, first, second)
    if model_type in _TRANSLATIONS:
        fields = _TRANSLATIONS[model_type](fields)
    fields = _with_num_experts(fields, config_class)
    _check_rope(fields, config_class)
    _check_known(fields, config_class)
    return fields


def _with_text_part(fields: Fields, config_class: type[PreTrainedConfig]) -> Fields:
    """The part that is the language model, in transformers' spelling too, where a family has it as a part.

    Raises ValueError as `transformers_fields`, and for a rotary embedding beside the part, where nothing reads it.
    """
    part, part_class = fields.get("text_config"), config_class.sub_configs.get("text_config")
    if part_class is None or not isinstance(part, Mapping):
        return fields
    for key in _OLD_ROPE_KEYS:
        if fields.get(key) is not None and fields[key] != part.get(key):
            raise ValueError(f"{key} {fields[key]!r} stands beside text_config, where nothing reads it: move it there")
    named = {"model_type": getattr(part_class, "model_type", "")} | dict(part)
    if named["model_type"] not in CONFIG_MAPPING:
        return fields
    try:
        return fields | {"text_config": transformers_fields(named)}
    except ValueError as error:
        raise ValueError(f"text_config: {error}") from error


def _check_numbers(fields: Fields) -> None:
    """Raises ValueError for NaN and infinity, which JSON has not and Python reads all the same."""
    for key, value in fields.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key} is {value}: correct it")


def _dtypes(fields: Fields) -> Fields:
    return {key: str(value).removeprefix("torch.") for key, value in fields.items() if "dtype" in key and value}


def _check_hard_wired(fields: Fields, model_type: str) -> None:
    for key, values in _HARD_WIRED.get(model_type, {}).items():
        value = fields.get(key)
        entries = value if isinstance(value, list) and value else [value]
        if value is not None and any(entry not in values for entry in entries):
            allowed = " or ".join([*map(repr, values), "null"])
            raise ValueError(f"{key} {value!r} is not what a {model_type} model computes here, which is {allowed}")


def _check_same(fields: Fields, first: str, second: str) -> None:
    one, other = fields.get(first), fields.get(second)
    if one is not None and other is not None and one != other:
        raise ValueError(f"{first} {one!r} and {second} {other!r} contradict each other: correct one of the two")


def _with_num_experts(fields: Fields, config_class: type[PreTrainedConfig]) -> Fields:
    """The number of experts under the name that the family's class has, whichever of the usual three a file uses."""
    names = _own_keys(config_class)
    own = [name for name in NUM_EXPERTS if name in names]
    others = [name for name in NUM_EXPERTS if name not in names and fields.get(name) is not None]
    if not own or not others:
        return fields
    for other in others:
        for name in own:
            _check_same(fields, name, other)
    value = fields[others[0]]
    kept = {key: entry for key, entry in fields.items() if key not in others}
    return kept if any(kept.get(name) is not None for name in own) else kept | {own[0]: value}


def _check_rope(fields: Fields, config_class: type[PreTrainedConfig]) -> None:
    """Raises ValueError for keys of a rotary embedding that nothing reads, and for two that differ."""
    model_type = config_class.model_type
    for name in ("rope_parameters", "rope_scaling"):
        value = fields.get(name)
        if value is None:
            continue
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} is no object: {value!r}")
        nested = [(f"{name}.{key}", part) for key, part in value.items() if isinstance(part, Mapping)]
        flat = {key: part for key, part in value.items() if part is not None and not isinstance(part, Mapping)}
        if nested and flat:
            raise ValueError(f"{name} has {min(flat)!r} beside an object for each kind of layer: move it into these")
        for where, part in nested or [(name, value)]:
            _check_rotary_embedding(dict(part), where, config_class)
            _check_hard_wired(dict(part), model_type)
    _check_same(fields, "rope_parameters", "rope_scaling")
    parameters = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    for key in ("rope_theta", "partial_rotary_factor"):
        if parameters.get(key) is not None and fields.get(key) not in (None, parameters[key]):
            raise ValueError(
                f"{key} {fields[key]!r} and {parameters[key]!r} of the rotary embedding contradict each other: correct "
                "one of the two"
            )
    _check_rotary_numbers(fields, "")


def _check_rotary_embedding(part: Fields, where: str, config_class: type[PreTrainedConfig]) -> None:
    """Of one kind of layer."""
    _check_numbers(part)
    _check_same(part, "rope_type", "type")
    _check_rotary_numbers(part, f"{where}.")
    kind = part.get("rope_type") or part.get("type") or "default"
    for key, value in part.items():
        if key not in _ROPE_KEYS and key not in _words(config_class.__module__):
            raise ValueError(f"{where} has the key {key!r}, which nothing reads{_hint(key, _ROPE_KEYS)}")
        is_read = kind not in _ROPE_TYPES or kind in _STRETCHING.get(key, _ROPE_TYPES)
        if not is_read and value not in (None, 1):
            raise ValueError(
                f"{where} has {key} {value!r}, which a rotary embedding of type {kind!r} does not read: correct its "
                f"rope_type, or remove {key}"
            )


def _check_rotary_numbers(part: Fields, where: str) -> None:
    for key, largest in (("rope_theta", math.inf), ("partial_rotary_factor", 1), ("factor", math.inf)):
        value = part.get(key)
        if value is not None and (not isinstance(value, int | float) or not 0 < value <= largest):
            most = "" if largest == math.inf else f" and at most {largest}"
            raise ValueError(f"{where}{key} is {value!r} and should be a number above 0{most}: correct it")


def _check_known(fields: Fields, config_class: type[PreTrainedConfig]) -> None:
    """Raises ValueError for a key that transformers' code for the family never mentions and that may matter."""
    own = _own_keys(config_class)
    for key, value in fields.items():
        # False turns something off that the class does not have.
        if (
            value is None
            or (value is False and key not in _NEVER_OFF)
            or key.startswith("_")
            or key in own
            or key in _HARMLESS
            or key in _OLD_ROPE_KEYS
        ):
            continue
        if key in _HARD_WIRED.get(config_class.model_type, {}) or key in _generation_keys():
            continue
        if key in dict(_SAME.get(config_class.model_type, ())).values() or key in _words(config_class.__module__):
            continue
        near = _hint(key, own | _OLD_ROPE_KEYS)
        if _SIZE.search(key):
            near = _hint(key, own - fields.keys())
            if not near:
                continue
        if near or _COMPUTATIONAL.search(key):
            raise ValueError(
                f"{config_class.__name__} of transformers does not read the key {key!r}{near}, which may change what "
                "the model computes: correct it, or remove it if it does not"
            )


def _own_keys(config_class: type[PreTrainedConfig]) -> set[str]:
    """The keys that a family's class has a field for, under both names where it has two."""
    fields = {field.name for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    return fields | config_class.attribute_map.keys() | set(config_class.attribute_map.values())


def _hint(key: str, known: set[str]) -> str:
    return "".join(f" (did you mean '{near}'?)" for near in nearest(key, sorted(known), cutoff=0.8))


@cache
def _generation_keys() -> frozenset[str]:
    """Settings of generation, which older releases wrote into config.json."""
    return frozenset(GenerationConfig().to_dict())


@cache
def _words(module: str) -> frozenset[str]:
    """What the source of a family's configuration and model reads of a configuration, or has as a string.

    A key that is none of them is not read.
    """
    place = Path(str(sys.modules[module].__file__))
    model = place.with_name(place.name.replace("configuration_", "modeling_"))
    texts = [file.read_text("utf-8") for file in (place, model) if file.is_file()]
    # What a configuration derives from others, it saves.
    derived = re.findall(r"\bself\.(\w+) =", texts[0])
    return frozenset(derived).union(*(match for text in texts for match in _READ.findall(text)))


def _mimo_v2_flash(fields: Fields) -> Fields:
    """From the keys of MiMo's makers (those of their vLLM and SGLang model files)."""
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
    # So many tokens before the token itself; what `sliding_window` says beside it, transformers ignores.
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
    """Take away the rotary embedding of one kind of layer, which older files have beside the makers' keys."""
    given = found.get("rope_parameters")
    if isinstance(given, Mapping) and not any(isinstance(part, Mapping) for part in given.values()):
        if given.get("rope_type", given.get("type", "default")) != "default":
            raise ValueError(f"rope_parameters {given!r} are not what a mimo_v2_flash model computes here")
        del found["rope_parameters"]


def _mimo_rope(found: Fields, rope: Fields, put: Callable[[str, Any, str], None]) -> None:
    """Three keys of a rotary embedding as transformers' two, one for each kind of layer."""
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


_TRANSLATIONS: dict[str, Callable[[Fields], Fields]] = {"mimo_v2_flash": _mimo_v2_flash}
