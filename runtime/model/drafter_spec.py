"""A DFlash drafter's shapes, for plans and for backends with their own kernels.

A drafter has the target's kinds of layers, so that one set of phases and kernels serves both. Two things differ: rows
of a block attend to each other in both directions (`AttentionSpec.ahead`), and the context comes from the target's
hidden states.
"""

from dataclasses import dataclass

from speedstack.dflash.config import DFlashConfig
from speedstack.runtime.model.spec import AttentionSpec, DenseSpec, LayerSpec


@dataclass(frozen=True)
class DrafterSpec:
    """A drafter's layers, inputs and proposals.

    target_layer_ids: target layers whose concatenated outputs are the context.
    first_slot: block slot whose output is the first proposal: 0 if the anchor's output predicts the next token, else 1.
    """

    layers: tuple[LayerSpec, ...]
    target_layer_ids: tuple[int, ...]
    hidden_size: int
    rms_norm_eps: float
    mask_token_id: int
    first_slot: int
    num_proposals: int


def drafter_spec(config: DFlashConfig) -> DrafterSpec:
    """The shapes of a drafter with this configuration, without what `why_not_planned` names."""
    dense = DenseSpec(config.intermediate_size)
    return DrafterSpec(
        layers=tuple(LayerSpec(_attention(config, i), dense) for i in range(config.num_hidden_layers)),
        target_layer_ids=config.target_layer_ids,
        hidden_size=config.hidden_size,
        rms_norm_eps=config.rms_norm_eps,
        mask_token_id=config.mask_token_id,
        first_slot=0 if config.sample_from_anchor else 1,
        num_proposals=config.num_proposals,
    )


def why_not_planned(config: DFlashConfig) -> str | None:
    """The drafter's feature that plans do not support, in a few words; None if they support it."""
    if config.markov_rank:
        return "a Markov head, which drafts a token at a time"
    if config.draft_vocab_size is not None:
        return "a pruned vocabulary"
    return None


def _attention(config: DFlashConfig, layer: int) -> AttentionSpec:
    window = config.window(layer)
    ahead = config.block_size
    if window is not None:
        ahead = 0 if config.sliding_is_causal else window - 1
    return AttentionSpec(
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        qk_head_dim=config.head_dim,
        v_head_dim=config.head_dim,
        rotary_dim=config.rotary_dim,
        rope_theta=config.rope_theta,
        window=window,
        has_sinks=config.attention_sinks,
        has_qk_norm=True,
        value_scale=config.attention_value_scale,
        ahead=ahead,
    )
