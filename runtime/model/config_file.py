"""A model's shape from its config.json alone, without weights.

Types that transformers knows are read through `quant/checkpoint/config.py`, but keys that decide the shape must be
present: no weights contradict a wrong default here. `mimo_v2` (MiMo-V2.5, V2.5-Pro) has no class in transformers and is
read directly.
"""

from pathlib import Path
from typing import Any

from speedstack.quant.checkpoint.config import config_from_fields, unquantized_fields
from speedstack.quant.checkpoint.files import CONFIG_FILE, read_json
from speedstack.quant.checkpoint.spelling import transformers_fields
from speedstack.runtime.model.families import mimo_v2
from speedstack.runtime.model.families.registry import FAMILIES, spec_from_config
from speedstack.runtime.model.spec import ModelSpec, MoeSpec
from speedstack.runtime.model.weight_formats import WeightFormats, formats_from_fields


def read_model_config(path: Path) -> tuple[ModelSpec, WeightFormats]:
    """The shape and weight formats of a model directory's config.json, or of a JSON file.

    Raises:
        ValueError: one line, for a missing or broken file, an unknown family, missing keys, or an unsupported setting.
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
    """The spec of a parsed config.json. Raises ValueError as `read_model_config`, without the file name."""
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in (*FAMILIES, mimo_v2.MODEL_TYPE):
        known = ", ".join(sorted([*FAMILIES, mimo_v2.MODEL_TYPE]))
        raise ValueError(f"model type {model_type!r} is none that the runtime can plan for; it can for {known}")
    if model_type == mimo_v2.MODEL_TYPE:
        required, num_experts = mimo_v2.REQUIRED_KEYS, mimo_v2.NUM_EXPERTS_KEYS
    else:
        fields = transformers_fields(unquantized_fields(fields))
        required, num_experts = FAMILIES[model_type].required_keys, FAMILIES[model_type].num_experts_keys
    missing = [key for key in required if fields.get(key) is None]
    if not any(fields.get(key) is not None for key in num_experts):
        missing.append(num_experts[0])
    if missing:
        raise ValueError(f"a {model_type} configuration needs {', '.join(dict.fromkeys(missing))}")
    if model_type == mimo_v2.MODEL_TYPE:
        try:
            spec = mimo_v2.mimo_v2_spec(fields)
        except (ArithmeticError, LookupError, TypeError) as error:
            raise ValueError(
                f"a field of this mimo_v2 configuration must be wrong: {type(error).__name__}: {error}"
            ) from error
    else:
        spec = spec_from_config(config_from_fields(fields))
    _check_sizes(spec)
    return spec


def _check_sizes(spec: ModelSpec) -> None:
    """Raises ValueError for impossible sizes."""
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
