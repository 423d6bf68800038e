"""Attention of a drafter's block: rotary embedding, windows, sinks. What a layer computes, without its weights.

Keys are the context's followed by the block's own. Full-attention layers see all of them unless a mask says otherwise;
sliding-window layers of the variant that MiMo uses see keys whose position differs from the query's by less than the
window, before it and, unless the block is causal, after it. A sink is one learned logit a head that takes part in the
softmax and has no value: attention may add up to less than one.

Sources: Qwen3's rotary embedding; sinks and value scale as in MiMo-V2-Flash and gpt-oss; windows as Hugging Face counts
them (the query's own position included), which vLLM's and SGLang's DFlash layers do too.

Shape suffixes: B windows, T positions, Q queries (block positions, several blocks in a row), S = context + Q keys,
N query heads, G key/value heads, H head dim, R rotary dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def rotary_tables(positions: Tensor, rotary_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [..., R] for integer positions [...]; angles in float32, tables cast to `dtype`."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=positions.device) / rotary_dim
    angles = positions[..., None].float() * (1.0 / theta**exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_BTGH: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of the leading R dimensions of a head, halves paired (`rotate_half`); tables are [..., T, R]."""
    cos, sin = (table[..., None, :] for table in tables)
    turned, rest = x_BTGH.split((cos.shape[-1], x_BTGH.shape[-1] - cos.shape[-1]), dim=-1)
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def in_window(query_position: Tensor, key_position: Tensor, window: int, is_causal: bool) -> Tensor:
    """Whether a sliding-window layer lets a query see a key, by absolute position; elementwise, bool."""
    distance = query_position - key_position
    seen = distance < window
    return seen & (distance >= 0 if is_causal else distance > -window)


def attend(
    q_BNQH: Tensor, k_BGSH: Tensor, v_BGSH: Tensor, mask: Tensor | BlockMask | None, sinks_N: Tensor | None = None
) -> Tensor:
    """Softmax attention [B, N, Q, H]; by SDPA under a bool mask [B, 1, Q, S], by flex_attention under a BlockMask."""
    if mask is not None and not isinstance(mask, Tensor):
        from speedstack.dflash.flex import attend as flex_attend  # compiles a kernel: only where a BlockMask was made

        return flex_attend(q_BNQH, k_BGSH, v_BGSH, mask, sinks_N)
    if sinks_N is None:
        return F.scaled_dot_product_attention(q_BNQH, k_BGSH, v_BGSH, attn_mask=mask, enable_gqa=True)
    return attend_with_sinks(q_BNQH, k_BGSH, v_BGSH, mask, sinks_N)


def attend_with_sinks(q_BNQH: Tensor, k_BGSH: Tensor, v_BGSH: Tensor, mask: Tensor | None, sinks_N: Tensor) -> Tensor:
    """Attention whose softmax has one more term a head, exp(sink); written out, statistics in float32.

    A query that sees no key gives zeros: all of its attention goes to the sink.
    """
    groups = q_BNQH.shape[1] // k_BGSH.shape[1]
    k_BNSH, v_BNSH = k_BGSH.repeat_interleave(groups, 1), v_BGSH.repeat_interleave(groups, 1)
    scores_BNQS = (q_BNQH @ k_BNSH.transpose(-1, -2)).float() * q_BNQH.shape[-1] ** -0.5
    if mask is not None:
        scores_BNQS = scores_BNQS.masked_fill(~mask, float("-inf"))
    sinks = sinks_N.float().view(1, -1, 1, 1).expand(*scores_BNQS.shape[:3], 1)
    weights_BNQS = torch.cat((scores_BNQS, sinks), dim=-1).softmax(-1)[..., :-1]
    return weights_BNQS.to(v_BNSH.dtype) @ v_BNSH
