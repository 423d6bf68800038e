"""The DFlash drafter network: z-lab's architecture, names and numerics, in plain PyTorch.

In one forward, a drafter reads the target's hidden states ("features") of all committed positions and fills a block of
masked positions. Features enter as keys and values only: fused once, `hidden_norm(fc(features))`, then projected in
every layer by the block's k_proj and v_proj. They see no input_layernorm and no MLP, so context keys and values never
change.

Training and serving share `embed_block`, `decode` and `logits`: training passes many blocks and masks, serving one
block and the prefix's keys and values. This file is the oracle for faster implementations and keeps no state. Embedding
and LM head are the target's.

Options add tensors: `layers.i.self_attn.attention_sink_bias` and `mask_embedding` (MiMo), `markov_head.markov_w1` and
`.markov_w2` (DSpark), and `d2t` (EAGLE-3): the target's id of draft token i is i + d2t[i].

Sources: DFlash (z-lab), reference `DFlashDraftModel`; Qwen3 layers with QK-norm; DSpark (DeepSpec), section on the
Markov head, here first-order without gate; XiaomiMiMo's drafters.

Shape suffixes: B windows, T context positions, Q queries (block positions, several blocks in a row), S = T + Q keys, C
= taps * D features, D hidden, N query heads, G key/value heads, H head dim, K block size, V vocabulary of the target, U
vocabulary of the proposals (V unless pruned).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speedstack.dflash.attention import attend, in_window, rotary_tables, rotate
from speedstack.dflash.config import DFlashConfig

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    Mask = Tensor | BlockMask | None

ContextKV = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """Root-mean-square norm of the last axis: float32 statistics, weight applied in the input's dtype (Qwen3)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class DFlashAttention(nn.Module):
    """Block queries over context keys, then block keys. The mask decides what is visible."""

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.value_scale = config.attention_value_scale
        width, kv_width = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.attention_sink_bias: nn.Parameter | None = None
        if config.attention_sinks:
            self.attention_sink_bias = nn.Parameter(torch.zeros(config.num_attention_heads))

    def keys_values(self, x_BTD: Tensor, tables: tuple[Tensor, Tensor]) -> ContextKV:
        """Rotated keys and values [B, T, G, H] of context features or normed block states."""
        k_BTGH = self.k_norm(self.k_proj(x_BTD).unflatten(-1, (-1, self.head_dim)))
        v_BTGH = self.v_proj(x_BTD).unflatten(-1, (-1, self.head_dim))
        if self.value_scale != 1.0:
            v_BTGH = v_BTGH * self.value_scale
        return rotate(k_BTGH, tables), v_BTGH

    def forward(
        self,
        x_BQD: Tensor,
        tables: tuple[Tensor, Tensor],
        context: ContextKV,
        mask: Mask,
    ) -> Tensor:
        q_BQNH = rotate(self.q_norm(self.q_proj(x_BQD).unflatten(-1, (-1, self.head_dim))), tables)
        block = self.keys_values(x_BQD, tables)
        k_BGSH, v_BGSH = (torch.cat(pair, dim=1).transpose(1, 2) for pair in zip(context, block, strict=True))
        out_BNQH = attend(q_BQNH.transpose(1, 2), k_BGSH, v_BGSH, mask, self.attention_sink_bias)
        return self.o_proj(out_BNQH.transpose(1, 2).flatten(2))


class DFlashMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BQD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BQD)) * self.up_proj(x_BQD))


class DFlashDecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each with a residual connection."""

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        self.self_attn = DFlashAttention(config)
        self.mlp = DFlashMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x_BQD: Tensor,
        tables: tuple[Tensor, Tensor],
        context: ContextKV,
        mask: Mask,
    ) -> Tensor:
        x_BQD = x_BQD + self.self_attn(self.input_layernorm(x_BQD), tables, context, mask)
        return x_BQD + self.mlp(self.post_attention_layernorm(x_BQD))


class MarkovHead(nn.Module):
    """Corrects a proposal's logits by the previous token: `markov_w1[previous] @ markov_w2.T`.

    Source: DSpark's vanilla Markov head: an embedding [V, rank] and a linear map to U logits.
    """

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        self.markov_w1 = nn.Embedding(config.vocab_size, config.markov_rank)
        self.markov_w2 = nn.Linear(config.markov_rank, config.num_draft_tokens, bias=False)

    def forward(self, previous_ids: Tensor) -> Tensor:
        return self.markov_w2(self.markov_w1(previous_ids))


class DFlashDraftModel(nn.Module):
    """The drafter. State-dict names are z-lab's: fc, hidden_norm, norm, layers.i.*; options add their own."""

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(config.num_taps * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layers = nn.ModuleList(DFlashDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mask_embedding: nn.Parameter | None = None
        if config.mask_embedding:
            self.mask_embedding = nn.Parameter(torch.zeros(config.hidden_size))
        self.markov_head = MarkovHead(config) if config.markov_rank else None
        self.d2t: Tensor | None
        self.register_buffer("d2t", None)
        if config.draft_vocab_size is not None:
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))

    def init_weights(self, seed: int) -> None:
        """Random weights from `seed` alone: norms one, matrices N(0, 1 / (4 fan_in)).

        Matrices that write to the residual stream are smaller by sqrt(2 * layers), so that its width starts equal in
        all layers. Sinks and the Markov head's second matrix are zero, which makes that head start without effect. The
        mask embedding is N(0, 0.02); see `init_mask_embedding`.
        """
        generator = torch.Generator().manual_seed(seed)
        residual_scale = (2 * self.config.num_hidden_layers) ** -0.5
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith(("attention_sink_bias", "markov_w2.weight", "mask_embedding")):
                    parameter.zero_()
                    continue
                if parameter.dim() == 1:
                    parameter.fill_(1.0)
                    continue
                std = 0.5 * parameter.shape[1] ** -0.5
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std *= residual_scale
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            if self.mask_embedding is not None:
                # Last, so that options do not change the other weights.
                self.mask_embedding.copy_(torch.randn(self.mask_embedding.shape, generator=generator) * 0.02)

    @torch.no_grad()
    def init_mask_embedding(self, embedding_VD: Tensor) -> None:
        """Starts the drafter's mask embedding from the target's row."""
        assert self.mask_embedding is not None, "config.mask_embedding is off"
        self.mask_embedding.copy_(embedding_VD[self.config.mask_token_id])

    @torch.no_grad()
    def set_draft_vocab(self, target_ids_U: Tensor) -> None:
        """Sets the target tokens that may be proposed, int64 [U]. Raises ValueError unless ascending and distinct."""
        config = self.config
        ids_U = target_ids_U.to(torch.int64)
        if self.d2t is None or ids_U.shape != (config.draft_vocab_size,):
            raise ValueError(f"{tuple(ids_U.shape)} draft tokens for a draft_vocab_size of {config.draft_vocab_size}")
        check_draft_ids(ids_U, config.vocab_size)
        self.d2t.copy_(ids_U - torch.arange(len(ids_U), device=ids_U.device))

    @property
    def hidden_slots(self) -> slice:
        """The block slots with proposals: all, or all but the anchor's."""
        return slice(0 if self.config.sample_from_anchor else 1, None)

    def embed_block(self, ids: Tensor, embedding_VD: Tensor) -> Tensor:
        """Inputs [..., K, D] of blocks with token ids [..., K]: the anchor's token, then mask tokens.

        The drafter's mask embedding replaces the target's row wherever the id is the mask token's, also in the anchor's
        slot, as in SGLang and vLLM.
        """
        embeds = F.embedding(ids, embedding_VD)
        if self.mask_embedding is None:
            return embeds
        return torch.where((ids == self.config.mask_token_id)[..., None], self.mask_embedding.to(embeds.dtype), embeds)

    def draft_head(self, head_VD: Tensor) -> Tensor:
        """Rows [U, D] of the target's LM head for proposals; with a pruned vocabulary a copy, to be made once."""
        if self.d2t is None or head_VD.shape[0] == self.config.num_draft_tokens:
            return head_VD
        return head_VD[self.target_ids(torch.arange(len(self.d2t), device=head_VD.device))]

    def logits(self, hidden: Tensor, previous_ids: Tensor | None, head_VD: Tensor) -> Tensor:
        """Float32 logits [..., U] of proposals, from hidden states [..., D] of proposal slots.

        `head_VD`: the target's LM head or its `draft_head`; the product runs in its dtype. `previous_ids` [...]: the
        token before each proposal, target ids: labels in training, drafts in serving. A Markov head raises ValueError
        for None.
        """
        return self.corrected(self.base_logits(hidden, head_VD), previous_ids)

    def base_logits(self, hidden: Tensor, head_VD: Tensor) -> Tensor:
        """`logits` without the Markov correction, for all slots at once."""
        return F.linear(hidden.to(head_VD.dtype), self.draft_head(head_VD)).float()

    def corrected(self, base_logits: Tensor, previous_ids: Tensor | None) -> Tensor:
        """`logits` from `base_logits` [..., U] and the previous tokens [...]."""
        if self.markov_head is None:
            return base_logits
        if previous_ids is None:
            raise ValueError("a drafter with a Markov head needs the token before each proposal: pass previous_ids")
        return base_logits + self.markov_head(previous_ids).float()

    def target_ids(self, draft_ids: Tensor) -> Tensor:
        """Target ids of draft-vocabulary ids, any shape."""
        return draft_ids if self.d2t is None else draft_ids + self.d2t[draft_ids]

    def draft_ids(self, target_ids: Tensor) -> Tensor:
        """Draft-vocabulary ids of target ids, any shape; -1 for tokens that cannot be proposed."""
        if self.d2t is None:
            return target_ids
        known_U = self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)
        places = torch.searchsorted(known_U, target_ids.contiguous()).clamp(max=len(known_U) - 1)
        return torch.where(known_U[places] == target_ids, places, -1)

    def fuse(self, features_BTC: Tensor) -> Tensor:
        """Context [..., T, D] from tapped hidden states, concatenated in the order of `target_layer_ids`.

        Raises ValueError if the last axis is not taps * hidden size.
        """
        if features_BTC.shape[-1] != self.fc.in_features:
            raise ValueError(
                f"features have {features_BTC.shape[-1]} columns, the drafter reads {self.config.num_taps} layers of "
                f"{self.config.hidden_size}: was it trained for another target?"
            )
        return self.hidden_norm(self.fc(features_BTC))

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Rotary cosines and sines [..., R] of absolute positions [...]."""
        return rotary_tables(positions, self.config.rotary_dim, self.config.rope_theta, dtype)

    def context_kv(self, layer: int, context_BTD: Tensor, positions_T: Tensor) -> ContextKV:
        """Rotated keys and values [..., T, G, H] in layer `layer` of fused context [..., T, D] at `positions_T`."""
        attention = self.layers[layer].self_attn
        assert isinstance(attention, DFlashAttention)
        return attention.keys_values(context_BTD, self.rotary(positions_T, context_BTD.dtype))

    def decode(
        self,
        embeds_BQD: Tensor,
        positions_BQ: Tensor,
        contexts: Sequence[ContextKV],
        masks: Mask | Sequence[Mask],
    ) -> Tensor:
        """Final-normed hidden states [B, Q, D] of block positions.

        `contexts`: keys and values [B, T, G, H] per layer. `masks`: visibility of the T context and Q block keys, bool
        [B, 1, Q, T + Q] or BlockMask, None for all; one for all layers or a list. Raises ValueError for a single mask
        with sliding windows.
        """
        if isinstance(masks, Tensor) or not isinstance(masks, Sequence):
            if self.config.layer_types is not None:
                raise ValueError("a drafter with sliding windows needs a mask a layer; see dflash.block.layer_masks")
            masks = [masks] * len(self.layers)
        tables = self.rotary(positions_BQ, embeds_BQD.dtype)
        x_BQD = embeds_BQD
        for layer, context, mask in zip(self.layers, contexts, masks, strict=True):
            x_BQD = layer(x_BQD, tables, context, mask)
        return self.norm(x_BQD)

    def forward(
        self,
        features_BTC: Tensor,
        positions_BT: Tensor,
        embeds_BQD: Tensor,
        block_positions_BQ: Tensor,
        masks: Mask | Sequence[Mask],
    ) -> Tensor:
        """Training: all blocks of all windows in one pass; shapes and masks as in `decode`."""
        context_BTD = self.fuse(features_BTC)
        contexts = [self.context_kv(i, context_BTD, positions_BT) for i in range(len(self.layers))]
        return self.decode(embeds_BQD, block_positions_BQ, contexts, masks)


class DraftContext:
    """One sequence's context keys and values by position, for serving.

    Buffers keys, values: [L, max_length, G, H]. Positions may be written in any order and rewritten after a rejection;
    `draft_hidden` reads only positions below the anchor.
    """

    def __init__(
        self, model: DFlashDraftModel, max_length: int, keys_values: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """keys_values: shared buffers that others may write too; None allocates them."""
        if keys_values is not None:
            self.keys_LTGH, self.values_LTGH = keys_values
            return
        config = model.config
        shape = (config.num_hidden_layers, max_length, config.num_key_value_heads, config.head_dim)
        self.keys_LTGH = model.fc.weight.new_zeros(shape)
        self.values_LTGH = model.fc.weight.new_zeros(shape)

    @torch.no_grad()
    def write(self, model: DFlashDraftModel, features_TC: Tensor, start: int) -> None:
        """Stores features of positions start .. start + T - 1. Raises ValueError if the buffer is too short."""
        end = start + features_TC.shape[0]
        if start < 0 or end > self.keys_LTGH.shape[1]:
            raise ValueError(f"positions {start}..{end - 1} do not fit a context of {self.keys_LTGH.shape[1]}")
        context_TD = model.fuse(features_TC)
        positions_T = torch.arange(start, end, device=features_TC.device)
        for i in range(model.config.num_hidden_layers):
            self.keys_LTGH[i, start:end], self.values_LTGH[i, start:end] = model.context_kv(i, context_TD, positions_T)

    @torch.no_grad()
    def draft_hidden(self, model: DFlashDraftModel, embeds_KD: Tensor, anchor: int) -> Tensor:
        """Hidden states of the proposal slots, [K, D], or [K - 1, D] if the anchor's slot predicts nothing.

        `embeds_KD`: `embed_block` of [anchor token, mask, ..., mask]; `anchor`: its position.
        """
        positions_K = torch.arange(anchor, anchor + embeds_KD.shape[0], device=embeds_KD.device)
        contexts, masks = [], []
        for layer, (keys, values) in enumerate(zip(self.keys_LTGH, self.values_LTGH, strict=True)):
            window = model.config.window(layer)
            first = 0 if window is None else max(0, anchor - window + 1)
            contexts.append((keys[None, first:anchor], values[None, first:anchor]))
            masks.append(None if window is None else _block_window(positions_K, first, model.config, window))
        return model.decode(embeds_KD[None], positions_K[None], contexts, masks)[0, model.hidden_slots]


def _block_window(positions_K: Tensor, first: int, config: DFlashConfig, window: int) -> Tensor:
    """What a block at `positions_K` sees of the keys from position `first` to its end, bool [1, 1, K, S]."""
    keys_S = torch.arange(first, int(positions_K[-1]) + 1, device=positions_K.device)
    return in_window(positions_K[:, None], keys_S, window, config.sliding_is_causal)[None, None]


def check_draft_ids(target_ids_U: Tensor, vocab_size: int) -> None:
    """Raises ValueError unless the draft ids are ascending, distinct and in the target's vocabulary."""
    ids_U = target_ids_U
    if not bool((ids_U[1:] > ids_U[:-1]).all()) or int(ids_U[0]) < 0 or int(ids_U[-1]) >= vocab_size:
        raise ValueError(f"draft vocabulary: its target ids must be ascending, distinct and below {vocab_size}")
