"""A directory's transformers config, from config.json and, for tied weights, the files.

All verbs, the engine, plans and training use it; `spelling` first translates the file's keys.
"""

import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from speedstack.quant.checkpoint.files import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, WeightFiles, read_json, weight_files
from speedstack.quant.checkpoint.formats import Codec, detect
from speedstack.quant.checkpoint.names import FAMILIES, HubNames
from speedstack.quant.checkpoint.spelling import NUM_EXPERTS, transformers_fields

# Exceptions of transformers for well-typed fields with impossible values.
BAD_FIELDS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def read_config(path: Path) -> tuple[PreTrainedConfig, type[Codec]]:
    """The config without quantization, and the directory's format. Raises ValueError.

    A stored head that differs from the embedding overrides `tie_word_embeddings`, with a warning, as in transformers.
    """
    fields = read_json(path / CONFIG_FILE)
    codec = detect(path, fields)
    try:
        config = config_from_fields(fields)
    except ValueError as error:
        raise ValueError(f"{path / CONFIG_FILE}: {error}") from error
    if config.tie_word_embeddings and _stores_another_head(path, config.model_type):
        warnings.warn(
            f"{path / CONFIG_FILE} says that the LM head is the embedding, and the files hold another one: it is read "
            "as untied; set tie_word_embeddings to false",
            stacklevel=2,
        )
        config.tie_word_embeddings = False
    return config, codec


def config_from_fields(fields: dict[str, Any]) -> PreTrainedConfig:
    """transformers' config of a parsed config.json, without quantization. Raises ValueError, one line without a file
    name, for one that transformers or we do not compute.
    """
    spelled = transformers_fields(unquantized_fields(fields))
    model_type = spelled["model_type"]
    try:
        config = CONFIG_MAPPING[model_type].from_dict(spelled)
    except (StrictDataclassError, *BAD_FIELDS) as error:
        raise ValueError(f"not a valid {model_type} configuration: {reason_of(error)}") from error
    _check_counts(config.get_text_config())
    _check_kinds_of_rope(config.get_text_config())
    return config


def _check_counts(config: PreTrainedConfig) -> None:
    """Raises ValueError for numbers that break the first forward or make it meaningless."""
    if config.is_heterogeneous:  # each layer has its own
        return

    def whole(name: str) -> int | None:
        value = getattr(config, name, None)
        return value if isinstance(value, int) else None

    num_layers = whole("num_hidden_layers")
    if num_layers is not None and num_layers < 1:
        raise ValueError(f"num_hidden_layers {num_layers} is no model: correct it")
    num_heads, num_kv_heads = whole("num_attention_heads"), whole("num_key_value_heads")
    if num_heads and num_kv_heads is not None and (num_kv_heads < 1 or num_heads % num_kv_heads):
        raise ValueError(
            f"num_attention_heads {num_heads} are not shared evenly by num_key_value_heads {num_kv_heads}: correct one"
        )
    window = getattr(config, "sliding_window", None)
    has_sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if has_sliding and hasattr(config, "sliding_window") and (not isinstance(window, int) or window < 1):
        raise ValueError(f"sliding_window {window!r} is no number of tokens, and layers have one: correct it")
    epsilon = getattr(config, "rms_norm_eps", None)
    if isinstance(epsilon, int | float) and epsilon < 0:
        raise ValueError(f"rms_norm_eps {epsilon} is below 0: correct it")
    _check_routing(next((count for count in map(whole, NUM_EXPERTS) if count is not None), None), whole)


def _check_routing(num_experts: int | None, whole: Callable[[str], int | None]) -> None:
    """Checks the numbers of a choice of experts, possibly within groups; `whole` gives the others by name."""
    top_k, num_groups, top_k_groups = whole("num_experts_per_tok"), whole("n_group"), whole("topk_group")
    if not num_experts or top_k is None:
        return
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"num_experts_per_tok {top_k} is no choice of {num_experts} experts: correct it")
    if num_groups is None or top_k_groups is None:
        return
    if num_groups < 1 or num_experts % num_groups or not 1 <= top_k_groups <= num_groups:
        raise ValueError(
            f"topk_group {top_k_groups} of n_group {num_groups} is no choice of groups of {num_experts} experts: "
            "correct them"
        )
    if top_k > top_k_groups * (num_experts // num_groups):
        raise ValueError(
            f"num_experts_per_tok {top_k} is more than the experts of topk_group {top_k_groups} of n_group "
            f"{num_groups}: correct it"
        )


def _check_kinds_of_rope(config: PreTrainedConfig) -> None:
    """Raises ValueError for per-layer-kind rotary embeddings that a class with one for all would drop."""
    given = getattr(config, "rope_parameters", None) or {}
    parts = [key for key, part in given.items() if isinstance(part, dict)]
    if parts and not config.nested_rope_parameter_keys(given):
        raise ValueError(
            f"rope_parameters.{parts[0]} is not read: a {config.model_type} model has one rotary embedding, whose keys "
            "stand in rope_parameters itself"
        )


def unquantized_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """config.json without its quantization fields."""
    return {key: value for key, value in fields.items() if key not in ("quantization_config", "expert_dtype")}


def build_skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The config's causal language model without weight memory. Raises ValueError if transformers cannot build it."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except BAD_FIELDS as error:
        raise ValueError(
            f"transformers makes no model of this {config.model_type} configuration, a field of {CONFIG_FILE} must be "
            f"wrong: {reason_of(error)}"
        ) from error


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """State-dict names that are tied to another tensor and not stored, with the stored name."""
    return dict(model._tied_weights_keys or {}) if model.config.tie_word_embeddings else {}


def reason_of(error: Exception) -> str:
    """A foreign exception as part of one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _stores_another_head(path: Path, model_type: str) -> bool:
    """Whether a directory's LM head differs from its embedding; False without weights."""
    if not any((path / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)):
        return False
    stamps = tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in weight_files(path))
    return _heads_differ(path, model_type, stamps)


@cache
def _heads_differ(path: Path, model_type: str, stamps: tuple[tuple[Path, int, int], ...]) -> bool:
    """`stamps`: cache key of the files."""
    names = FAMILIES.get(model_type, HubNames())
    with WeightFiles(path) as files:
        for each in (names, names.as_released()):
            head, embedding = each.of("lm_head.weight"), each.of("model.embed_tokens.weight")
            if head in files and embedding in files:
                if (files.shape(head), files.dtype(head)) != (files.shape(embedding), files.dtype(embedding)):
                    return True
                shape = files.shape(head)
                return not torch.equal(files.get(head, shape), files.get(embedding, shape))
    return False
