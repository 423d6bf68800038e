"""The DFlash drafter network: z-lab's architecture, names and numerics, in plain PyTorch.

A drafter reads the target's hidden states ("features") of every committed position and, in one forward, fills a block
of masked positions. Features enter as keys and values only: they are fused once, `hidden_norm(fc(features))`, and every
layer projects that one tensor with the same k_proj and v_proj as the block. Nothing else touches them (no
input_layernorm, no MLP), so a layer's context keys and values never change once a position is committed.

Training and serving share `decode`: training passes many blocks and a mask, serving one block and the keys and values
of the committed prefix. This file is the oracle for faster implementations; it keeps no state and knows no embedding
and no LM head, which belong to the target.

Source: DFlash (z-lab), reference `DFlashDraftModel`; Qwen3 layers with QK-norm and full rotary embedding.

Shape suffixes: B windows, T context positions, Q queries (block positions, several blocks in a row), S = T + Q keys,
C = taps * D features, D hidden, N query heads, G key/value heads, H head dim, K block size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speedstack.dflash.config import DFlashConfig

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

ContextKV = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, statistics in float32, weight applied in the input's dtype (Qwen3)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rotary_tables(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [..., head_dim] for integer positions [...]; angles in float32, tables cast to `dtype`."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions[..., None].float() * (1.0 / theta**exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_BTGH: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding over the whole head dim, halves paired (`rotate_half`); tables are [..., T, H]."""
    cos, sin = (table[..., None, :] for table in tables)
    first, second = x_BTGH.chunk(2, dim=-1)
    return x_BTGH * cos + torch.cat((-second, first), dim=-1) * sin


class DFlashAttention(nn.Module):
    """Block queries over context keys followed by block keys. Not causal: what is visible is the mask's business."""

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width, kv_width = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def keys_values(self, x_BTD: Tensor, tables: tuple[Tensor, Tensor]) -> ContextKV:
        """Rotated keys and values [B, T, G, H] of context features or of normed block states."""
        k_BTGH = self.k_norm(self.k_proj(x_BTD).unflatten(-1, (-1, self.head_dim)))
        v_BTGH = self.v_proj(x_BTD).unflatten(-1, (-1, self.head_dim))
        return rotate(k_BTGH, tables), v_BTGH

    def forward(
        self,
        x_BQD: Tensor,
        tables: tuple[Tensor, Tensor],
        context: ContextKV,
        mask: Tensor | BlockMask | None,
    ) -> Tensor:
        q_BQNH = rotate(self.q_norm(self.q_proj(x_BQD).unflatten(-1, (-1, self.head_dim))), tables)
        block = self.keys_values(x_BQD, tables)
        k_BGSH, v_BGSH = (torch.cat(pair, dim=1).transpose(1, 2) for pair in zip(context, block, strict=True))
        out_BNQH = _attend(q_BQNH.transpose(1, 2), k_BGSH, v_BGSH, mask)
        return self.o_proj(out_BNQH.transpose(1, 2).flatten(2))


def _attend(q_BNQH: Tensor, k_BGSH: Tensor, v_BGSH: Tensor, mask: Tensor | BlockMask | None) -> Tensor:
    """Softmax attention; a boolean mask [B, 1, Q, S] goes to SDPA, a BlockMask to flex_attention."""
    if mask is None or isinstance(mask, Tensor):
        return F.scaled_dot_product_attention(q_BNQH, k_BGSH, v_BGSH, attn_mask=mask, enable_gqa=True)
    from speedstack.dflash.flex import attend  # compiles a CUDA kernel: only where a BlockMask was made

    return attend(q_BNQH, k_BGSH, v_BGSH, mask)


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
        mask: Tensor | BlockMask | None,
    ) -> Tensor:
        x_BQD = x_BQD + self.self_attn(self.input_layernorm(x_BQD), tables, context, mask)
        return x_BQD + self.mlp(self.post_attention_layernorm(x_BQD))


class DFlashDraftModel(nn.Module):
    """The drafter. State-dict names are exactly z-lab's: fc, hidden_norm, norm, layers.i.*; no prefix, no buffers."""

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(config.num_taps * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layers = nn.ModuleList(DFlashDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def init_weights(self, seed: int) -> None:
        """Random weights as a function of `seed` alone: norms one, matrices N(0, 1 / (4 fan_in)).

        The matrices that write to the residual stream are smaller by sqrt(2 * layers), so that the stream starts out
        as wide at the last layer as at the first.
        """
        generator = torch.Generator().manual_seed(seed)
        residual_scale = (2 * self.config.num_hidden_layers) ** -0.5
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.dim() == 1:
                    parameter.fill_(1.0)
                    continue
                std = 0.5 * parameter.shape[1] ** -0.5
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std *= residual_scale
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)

    def fuse(self, features_BTC: Tensor) -> Tensor:
        """Context [..., T, D] from the tapped hidden states, concatenated in the order of `target_layer_ids`.

        Raises ValueError when the last axis is not taps * hidden size.
        """
        if features_BTC.shape[-1] != self.fc.in_features:
            raise ValueError(
                f"features have {features_BTC.shape[-1]} columns, the drafter reads {self.config.num_taps} layers of "
                f"{self.config.hidden_size}: was it trained for another target?"
            )
        return self.hidden_norm(self.fc(features_BTC))

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Rotary cosines and sines [..., H] of absolute positions [...]."""
        return rotary_tables(positions, self.config.head_dim, self.config.rope_theta, dtype)

    def context_kv(self, layer: int, context_BTD: Tensor, positions_T: Tensor) -> ContextKV:
        """Rotated keys and values [..., T, G, H] of layer `layer` for fused context [..., T, D] at `positions_T`."""
        attention = self.layers[layer].self_attn
        assert isinstance(attention, DFlashAttention)
        return attention.keys_values(context_BTD, self.rotary(positions_T, context_BTD.dtype))

    def decode(
        self,
        embeds_BQD: Tensor,
        positions_BQ: Tensor,
        contexts: Sequence[ContextKV],
        mask: Tensor | BlockMask | None,
    ) -> Tensor:
        """Final-normed hidden states [B, Q, D] of block positions.

        `contexts`: keys and values [B, T, G, H] a layer. `mask`: what a query sees of the T context keys followed by
        the Q block keys, as booleans [B, 1, Q, T + Q] or a flex_attention BlockMask; None sees everything.
        """
        tables = self.rotary(positions_BQ, embeds_BQD.dtype)
        x_BQD = embeds_BQD
        for layer, context in zip(self.layers, contexts, strict=True):
            x_BQD = layer(x_BQD, tables, context, mask)
        return self.norm(x_BQD)

    def forward(
        self,
        features_BTC: Tensor,
        positions_BT: Tensor,
        embeds_BQD: Tensor,
        block_positions_BQ: Tensor,
        mask: Tensor | BlockMask | None,
    ) -> Tensor:
        """Training's one pass: every block of every window at once; see `decode` for shapes and the mask."""
        context_BTD = self.fuse(features_BTC)
        contexts = [self.context_kv(i, context_BTD, positions_BT) for i in range(len(self.layers))]
        return self.decode(embeds_BQD, block_positions_BQ, contexts, mask)


class DraftContext:
    """One sequence's context keys and values, stored by position: the serving side of `decode`.

    Buffers keys, values: [L, max_length, G, H]. Positions may be written in any order and again (a position whose
    draft was rejected is simply overwritten); `draft_hidden` reads positions strictly below the anchor and no others.
    """

    def __init__(self, model: DFlashDraftModel, max_length: int) -> None:
        config = model.config
        shape = (config.num_hidden_layers, max_length, config.num_key_value_heads, config.head_dim)
        self.keys_LTGH = model.fc.weight.new_zeros(shape)
        self.values_LTGH = model.fc.weight.new_zeros(shape)

    @torch.no_grad()
    def write(self, model: DFlashDraftModel, features_TC: Tensor, start: int) -> None:
        """Store the features of positions start .. start + T - 1. Raises ValueError when the buffer is too short."""
        end = start + features_TC.shape[0]
        if start < 0 or end > self.keys_LTGH.shape[1]:
            raise ValueError(f"positions {start}..{end - 1} do not fit a context of {self.keys_LTGH.shape[1]}")
        context_TD = model.fuse(features_TC)
        positions_T = torch.arange(start, end, device=features_TC.device)
        for i in range(model.config.num_hidden_layers):
            self.keys_LTGH[i, start:end], self.values_LTGH[i, start:end] = model.context_kv(i, context_TD, positions_T)

    @torch.no_grad()
    def draft_hidden(self, model: DFlashDraftModel, embeds_KD: Tensor, anchor: int) -> Tensor:
        """Hidden states [K - 1, D] of block positions 1 .. K-1; the target's LM head turns them into proposals.

        `embeds_KD`: the target's embeddings of [anchor token, mask, ..., mask]; `anchor`: the anchor's position.
        """
        positions_1K = torch.arange(anchor, anchor + embeds_KD.shape[0], device=embeds_KD.device)[None]
        contexts = [
            (keys[None, :anchor], values[None, :anchor])
            for keys, values in zip(self.keys_LTGH, self.values_LTGH, strict=True)
        ]
        return model.decode(embeds_KD[None], positions_1K, contexts, mask=None)[0, 1:]
