"""Causal attention with sinks and sliding windows for training on a CPU, one block of queries at a time.

transformers scores every query against every key, in a dozen passes over a matrix larger than a CPU's cache. Here a
block of 64 queries meets only the keys it can see, the block fits the cache, and the backward is written out: a layer
of the model of record takes 9 ms of a training step instead of 22. The probabilities are kept for the backward.

A sink is a logit that takes part in the softmax and has no value (MiMo-V2-Flash, gpt-oss). With probabilities P and
O = P V, dS = P * (dP - rowsum(P * dP)) as without a sink; the sink's gradient is -p_sink * rowsum(O * dO).

Padding, packed documents, key/value caches and dropout raise ValueError. Other devices are left out.

Shape suffixes: B sequences, N query heads, M key/value heads, T tokens, H query/key head size, V value head size,
P = B * N pairs, C queries of a block, S keys that a block sees.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

IMPLEMENTATION = "blockwise_sinks"
# Families that transformers runs on a CPU only with its full attention.
_FAMILIES = ("mimo_v2_flash", "gpt_oss")
_BLOCK_SIZE = 64
_REFUSAL = (
    "blockwise attention takes whole sequences without padding, packing, cache or dropout: "
    "call model.set_attn_implementation('eager') for others"
)


def enable_blockwise_attention(model: PreTrainedModel, device: torch.device) -> None:
    """Switch a family with sinks, without attention dropout, to blockwise attention on a CPU; leave others alone.

    Forwards with padding then raise ValueError. Saved files do not change.
    """
    config = model.config
    if device.type == "cpu" and config.model_type in _FAMILIES and not getattr(config, "attention_dropout", 0.0):
        ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _no_mask)
        model.set_attn_implementation(IMPLEMENTATION)


def blockwise_attention(
    q_BNTH: Tensor, k_BMTH: Tensor, v_BMTV: Tensor, sinks_N: Tensor | None, scale: float, window: int | None
) -> Tensor:
    """Causal softmax attention, [B, N, T, V] in v's dtype; differentiable.

    Products run in v's dtype, which under autocast differs from that of rotated queries and keys; the softmax in
    float32. `window` counts the positions a query sees, its own included; None is all. Raises ValueError for a window
    below 1 and for unequal numbers of queries and keys.
    """
    if q_BNTH.shape[2] != k_BMTH.shape[2] or (window is not None and window < 1):
        raise ValueError(
            f"blockwise attention takes as many keys as queries and a window of 1 or more, got {q_BNTH.shape[2]} "
            f"queries, {k_BMTH.shape[2]} keys and window {window}"
        )
    return _BlockwiseAttention.apply(q_BNTH, k_BMTH, v_BMTV, sinks_N, scale, window, torch.is_grad_enabled())


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The entry in ALL_ATTENTION_FUNCTIONS; [B, N, T, ...] in, [B, T, N, V] out."""
    if attention_mask is not None or dropout:
        raise ValueError(_REFUSAL)
    return blockwise_attention(query, key, value, s_aux, scaling, sliding_window).transpose(1, 2).contiguous(), None


def _no_mask(
    *args: Any, attention_mask: Tensor | None = None, allow_is_causal_skip: bool = True, **kwargs: Any
) -> None:
    """The entry in ALL_MASK_ATTENTION_FUNCTIONS: no mask. transformers forbids the skip for packed `position_ids`."""
    if (attention_mask is not None and not attention_mask.all()) or not allow_is_causal_skip:
        raise ValueError(_REFUSAL)


def _blocks(num_tokens: int, window: int | None) -> Iterator[tuple[slice, slice, Tensor]]:
    """Each block's queries, the keys they see, and a float32 [C, S] bias that is -inf on hidden pairs."""
    for start in range(0, num_tokens, _BLOCK_SIZE):
        stop = min(start + _BLOCK_SIZE, num_tokens)
        first = 0 if window is None else max(0, start - window + 1)
        query, key = torch.arange(start, stop)[:, None], torch.arange(first, stop)[None]
        is_hidden = key > query
        if window is not None:
            is_hidden |= key <= query - window
        yield slice(start, stop), slice(first, stop), torch.zeros(is_hidden.shape).masked_fill(is_hidden, -torch.inf)


class _BlockwiseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BNTH: Tensor,
        k_BMTH: Tensor,
        v_BMTV: Tensor,
        sinks_N: Tensor | None,
        scale: float,
        window: int | None,
        is_grad_enabled: bool,
    ) -> Tensor:
        is_kept = is_grad_enabled and any(ctx.needs_input_grad)
        num_sequences, num_heads, num_tokens, _ = q_BNTH.shape
        num_shared = num_heads // k_BMTH.shape[1]
        dtype = v_BMTV.dtype
        q_PTH = q_BNTH.to(dtype).flatten(0, 1)
        k_PTH, v_PTV = (x.to(dtype).repeat_interleave(num_shared, dim=1).flatten(0, 1) for x in (k_BMTH, v_BMTV))
        sink_P11 = None if sinks_N is None else sinks_N.float().repeat(num_sequences)[:, None, None]
        out_PTV = torch.empty((*q_PTH.shape[:2], v_PTV.shape[-1]), dtype=dtype)
        probabilities, sink_shares = [], []
        with torch.autocast("cpu", enabled=False):
            for queries, keys, bias_CS in _blocks(num_tokens, window):
                bias_CS = bias_CS.to(dtype)
                scores_PCS = torch.baddbmm(bias_CS, q_PTH[:, queries], k_PTH[:, keys].mT, alpha=scale).float()
                if sink_P11 is None:
                    p_PCS = scores_PCS.softmax(dim=-1)
                else:
                    top_PC1 = torch.maximum(scores_PCS.amax(dim=-1, keepdim=True), sink_P11)
                    p_PCS = scores_PCS.sub_(top_PC1).exp_()
                    sink_PC1 = (sink_P11 - top_PC1).exp_()
                    total_PC1 = p_PCS.sum(dim=-1, keepdim=True).add_(sink_PC1)
                    p_PCS.div_(total_PC1)
                    sink_shares.append(sink_PC1.div_(total_PC1).squeeze(-1))
                p_PCS = p_PCS.to(dtype)
                out_PTV[:, queries] = torch.bmm(p_PCS, v_PTV[:, keys])
                if is_kept:
                    probabilities.append(p_PCS)
        if is_kept:
            # The sink's own share, in float32: 1 minus the rounded others would be mostly rounding error.
            p_sink_PT = torch.cat(sink_shares, dim=-1) if sink_shares else None
            ctx.save_for_backward(q_PTH, k_PTH, v_PTV, out_PTV, sinks_N, p_sink_PT, *probabilities)
        ctx.scale, ctx.window, ctx.heads, ctx.num_shared = scale, window, (num_sequences, num_heads), num_shared
        return out_PTV.unflatten(0, (num_sequences, num_heads))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BNTV: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q_PTH, k_PTH, v_PTV, out_PTV, sinks_N, p_sink_PT, *probabilities = ctx.saved_tensors
        grad_PTV = grad_BNTV.flatten(0, 1)
        dq_PTH = torch.empty_like(q_PTH)
        # Several blocks add to the gradient of one key.
        dk_PTH, dv_PTV = (torch.zeros_like(x, dtype=torch.float32) for x in (k_PTH, v_PTV))
        for (queries, keys, _), p_PCS in zip(_blocks(q_PTH.shape[1], ctx.window), probabilities, strict=True):
            grad_PCV = grad_PTV[:, queries]
            dv_PTV[:, keys] += torch.bmm(p_PCS.mT, grad_PCV)
            dp_PCS = torch.bmm(grad_PCV, v_PTV[:, keys].mT)
            ds_PCS = torch._softmax_backward_data(dp_PCS, p_PCS, -1, p_PCS.dtype).mul_(ctx.scale)
            dq_PTH[:, queries] = torch.bmm(ds_PCS, k_PTH[:, keys])
            dk_PTH[:, keys] += torch.bmm(ds_PCS.mT, q_PTH[:, queries])
        d_sinks_N = None
        if sinks_N is not None:
            d_sinks_N = -(p_sink_PT * (out_PTV * grad_PTV).float().sum(dim=-1)).unflatten(0, ctx.heads).sum(dim=(0, 2))
            d_sinks_N = d_sinks_N.to(sinks_N.dtype)
        dq_BNTH = dq_PTH.unflatten(0, ctx.heads)
        num_sequences, num_heads = ctx.heads
        # Query heads that share a key/value head are adjacent.
        shared = (num_sequences, num_heads // ctx.num_shared, ctx.num_shared)
        dk_BMTH, dv_BMTV = (x.unflatten(0, shared).sum(dim=2) for x in (dk_PTH, dv_PTV))
        return dq_BNTH, dk_BMTH.to(k_PTH.dtype), dv_BMTV.to(v_PTV.dtype), d_sinks_N, None, None, None
