"""The drafter's loss: cross-entropy of the block positions, weighted by how much an offset matters for acceptance.

Offset k is only ever used when offsets 1 .. k-1 were right, so its weight decays: w_k = exp(-(k - 1) / gamma)
(DFlash, appendix A.1; gamma 4 for blocks of 8, 5 for 10, 7 for 16). With `weighting="dpace"` the weight is what the
drafter's own confidence says instead: w_k = sum over m >= k of prod over i <= m of ((1 - a) q_i + a), q_i the
probability of the label at offset i, detached, a = 0.5 (D-PACE, arXiv 2605.18810). Either way the loss is
sum(w * CE) / sum(w), so the two share learning rates.

The LM head belongs to the target and is frozen. Only the gradient with respect to the hidden states is needed, so each
chunk of blocks computes its logits, its loss and its gradient at once and drops the logits: neither all logits nor
their gradient ever exist, and nothing is computed twice.

Left out: distillation from the target's logits. Labels are the target's own tokens where the text is its own.

Shape suffixes: A blocks, J = K - 1 predicted offsets of a block, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Weighting = Literal["exponential", "dpace"]
DPACE_FLOOR = 0.5


@dataclass(frozen=True)
class BlockLoss:
    """`loss`: scalar, differentiable. `correct_AJ`: bool, whether the argmax was the label. `nll_AJ`: float32 CE."""

    loss: Tensor
    correct_AJ: Tensor
    nll_AJ: Tensor


def offset_weights(num_offsets: int, gamma: float, device: torch.device | str = "cpu") -> Tensor:
    """exp(-(k - 1) / gamma) for k = 1 .. num_offsets, float32. Raises ValueError for gamma <= 0."""
    if gamma <= 0:
        raise ValueError(f"gamma must be positive, got {gamma}")
    return torch.exp(-torch.arange(num_offsets, dtype=torch.float32, device=device) / gamma)


def dpace_weights(nll_AJ: Tensor, valid_AJ: Tensor) -> Tensor:
    """D-PACE weights [A, J] from the cross-entropies of a block's labels; no gradient flows through them.

    Positions that do not count add nothing to the weight of those before them.
    """
    smoothed_AJ = (1 - DPACE_FLOOR) * torch.exp(-nll_AJ.detach()) + DPACE_FLOOR
    return (smoothed_AJ.cumprod(-1) * valid_AJ).flip(-1).cumsum(-1).flip(-1)


def block_loss(
    hidden_AJD: Tensor,
    labels_AJ: Tensor,
    valid_AJ: Tensor,
    head_VD: Tensor,
    gamma: float = 4.0,
    weighting: Weighting = "exponential",
    blocks_a_chunk: int = 128,
) -> BlockLoss:
    """Weighted cross-entropy of drafted positions against `labels_AJ` (int64) where `valid_AJ` (bool).

    `head_VD` is the target's frozen LM head; the products run in its dtype, everything else in float32. With no valid
    position the loss is 0. Raises ValueError for an unknown weighting.
    """
    if weighting not in ("exponential", "dpace"):
        raise ValueError(f"weighting must be exponential or dpace, got {weighting!r}")
    decay_J = offset_weights(hidden_AJD.shape[1], gamma, hidden_AJD.device) if weighting == "exponential" else None
    loss, correct_AJ, nll_AJ = _HeadLoss.apply(hidden_AJD, labels_AJ, valid_AJ, head_VD, decay_J, blocks_a_chunk)
    return BlockLoss(loss, correct_AJ, nll_AJ)


class _HeadLoss(torch.autograd.Function):
    """Frozen head and weighted cross-entropy in one: the forward already holds the gradient of the hidden states."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_AJD: Tensor,
        labels_AJ: Tensor,
        valid_AJ: Tensor,
        head_VD: Tensor,
        decay_J: Tensor | None,
        blocks_a_chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradient_AJD = torch.zeros_like(hidden_AJD)
        correct_AJ = torch.zeros_like(valid_AJ)
        nll_AJ = torch.zeros(labels_AJ.shape, dtype=torch.float32, device=labels_AJ.device)
        total = torch.zeros((), dtype=torch.float32, device=labels_AJ.device)
        total_weight = torch.zeros_like(total)
        for start in range(0, hidden_AJD.shape[0], blocks_a_chunk):
            rows = slice(start, start + blocks_a_chunk)
            labels = labels_AJ[rows, :, None]
            logits_AJV = torch.nn.functional.linear(hidden_AJD[rows].to(head_VD.dtype), head_VD).float()
            correct_AJ[rows] = (logits_AJV.argmax(-1, keepdim=True) == labels)[..., 0] & valid_AJ[rows]
            log_p_AJV = logits_AJV.log_softmax(-1)
            nll = -log_p_AJV.gather(-1, labels)[..., 0]
            weight = (dpace_weights(nll, valid_AJ[rows]) if decay_J is None else decay_J.expand_as(nll)) * valid_AJ[
                rows
            ]
            total += (weight * nll).sum()
            total_weight += weight.sum()
            nll_AJ[rows] = nll
            if ctx.needs_input_grad[0]:
                d_logits_AJV = log_p_AJV.exp_()
                d_logits_AJV.scatter_add_(-1, labels, torch.full_like(nll, -1.0)[..., None])
                d_logits_AJV *= weight[..., None]
                gradient_AJD[rows] = (d_logits_AJV.to(head_VD.dtype) @ head_VD).to(gradient_AJD.dtype)
        normaliser = total_weight.clamp_min(torch.finfo(torch.float32).tiny)
        ctx.save_for_backward(gradient_AJD / normaliser)
        ctx.mark_non_differentiable(correct_AJ, nll_AJ)
        return total / normaliser, correct_AJ, nll_AJ

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (gradient_AJD,) = ctx.saved_tensors
        return gradient_AJD * d_loss, None, None, None, None, None
