"""The format of vLLM's `speculators`: `DFlashDraftModel`, and `DSparkDraftModel` for a Markov head.

Differences from z-lab's: layer ids are one higher (they count the embedding as the first hidden state); the shape is in
`transformer_layer_config`, a Qwen3 config; `speculators_config` tells vLLM how to serve it, with the target's name. A
pruned vocabulary has `d2t` (as ours), `t2d` (a mask over the target's vocabulary) and the target's LM-head rows. Other
target tensors, stored by older versions, are ignored.

In training, that library lets all slots of a sliding layer see the context from `anchor - sliding_window`. Served, here
and in vLLM, each slot has its own window.

Source: speculators 0.9, `models/dflash` and `models/dspark`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from speedstack.dflash.config import DFlashConfig
from speedstack.dflash.formats.format import DrafterFormat, Target, Tensors
from speedstack.dflash.formats.reader import Reader

# Target tensors that checkpoints may hold; serving takes the target's own.
_TARGETS_OWN = ("embed_tokens.weight", "lm_head.weight", "verifier_lm_head.weight", "verifier_norm.weight")
_VERSION = "0.9.0"


def recognizes(raw: Mapping[str, Any]) -> bool:
    return "speculators_model_type" in raw


def to_json(config: DFlashConfig, dtype: str, target: Target) -> dict[str, Any]:
    """The config.json as a dict. Warns if the target's last layer is tapped."""
    if config.num_target_layers is not None and config.num_target_layers - 1 in config.target_layer_ids:
        warnings.warn(
            "this drafter reads the output of the target's last layer; not every server of speculators' format hands "
            "that out, and some hand out the normed one",
            stacklevel=2,
        )
    algorithm, class_name = ("dspark", "DSparkDraftModel") if config.markov_rank else ("dflash", "DFlashDraftModel")
    raw: dict[str, Any] = {
        "architectures": [class_name],
        "aux_hidden_state_layer_ids": [layer + 1 for layer in config.target_layer_ids],
        "block_size": config.block_size,
        "draft_vocab_size": config.num_draft_tokens,
        "dtype": dtype,
        "mask_token_id": config.mask_token_id,
        "num_target_layers": config.num_target_layers,
        "sample_from_anchor": config.sample_from_anchor,
        "sliding_window_non_causal": not config.sliding_is_causal,
        "speculators_config": {
            "algorithm": algorithm,
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "accept_tolerance": 0.0,
                    "proposal_type": "greedy",
                    "speculative_tokens": config.num_proposals,
                    "verifier_accept_k": 1,
                }
            ],
            "verifier": {"architectures": list(target.architectures), "name_or_path": target.name},
        },
        "speculators_model_type": algorithm,
        "speculators_version": _VERSION,
        "target_hidden_size": None,
        "target_sha256": config.target_sha256,
        "tie_word_embeddings": False,
        "transformer_layer_config": _layer_config(config),
    }
    if config.markov_rank:
        raw |= {
            "markov_rank": config.markov_rank,
            "markov_head_type": "vanilla",
            "enable_confidence_head": False,
            "confidence_head_with_markov": False,
        }
    return raw


def _layer_config(config: DFlashConfig) -> dict[str, Any]:
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
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
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "sliding_window": config.sliding_window,
        "tie_word_embeddings": False,
        "use_sliding_window": config.layer_types is not None,
        "vocab_size": config.vocab_size,
    }


def from_json(raw: Mapping[str, Any]) -> DFlashConfig:
    """Reads a config.json. Raises ValueError naming a missing or unsupported key."""
    layer = raw.get("transformer_layer_config")
    if not isinstance(layer, Mapping):
        raise ValueError("drafter config.json lacks transformer_layer_config")
    read = Reader(raw, layer)
    read.refuse_unknown_numerics()
    kind = raw["speculators_model_type"]
    markov_rank = read.integer("markov_rank", default=256) if kind == "dspark" else 0
    refused = {
        "speculators_model_type": kind not in ("dflash", "dspark"),
        "markov_head_type": kind == "dspark" and raw.get("markov_head_type", "vanilla") != "vanilla",
        "target_hidden_size": raw.get("target_hidden_size") not in (None, read.integer("hidden_size")),
        "partial_rotary_factor": read.number("partial_rotary_factor", default=1.0) != 1.0,
    }
    for name, is_refused in refused.items():
        if is_refused:
            raise ValueError(f"drafter config.json: {name} = {read.value(name)!r} is not supported by this drafter")
    aux = read.integers("aux_hidden_state_layer_ids")
    if not all(i >= 1 for i in aux):
        raise ValueError(
            f"drafter config.json: aux_hidden_state_layer_ids {list(aux)} must be at least 1: 0 is the embedding, "
            "which is no layer's output"
        )
    kinds, vocab_size = read.layer_types(), read.integer("vocab_size")
    draft_vocab_size = read.integer("draft_vocab_size")
    # By default DSpark proposes from the anchor's slot, DFlash does not.
    from_anchor = read.flag("sample_from_anchor") if "sample_from_anchor" in raw else kind == "dspark"
    return DFlashConfig(
        **read.shapes(),
        target_layer_ids=tuple(i - 1 for i in aux),
        num_target_layers=read.integer("num_target_layers") if read.has("num_target_layers") else None,
        sample_from_anchor=from_anchor,
        markov_rank=markov_rank,
        draft_vocab_size=None if draft_vocab_size == vocab_size else draft_vocab_size,
        layer_types=tuple(kinds) or None,  # type: ignore[arg-type]
        sliding_window=read.integer("sliding_window") if "sliding_attention" in kinds else None,
        sliding_is_causal=not read.flag("sliding_window_non_causal"),
    )


def to_tensors(tensors: Tensors, config: DFlashConfig, target: Target) -> Tensors:
    """Adds the tensors of a pruned vocabulary. Raises ValueError without the target's LM head."""
    if config.draft_vocab_size is None:
        return tensors
    if target.head_VD is None:
        raise ValueError(
            "speculators' format stores the target's LM head beside a pruned vocabulary: name the target with --target"
        )
    ids_U = tensors["d2t"] + torch.arange(config.draft_vocab_size)
    is_drafted_V = torch.zeros(config.vocab_size, dtype=torch.bool)
    is_drafted_V[ids_U] = True
    head_UD = target.head_VD[ids_U].to("cpu", tensors["fc.weight"].dtype).contiguous()
    return tensors | {"t2d": is_drafted_V, "lm_head.weight": head_UD}


def from_tensors(tensors: Tensors, config: DFlashConfig) -> Tensors:
    """Drops the target's tensors and, with a warning, a confidence head. Raises ValueError if t2d contradicts d2t."""
    ours = {name: tensor for name, tensor in tensors.items() if name not in (*_TARGETS_OWN, "t2d")}
    if any(name.startswith("confidence_head.") for name in ours):
        warnings.warn("the drafter's confidence head is left out: nothing here uses one", stacklevel=2)
        ours = {name: tensor for name, tensor in ours.items() if not name.startswith("confidence_head.")}
    if config.draft_vocab_size is None:
        ours.pop("d2t", None)
    elif "t2d" in tensors and "d2t" in tensors:
        ids_U = tensors["d2t"] + torch.arange(len(tensors["d2t"]))
        if not torch.equal(tensors["t2d"].bool().nonzero()[:, 0], ids_U):
            raise ValueError("drafter's t2d and d2t name different tokens")
    return ours


SPECULATORS = DrafterFormat(
    "speculators",
    "speculators' format",
    frozenset({"attention_sinks", "attention_value_scale", "partial_rotary_factor", "mask_embedding"}),
    recognizes,
    from_json,
    to_json,
    from_tensors,
    to_tensors,
)
