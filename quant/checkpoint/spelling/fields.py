"""Translates a whole config.json to transformers' keys and refuses what it would ignore."""

import re
from collections.abc import Mapping
from functools import cache

from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig

from speedstack.quant.checkpoint.spelling.families import HARD_WIRED, SAME, TRANSLATIONS, check_hard_wired
from speedstack.quant.checkpoint.spelling.keys import Fields, check_numbers, check_same, hint, own_keys, words
from speedstack.quant.checkpoint.spelling.rotary import OLD_ROPE_KEYS, check_rope

# Keys that do not affect what a model computes, despite their names.
_HARMLESS = {
    *("attn_implementation", "experts_implementation", "use_flash_attn", "flash_attention", "ep_size"),
    *("initializer_range", "router_aux_loss_coef", "aux_loss_alpha", "seq_aux", "output_router_logits"),
    *("router_jitter_noise", "max_window_layers", "initial_context_length", "attention_chunk_size"),
    # Multi-token-prediction heads, which decoding leaves out.
    *("num_nextn_predict_layers", "num_mtp_layers", "num_mtp_modules", "mtp_transformer_layers", "use_mtp"),
}
_COMPUTATIONAL = re.compile(
    "rope|rotary|theta|attn|attention|head|hidden|intermediate|layer|expert|rout|gate|topk|top_k|norm|eps|scal|bias|act"
    "|window|sink|vocab|embed|emb|dim|rank|lora|glu|mlp|ffn|moe|kv|qk|softcap|logit|position|group|shared|dense|tie|clip"
    "|residual|multiplier|temperature|parallel|hybrid|pattern|freq|conv|mamba|ssm|memory|recurr|sparse|index"
)
# Wrong sizes show in tensor shapes, except these.
_SIZE = re.compile(r"(?<!window)(?<!chunk)(?<!block)(?<!group)(?<!rotary)_(size|dim)$")
# Keys that matter when false: most classes without the key compute as if it were true.
_NEVER_OFF = {"norm_topk_prob"}
# Names for the number of routed experts, by family.
NUM_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts")


def transformers_fields(fields: Fields) -> Fields:
    """A parsed config.json with only transformers' keys, as far as they affect the computation.

    Raises ValueError, one line without a file name, for an unknown `model_type`, contradictory keys, values that the
    class does not compute, and keys that it would ignore.
    """
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(f"transformers knows no model_type {model_type!r}")
    config_class = CONFIG_MAPPING[model_type]
    fields = _with_text_part(fields, config_class)
    check_numbers(fields)
    check_hard_wired(fields, model_type)
    check_same(_dtypes(fields), "dtype", "torch_dtype")
    for first, second in (*SAME.get(model_type, ()), *config_class.attribute_map.items()):
        check_same(fields, first, second)
    if model_type in TRANSLATIONS:
        fields = TRANSLATIONS[model_type](fields)
    fields = _with_num_experts(fields, config_class)
    check_rope(fields, config_class)
    _check_known(fields, config_class)
    return fields


def _with_text_part(fields: Fields, config_class: type[PreTrainedConfig]) -> Fields:
    """The language-model part, in transformers' spelling, for families that nest it.

    Raises ValueError as `transformers_fields`, and for a rotary embedding outside the part, which nothing reads.
    """
    part, part_class = fields.get("text_config"), config_class.sub_configs.get("text_config")
    if part_class is None or not isinstance(part, Mapping):
        return fields
    for key in OLD_ROPE_KEYS:
        if fields.get(key) is not None and fields[key] != part.get(key):
            raise ValueError(f"{key} {fields[key]!r} stands beside text_config, where nothing reads it: move it there")
    named = {"model_type": getattr(part_class, "model_type", "")} | dict(part)
    if named["model_type"] not in CONFIG_MAPPING:
        return fields
    try:
        return fields | {"text_config": transformers_fields(named)}
    except ValueError as error:
        raise ValueError(f"text_config: {error}") from error


def _dtypes(fields: Fields) -> Fields:
    return {key: str(value).removeprefix("torch.") for key, value in fields.items() if "dtype" in key and value}


def _with_num_experts(fields: Fields, config_class: type[PreTrainedConfig]) -> Fields:
    """Renames the number of experts to the class's name for it."""
    names = own_keys(config_class)
    own = [name for name in NUM_EXPERTS if name in names]
    others = [name for name in NUM_EXPERTS if name not in names and fields.get(name) is not None]
    if not own or not others:
        return fields
    for other in others:
        for name in own:
            check_same(fields, name, other)
    value = fields[others[0]]
    kept = {key: entry for key, entry in fields.items() if key not in others}
    return kept if any(kept.get(name) is not None for name in own) else kept | {own[0]: value}


def _check_known(fields: Fields, config_class: type[PreTrainedConfig]) -> None:
    """Raises ValueError for a key that transformers' code for the family never mentions and that may matter."""
    own = own_keys(config_class)
    for key, value in fields.items():
        # False turns off something that the class does not have.
        if (
            value is None
            or (value is False and key not in _NEVER_OFF)
            or key.startswith("_")
            or key in own
            or key in _HARMLESS
            or key in OLD_ROPE_KEYS
        ):
            continue
        if key in HARD_WIRED.get(config_class.model_type, {}) or key in _generation_keys():
            continue
        if key in dict(SAME.get(config_class.model_type, ())).values() or key in words(config_class.__module__):
            continue
        near = hint(key, own | OLD_ROPE_KEYS)
        if _SIZE.search(key):
            near = hint(key, own - fields.keys())
            if not near:
                continue
        if near or _COMPUTATIONAL.search(key):
            raise ValueError(
                f"{config_class.__name__} of transformers does not read the key {key!r}{near}, which may change what "
                "the model computes: correct it, or remove it if it does not"
            )


@cache
def _generation_keys() -> frozenset[str]:
    """Generation settings, which older releases wrote into config.json."""
    return frozenset(GenerationConfig().to_dict())
