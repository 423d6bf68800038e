"""z-lab's config.json, and the keys with which the same file holds what came after it.

A drafter without options is written exactly as z-lab publishes them (a Qwen3 config with `block_size` and
`dflash_config`), so that vLLM, SGLang and z-lab's own loader read it, and their checkpoints load here. One key is ours,
`target_sha256`: the SHA-256 of the target's weights the drafter was trained for. Other loaders ignore it.

Sliding windows and MiMo's options have keys that vLLM and SGLang know. Options that no DFlash loader knows (proposals
from the anchor's slot, a Markov head, a pruned vocabulary) change `architectures`, so that those loaders refuse the
directory where they would otherwise ignore a key and propose nonsense.

Left out, and refused rather than ignored: attention biases, scaled rotary embeddings, causal full-attention layers,
activations other than SiLU, and the DFlash2 heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from speedstack.dflash.config import DFlashConfig

ARCHITECTURE = "DFlashDraftModel"
# No loader but ours knows this one.
EXTENDED_ARCHITECTURE = "SpeedstackDFlashDraftModel"


def to_json(config: DFlashConfig, dtype: str) -> dict[str, Any]:
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
    if config.mask_embedding:
        nested["mask_embedding"] = True


def from_json(raw: Mapping[str, Any]) -> DFlashConfig:
    """Read a config.json of z-lab's, MiMo's or ours. ValueError names a key that is missing or not supported."""
    nested = raw.get("dflash_config") or {}
    if not isinstance(nested, Mapping):
        raise ValueError("drafter config.json: dflash_config must be an object")
    _refuse_unsupported(raw, nested)
    read = Reader(raw, nested)
    hidden_size, num_heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    return DFlashConfig(
        hidden_size=hidden_size,
        intermediate_size=read.integer("intermediate_size"),
        num_hidden_layers=read.integer("num_hidden_layers"),
        num_attention_heads=num_heads,
        num_key_value_heads=read.integer("num_key_value_heads"),
        head_dim=read.integer("head_dim", default=hidden_size // max(num_heads, 1)),
        vocab_size=read.integer("vocab_size"),
        mask_token_id=read.integer("mask_token_id"),
        target_layer_ids=read.integers("target_layer_ids"),
        num_target_layers=read.integer("num_target_layers"),
        block_size=read.integer("block_size"),
        rms_norm_eps=read.number("rms_norm_eps"),
        rope_theta=read.number("rope_theta"),
        max_position_embeddings=read.integer("max_position_embeddings"),
        target_sha256=raw.get("target_sha256"),
        sample_from_anchor=read.flag("sample_from_anchor"),
        markov_rank=read.integer("markov_rank", default=0),
        draft_vocab_size=read.integer("draft_vocab_size") if read.has("draft_vocab_size") else None,
        attention_sinks=read.flag("attention_sink_bias"),
        attention_value_scale=read.number("attention_value_scale", default=1.0),
        partial_rotary_factor=read.number("partial_rotary_factor", default=1.0),
        mask_embedding=read.flag("mask_embedding"),
        **_windows(read),
    )


class Reader:
    """Typed values of a config.json; a key is looked for in the first of `places` that has it. Errors name the key.

    Newer transformers keeps rotary settings in `rope_parameters` of any place; those are looked for last.
    """

    def __init__(self, raw: Mapping[str, Any], *nested: Mapping[str, Any]) -> None:
        places = (*nested, raw)
        self.places = (*places, *(place.get("rope_parameters") or {} for place in places))

    def has(self, name: str) -> bool:
        return any(place.get(name) is not None for place in self.places)

    def value(self, name: str, default: Any = None) -> Any:
        found = next((place[name] for place in self.places if place.get(name) is not None), default)
        if found is None:
            raise ValueError(f"drafter config.json lacks {name}")
        return found

    def integer(self, name: str, default: int | None = None) -> int:
        found = self.value(name, default)
        if isinstance(found, bool) or not isinstance(found, int):
            raise ValueError(f"drafter config.json: {name} must be an integer, got {found!r}")
        return found

    def number(self, name: str, default: float | None = None) -> float:
        found = self.value(name, default)
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise ValueError(f"drafter config.json: {name} must be a number, got {found!r}")
        return float(found)

    def flag(self, name: str) -> bool:
        found = self.value(name, False)
        if not isinstance(found, bool):
            raise ValueError(f"drafter config.json: {name} must be true or false, got {found!r}")
        return found

    def integers(self, name: str) -> tuple[int, ...]:
        found = self.value(name)
        if not isinstance(found, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in found):
            raise ValueError(f"drafter config.json: {name} must be a list of integers, got {found!r}")
        return tuple(found)


def _windows(read: Reader) -> dict[str, Any]:
    """Which layers slide, how far, and whether within the block they are causal.

    `layer_types` says which; with `use_swa` and none of them sliding, all of them do. Sliding layers are causal unless
    `is_causal` or `use_swa` says otherwise: vLLM's and SGLang's reading of these keys.
    """
    uses_swa, kinds = read.flag("use_swa"), read.value("layer_types", [])
    if not isinstance(kinds, list):
        raise ValueError(f"drafter config.json: layer_types must be a list, got {kinds!r}")
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
    """Raise ValueError when the config asks for something this implementation would silently compute otherwise."""
    rope = raw.get("rope_parameters") or {}
    kinds = raw.get("layer_types")
    full = (not isinstance(kinds, list) or set(kinds) != {"sliding_attention"}) and not nested.get("use_swa")
    known = {ARCHITECTURE, EXTENDED_ARCHITECTURE}
    unsupported = {
        "architectures": not known.intersection(raw.get("architectures") or []),
        "attention_bias": bool(raw.get("attention_bias")),
        "hidden_act": raw.get("hidden_act", "silu") != "silu",
        "rope_scaling": bool(raw.get("rope_scaling")),
        "rope_parameters": rope.get("rope_type", "default") != "default",
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
