"""flex_attention for CUDA training: compiled once a process, when the first BlockMask arrives.

Kept apart from the model so that neither serving nor CPU training imports the compiler.

Shape suffixes: B windows, N query heads, G key/value heads, Q queries, S keys, H head dim.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)


def attend(q_BNQH: Tensor, k_BGSH: Tensor, v_BGSH: Tensor, mask: BlockMask, sinks_N: Tensor | None = None) -> Tensor:
    """Softmax attention [B, N, Q, H] under `mask`, key/value heads shared by groups of query heads.

    Sinks add exp(sink) to the softmax's sum. The kernel knows the sum as it was, so they are a factor on its result:
    exp(lse) / (exp(lse) + exp(sink)).
    """
    if sinks_N is None:
        return _compiled()(q_BNQH, k_BGSH, v_BGSH, block_mask=mask, enable_gqa=True)
    out_BNQH, aux = _compiled()(
        q_BNQH, k_BGSH, v_BGSH, block_mask=mask, enable_gqa=True, return_aux=AuxRequest(lse=True)
    )
    share_BNQ = torch.sigmoid(aux.lse - sinks_N.float()[None, :, None])
    return out_BNQH * share_BNQ[..., None].to(out_BNQH.dtype)
