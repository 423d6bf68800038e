"""A whole config.json: what transformers reads of it, in its own keys, and a refusal of what it would ignore."""

import re
from collections.abc import Mapping
from functools import cache

from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig

from speedstack.quant.checkpoint.spelling.families import HARD_WIRED, SAME, TRANSLATIONS, check_hard_wired
from speedstack.quant.checkpoint.spelling.keys import Fields, check_numbers, check_same, hint, own_keys, words
from speedstack.quant.checkpoint.spelling.rotary import OLD_ROPE_KEYS, check_rope

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
_SIZE = re.compile(r"(?<!window)(?<!chunk)(?<!block)(?<!group)(?<!rotary)_(size|dim)$")
# Keys that do something where they are false: most classes without the key do what true would mean.
_NEVER_OFF = {"norm_topk_prob"}
# The number of a layer's routed experts, by family.
NUM_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts")


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
    """The part that is the language model, in transformers' spelling too, where a family has it as a part.

    Raises ValueError as `transformers_fields`, and for a rotary embedding beside the part, where nothing reads it.
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
    """The number of experts under the name that the family's class has, whichever of the usual three a file uses."""
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
        # False turns something off that the class does not have.
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
    """Settings of generation, which older releases wrote into config.json."""
    return frozenset(GenerationConfig().to_dict())
