"""flex_attention for CUDA training, compiled when the first BlockMask arrives.

Separate from the model, so that serving and CPU training do not import the compiler.

Shape suffixes: B windows, N query heads, G key/value heads, Q queries, S keys, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)


@cache
def _compiled_create_block_mask() -> Any:
    return torch.compile(create_block_mask)


def make_block_mask(
    visible: Callable[..., Tensor], num_windows: int, num_queries: int, num_keys: int, device: torch.device
) -> BlockMask:
    """The BlockMask of `visible(window, head, query, key)`, the same for all heads.

    Compiled on CUDA: uncompiled, a whole [Q, S] mask would exist briefly, 2 GB for a window of 4096 tokens and anchors.
    """
    create = _compiled_create_block_mask() if device.type == "cuda" else create_block_mask
    return create(visible, B=num_windows, H=None, Q_LEN=num_queries, KV_LEN=num_keys, device=device.type)


def attend(q_BNQH: Tensor, k_BGSH: Tensor, v_BGSH: Tensor, mask: BlockMask, sinks_N: Tensor | None = None) -> Tensor:
    """Softmax attention [B, N, Q, H] under `mask`, with grouped key/value heads.

    Sinks multiply the kernel's result by exp(lse) / (exp(lse) + exp(sink)).
    """
    if sinks_N is None:
        return _compiled()(q_BNQH, k_BGSH, v_BGSH, block_mask=mask, enable_gqa=True)
    out_BNQH, aux = _compiled()(
        q_BNQH, k_BGSH, v_BGSH, block_mask=mask, enable_gqa=True, return_aux=AuxRequest(lse=True)
    )
    share_BNQ = torch.sigmoid(aux.lse - sinks_N.float()[None, :, None])
    return out_BNQH * share_BNQ[..., None].to(out_BNQH.dtype)
