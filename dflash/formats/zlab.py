"""z-lab's format, MiMo's, and ours: one config.json with extra keys for later options.

Without options it is exactly z-lab's (a Qwen3 config with `block_size` and `dflash_config`), readable by vLLM, SGLang
and z-lab's loader. Our `target_sha256` key, the SHA-256 of the target's weights, is ignored by others.

Sliding windows and MiMo's options use keys of vLLM and SGLang; the mask embedding is stored where they expect it.
Options no DFlash loader knows (anchor-slot proposals, Markov head, pruned vocabulary) change `architectures`, so that
those loaders refuse the directory instead of proposing nonsense.

Refused: attention biases, scaled rotary embeddings, causal full-attention layers, activations other than SiLU, and the
DFlash2 heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from speedstack.dflash.config import OPTIONS, DFlashConfig
from speedstack.dflash.formats.format import DrafterFormat, Target, Tensors
from speedstack.dflash.formats.reader import Reader, mapping

ARCHITECTURE = "DFlashDraftModel"
NO_TARGET = Target()
# Only our loader knows this one.
EXTENDED_ARCHITECTURE = "SpeedstackDFlashDraftModel"


def to_json(config: DFlashConfig, dtype: str, target: Target = NO_TARGET) -> dict[str, Any]:
    """The config.json as a dict; `dtype` names the stored tensors' dtype, such as "bfloat16"."""
    windowed = config.layer_types is not None
    raw: dict[str, Any] = {
        "architectures": [EXTENDED_ARCHITECTURE if _is_extended(config) else ARCHITECTURE],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        "block_size": config.block_size,
        "dflash_config": {"mask_token_id": config.mask_token_id, "target_layer_ids": list(config.target_layer_ids)},
        "dtype": dtype,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "layer_types": list(config.layer_types or ["full_attention"] * config.num_hidden_layers),
        "max_position_embeddings": config.max_position_embeddings,
        "max_window_layers": config.num_hidden_layers,
        "model_type": "qwen3",
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "num_target_layers": config.num_target_layers,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "sliding_window": config.sliding_window,
        "target_sha256": config.target_sha256,
        "tie_word_embeddings": False,
        "use_sliding_window": windowed,
        "vocab_size": config.vocab_size,
    }
    _add_options(raw, config)
    return raw


def _is_extended(config: DFlashConfig) -> bool:
    return config.sample_from_anchor or config.markov_rank > 0 or config.draft_vocab_size is not None


def _add_options(raw: dict[str, Any], config: DFlashConfig) -> None:
    nested = raw["dflash_config"]
    if _is_extended(config):
        del raw["auto_map"]
    if config.sample_from_anchor:
        nested["sample_from_anchor"] = True
    if config.markov_rank:
        raw |= {"markov_rank": config.markov_rank, "markov_head_type": "vanilla"}
    if config.draft_vocab_size is not None:
        raw["draft_vocab_size"] = config.draft_vocab_size
    if config.layer_types is not None and not config.sliding_is_causal:
        # SGLang reads is_causal, vLLM and ModelOpt use_swa.
        raw["is_causal"] = False
        nested |= {"use_swa": True, "swa_window_size": config.sliding_window}
    if config.attention_sinks:
        nested["attention_sink_bias"] = True
    if config.attention_value_scale != 1.0:
        nested["attention_value_scale"] = config.attention_value_scale
    if config.partial_rotary_factor != 1.0:
        raw["partial_rotary_factor"] = config.partial_rotary_factor
        # SGLang takes the width from here; transformers moves the key above to where SGLang does not look.
        raw["rope_parameters"] = {
            "partial_rotary_factor": config.partial_rotary_factor,
            "rope_dim": config.rotary_dim,
            "rope_theta": config.rope_theta,
            "rope_type": "default",
        }
    if config.mask_embedding:
        nested["mask_embedding"] = True


def from_json(raw: Mapping[str, Any]) -> DFlashConfig:
    """Reads a config.json of z-lab's, MiMo's or ours. Raises ValueError naming a missing or unsupported key."""
    nested = mapping(raw, "dflash_config")
    _refuse_unsupported(raw, nested)
    read = Reader(raw, nested)
    read.refuse_unknown_numerics()
    return DFlashConfig(
        **read.shapes(),
        target_layer_ids=read.integers("target_layer_ids"),
        num_target_layers=read.integer("num_target_layers") if read.has("num_target_layers") else None,
        sample_from_anchor=read.flag("sample_from_anchor"),
        markov_rank=read.integer("markov_rank", default=0),
        draft_vocab_size=read.integer("draft_vocab_size") if read.has("draft_vocab_size") else None,
        attention_sinks=read.flag("attention_sink_bias"),
        attention_value_scale=read.number("attention_value_scale", default=1.0),
        partial_rotary_factor=_partial_rotary_factor(raw, nested),
        mask_embedding=read.flag("mask_embedding"),
        **_windows(read),
    )


def _partial_rotary_factor(raw: Mapping[str, Any], nested: Mapping[str, Any]) -> float:
    """The share of a head that rotates.

    A factor in `rope_parameters` may be a copy of the target's, which transformers' Qwen3 (z-lab's training) ignores
    and other loaders apply: it counts only beside a `rope_dim` and is refused without.
    """
    rope, read = mapping(raw, "rope_parameters"), Reader(raw, nested)
    if "rope_dim" not in rope:
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                "drafter config.json: rope_parameters has a partial_rotary_factor but no rope_dim, and loaders "
                "disagree on what that means; add the number of rotated dimensions a head as rope_dim"
            )
        return read.number("partial_rotary_factor", default=1.0)
    rotary_dim, head_dim = read.integer("rope_dim"), read.integer("head_dim")
    factor = read.number("partial_rotary_factor", default=1.0)
    return factor if int(head_dim * factor) == rotary_dim else rotary_dim / head_dim


def _windows(read: Reader) -> dict[str, Any]:
    """Sliding layers, window and causality within the block.

    `layer_types` names the sliding layers; with `use_swa` and none named, all slide. They are causal unless `is_causal`
    or `use_swa` says otherwise, as in vLLM and SGLang.
    """
    uses_swa, kinds = read.flag("use_swa"), read.layer_types()
    if uses_swa and "sliding_attention" not in kinds:
        kinds = ["sliding_attention"] * read.integer("num_hidden_layers")
    if "sliding_attention" not in kinds:
        return {"layer_types": tuple(kinds) or None}
    if not uses_swa and not read.flag("use_sliding_window"):
        raise ValueError("drafter config.json: layer_types has sliding_attention, but use_sliding_window is false")
    is_causal = read.flag("is_causal") if read.has("is_causal") else not uses_swa
    if is_causal and uses_swa:
        raise ValueError("drafter config.json: use_swa means windows that are not causal, but is_causal is true")
    return {
        "layer_types": tuple(kinds),
        "sliding_window": read.integer("swa_window_size" if read.has("swa_window_size") else "sliding_window"),
        "sliding_is_causal": is_causal,
    }


def _refuse_unsupported(raw: Mapping[str, Any], nested: Mapping[str, Any]) -> None:
    """Raises ValueError for settings that this implementation would compute differently."""
    kinds = raw.get("layer_types")
    all_slide = isinstance(kinds, list) and bool(kinds) and all(kind == "sliding_attention" for kind in kinds)
    full = not all_slide and not nested.get("use_swa")
    classes, known = raw.get("architectures"), {ARCHITECTURE, EXTENDED_ARCHITECTURE}
    unsupported = {
        "architectures": not (isinstance(classes, list) and known.intersection(map(str, classes))),
        "is_causal": full and bool(nested.get("is_causal", raw.get("is_causal", False))),
        "markov_head_type": raw.get("markov_head_type", "vanilla") != "vanilla",
        "enable_confidence_head": bool(raw.get("enable_confidence_head")),
        "projector_type": bool(nested.get("projector_type", raw.get("projector_type"))),
        "input_embedding_scale": nested.get("input_embedding_scale", 1.0) != 1.0,
        "output_multiplier": nested.get("output_multiplier", 1.0) != 1.0,
        "final_logit_softcapping": bool(nested.get("final_logit_softcapping")),
    }
    for name, refused in unsupported.items():
        if refused:
            found = nested.get(name, raw.get(name))
            raise ValueError(f"drafter config.json: {name} = {found!r} is not supported by this drafter")


def recognizes(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json belongs to this family, supported or not."""
    return "dflash_config" in raw or "DFlash" in str(raw.get("architectures"))


def _same_tensors(tensors: Tensors, config: DFlashConfig, target: Target = NO_TARGET) -> Tensors:
    return tensors


_BEYOND_DFLASH = frozenset({"sample_from_anchor", "markov_rank", "draft_vocab_size"})
_WINDOWS = frozenset({"layer_types", "sliding_window", "sliding_is_causal"})


def _format(name: str, title: str, lacks: frozenset[str]) -> DrafterFormat:
    return DrafterFormat(name, title, lacks, recognizes, from_json, to_json, _same_tensors, _same_tensors)


SPEEDSTACK = _format("speedstack", "speedstack's format", frozenset())
ZLAB = _format("zlab", "z-lab's format", frozenset(OPTIONS) - _WINDOWS)
MIMO = _format("mimo", "the format of MiMo's drafters", _BEYOND_DFLASH)
