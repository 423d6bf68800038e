"""Keys of a rotary embedding, in current and older spellings of transformers."""

import math
from collections.abc import Mapping

from transformers import PreTrainedConfig

from speedstack.quant.checkpoint.spelling.families import check_hard_wired
from speedstack.quant.checkpoint.spelling.keys import Fields, check_numbers, check_same, hint, words

_ROPE_KEYS = {
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"),
    *("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "low_freq_factor"),
    *("high_freq_factor", "short_factor", "long_factor", "mrope_section", "mrope_interleaved", "finetuned"),
}
# Keys that scale a rotary embedding, with the types that read them; transformers drops other spellings.
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
OLD_ROPE_KEYS = {"rope_theta", "rope_scaling", "partial_rotary_factor"}


def check_rope(fields: Fields, config_class: type[PreTrainedConfig]) -> None:
    """Raises ValueError for rotary keys that nothing reads, and for two that differ."""
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
            check_hard_wired(dict(part), model_type)
    check_same(fields, "rope_parameters", "rope_scaling")
    parameters = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    for key in ("rope_theta", "partial_rotary_factor"):
        if parameters.get(key) is not None and fields.get(key) not in (None, parameters[key]):
            raise ValueError(
                f"{key} {fields[key]!r} and {parameters[key]!r} of the rotary embedding contradict each other: correct "
                "one of the two"
            )
    _check_rotary_numbers(fields, "")


def _check_rotary_embedding(part: Fields, where: str, config_class: type[PreTrainedConfig]) -> None:
    """Checks the rotary embedding of one kind of layer."""
    check_numbers(part)
    check_same(part, "rope_type", "type")
    _check_rotary_numbers(part, f"{where}.")
    kind = part.get("rope_type") or part.get("type") or "default"
    for key, value in part.items():
        if key not in _ROPE_KEYS and key not in words(config_class.__module__):
            raise ValueError(f"{where} has the key {key!r}, which nothing reads{hint(key, _ROPE_KEYS)}")
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
