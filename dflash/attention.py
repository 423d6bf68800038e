"""Attention of a drafter's block, without weights: rotary embedding, windows, sinks.

Keys are the context's, then the block's. Full-attention layers see all unless masked; MiMo's sliding-window layers see
keys less than the window away, before the query and, unless causal, after it. A sink is a learned logit per head in the
softmax, without a value, so attention may sum to less than one.

Sources: Qwen3's rotary embedding; sinks and value scale as in MiMo-V2-Flash and gpt-oss; windows as in Hugging Face
(the query's position included), like the DFlash layers of vLLM and SGLang.

Shape suffixes: B windows, T positions, Q queries (block positions, several blocks in a row), S = context + Q keys, N
query heads, G key/value heads, H head dim, R rotary dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def rotary_tables(positions: Tensor, rotary_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [..., R] of integer positions [...]; computed in float32, cast to `dtype`."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=positions.device) / rotary_dim
    angles = positions[..., None].float() * (1.0 / theta**exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_BTGH: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of a head's leading R dimensions, halves paired (as `rotate_half`); tables are [..., T, R]."""
    cos, sin = (table[..., None, :] for table in tables)
    turned, rest = x_BTGH.split((cos.shape[-1], x_BTGH.shape[-1] - cos.shape[-1]), dim=-1)
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def in_window(query_position: Tensor, key_position: Tensor, window: int, is_causal: bool) -> Tensor:
    """Whether a sliding-window layer's query sees a key, by absolute position; elementwise, bool."""
    distance = query_position - key_position
    seen = distance < window
    return seen & (distance >= 0 if is_causal else distance > -window)


def attend(
    q_BNQH: Tensor, k_BGSH: Tensor, v_BGSH: Tensor, mask: Tensor | BlockMask | None, sinks_N: Tensor | None = None
) -> Tensor:
    """Softmax attention [B, N, Q, H]: SDPA for a bool mask [B, 1, Q, S], flex_attention for a BlockMask."""
    if mask is not None and not isinstance(mask, Tensor):
        from speedstack.dflash.flex import attend as flex_attend  # compiles a kernel: imported only if needed

        return flex_attend(q_BNQH, k_BGSH, v_BGSH, mask, sinks_N)
    if sinks_N is None:
        return F.scaled_dot_product_attention(q_BNQH, k_BGSH, v_BGSH, attn_mask=mask, enable_gqa=True)
    return attend_with_sinks(q_BNQH, k_BGSH, v_BGSH, mask, sinks_N)


def attend_with_sinks(q_BNQH: Tensor, k_BGSH: Tensor, v_BGSH: Tensor, mask: Tensor | None, sinks_N: Tensor) -> Tensor:
    """Attention with one more softmax term per head, exp(sink); float32 statistics; zeros for a query without keys."""
    groups = q_BNQH.shape[1] // k_BGSH.shape[1]
    k_BNSH, v_BNSH = k_BGSH.repeat_interleave(groups, 1), v_BGSH.repeat_interleave(groups, 1)
    scores_BNQS = (q_BNQH @ k_BNSH.transpose(-1, -2)).float() * q_BNQH.shape[-1] ** -0.5
    if mask is not None:
        scores_BNQS = scores_BNQS.masked_fill(~mask, float("-inf"))
    sinks = sinks_N.float().view(1, -1, 1, 1).expand(*scores_BNQS.shape[:3], 1)
    weights_BNQS = torch.cat((scores_BNQS, sinks), dim=-1).softmax(-1)[..., :-1]
    return weights_BNQS.to(v_BNSH.dtype) @ v_BNSH
