"""The drafter's loss: weighted distance of proposals from the target's tokens.

`Objective` mixes cross-entropy of the target's token (CE; DFlash), forward KL to its distribution, and total variation
1 - sum min(p, q), the rejection probability (TV; LK losses, arXiv 2602.23881). DSpark mixes 0.1 CE and 0.9 TV. KL and
TV need the target's final hidden states before the labels; their logits are recomputed chunk by chunk.

Offset k counts only if offsets 1 .. k-1 were right, so weights decay: w_k = exp(-(k - 1) / gamma) (DFlash, appendix
A.1; gamma 4 for blocks of 8, 5 for 10, 7 for 16). With `weighting="dpace"`: w_k = sum over m >= k of prod over i <= m
of ((1 - a) q_i + a), q_i the detached probability of the label at offset i, a = 0.5 (D-PACE, arXiv 2605.18810). The
loss is sum(w * distance) / sum(w), so all share learning rates.

The target's LM head is frozen. Each chunk of blocks computes logits, loss and gradients (of hidden states and Markov
head) at once, so all logits never exist together and nothing is computed twice.

With a pruned vocabulary, head and labels use its ids and the target's distribution is renormalised over it (EAGLE-3). A
position whose token is missing has no weight, and its proposal counts as wrong.

Shape suffixes: A blocks, J proposals of a block, P = A * J positions of a chunk, D hidden, V vocabulary of the draft, R
rank of the Markov head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

Weighting = Literal["exponential", "dpace"]
DPACE_FLOOR = 0.5
ABSENT = -1  # label of a token outside the draft vocabulary
# Logits per chunk: as many as a CPU's caches hold, or enough to fill a GPU.
_CHUNK_ELEMENTS = {"cpu": 2**19, "cuda": 2**27}


@dataclass(frozen=True)
class Objective:
    """Weights of the three distances. Raises ValueError if one is negative or none is positive."""

    ce: float = 1.0
    kl: float = 0.0
    tv: float = 0.0

    def __post_init__(self) -> None:
        if min(self.ce, self.kl, self.tv) < 0 or self.ce + self.kl + self.tv == 0:
            raise ValueError(
                f"the loss needs weights that are not negative and one above 0, got ce {self.ce}, kl {self.kl}, "
                f"tv {self.tv}"
            )

    @property
    def is_soft(self) -> bool:
        """Whether the target's distribution is needed."""
        return self.kl > 0 or self.tv > 0


@dataclass(frozen=True)
class BlockLoss:
    """`loss`: differentiable scalar. `correct_AJ`: bool, argmax equals label. `nll_AJ`: float32 CE, inf if ABSENT."""

    loss: Tensor
    correct_AJ: Tensor
    nll_AJ: Tensor


def offset_weights(num_offsets: int, gamma: float, device: torch.device | str = "cpu") -> Tensor:
    """exp(-(k - 1) / gamma) for k = 1 .. num_offsets, float32. Raises ValueError for gamma <= 0."""
    if gamma <= 0:
        raise ValueError(f"gamma must be positive, got {gamma}")
    return torch.exp(-torch.arange(num_offsets, dtype=torch.float32, device=device) / gamma)


def dpace_weights(nll_AJ: Tensor, valid_AJ: Tensor) -> Tensor:
    """D-PACE weights [A, J] from the labels' cross-entropies, without gradient; invalid positions add nothing."""
    smoothed_AJ = (1 - DPACE_FLOOR) * torch.exp(-nll_AJ.detach()) + DPACE_FLOOR
    return (smoothed_AJ.cumprod(-1) * valid_AJ).flip(-1).cumsum(-1).flip(-1)


def block_loss(
    hidden_AJD: Tensor,
    labels_AJ: Tensor,
    valid_AJ: Tensor,
    head_VD: Tensor,
    gamma: float = 4.0,
    weighting: Weighting = "exponential",
    objective: Objective = Objective(),
    target_hidden_AJD: Tensor | None = None,
    markov_AJR: Tensor | None = None,
    markov_VR: Tensor | None = None,
    blocks_a_chunk: int | None = None,
) -> BlockLoss:
    """Weighted distance of drafted positions from the target, where `valid_AJ` (bool); 0 without valid positions.

    Args:
        hidden_AJD: the drafter's final hidden states.
        labels_AJ: the target's tokens, int64, as ids of the head's rows; ABSENT if it has no row for them.
        valid_AJ: positions that count.
        head_VD: the target's frozen LM head, or its rows of the draft vocabulary; products run in its dtype, the rest
            in float32.
        target_hidden_AJD: the target's final, normed hidden states before the labels; for KL and TV.
        markov_AJR, markov_VR: the Markov head's rows for the tokens before the labels, and its second table; their
        product is added to the logits.
        blocks_a_chunk: None chooses by device.

    Raises ValueError for an unknown weighting, a soft objective without `target_hidden_AJD`, or half a Markov head.
    """
    if weighting not in ("exponential", "dpace"):
        raise ValueError(f"weighting must be exponential or dpace, got {weighting!r}")
    if objective.is_soft and target_hidden_AJD is None:
        raise ValueError("KL and TV compare with the target's distribution: they need its final hidden states")
    if (markov_AJR is None) != (markov_VR is None):
        raise ValueError("a Markov head has two tables, and one of them is missing")
    decay_J = offset_weights(hidden_AJD.shape[1], gamma, hidden_AJD.device) if weighting == "exponential" else None
    if blocks_a_chunk is None:
        budget = _CHUNK_ELEMENTS.get(hidden_AJD.device.type, _CHUNK_ELEMENTS["cuda"])
        blocks_a_chunk = max(1, budget // (hidden_AJD.shape[1] * head_VD.shape[0]))
    loss, correct_AJ, nll_AJ = _HeadLoss.apply(
        hidden_AJD,
        markov_AJR,
        markov_VR,
        labels_AJ,
        valid_AJ,
        head_VD,
        target_hidden_AJD if objective.is_soft else None,
        decay_J,
        objective,
        blocks_a_chunk,
    )
    return BlockLoss(loss, correct_AJ, nll_AJ)


class _HeadLoss(torch.autograd.Function):
    """Head and weighted loss in one; the forward already computes the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_AJD: Tensor,
        markov_AJR: Tensor | None,
        markov_VR: Tensor | None,
        labels_AJ: Tensor,
        valid_AJ: Tensor,
        head_VD: Tensor,
        target_hidden_AJD: Tensor | None,
        decay_J: Tensor | None,
        objective: Objective,
        blocks_a_chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype, wants_gradient = head_VD.dtype, any(ctx.needs_input_grad)
        inputs = (hidden_AJD, markov_AJR, markov_VR)
        gradients = [torch.zeros_like(x) if x is not None and wants_gradient else None for x in inputs]
        d_hidden_AJD, d_markov_AJR, d_markov_VR = gradients
        table_VR = None if markov_VR is None else markov_VR.to(dtype)
        correct_AJ = torch.zeros_like(valid_AJ)
        nll_AJ = torch.zeros(labels_AJ.shape, dtype=torch.float32, device=labels_AJ.device)
        total = torch.zeros((), dtype=torch.float32, device=labels_AJ.device)
        total_weight = torch.zeros_like(total)
        for start in range(0, hidden_AJD.shape[0], blocks_a_chunk):
            rows = slice(start, start + blocks_a_chunk)
            is_present = labels_AJ[rows] != ABSENT
            labels, valid = labels_AJ[rows].clamp_min(0)[..., None], valid_AJ[rows] & is_present
            logits_AJV = _project(hidden_AJD[rows], head_VD)
            if markov_AJR is not None and table_VR is not None:
                logits_AJV = logits_AJV + _project(markov_AJR[rows], table_VR)
            logits_AJV = logits_AJV.float()
            correct_AJ[rows] = (logits_AJV.argmax(-1, keepdim=True) == labels)[..., 0] & valid
            log_q_AJV = logits_AJV.log_softmax(-1)
            nll = -log_q_AJV.gather(-1, labels)[..., 0].masked_fill(~is_present, -torch.inf)
            weight = (dpace_weights(nll, valid) if decay_J is None else decay_J.expand_as(nll)) * valid
            log_p_AJV = None
            if target_hidden_AJD is not None:
                log_p_AJV = _project(target_hidden_AJD[rows], head_VD).float().log_softmax(-1)
            distance, d_logits_AJV = _distance(objective, labels, nll.masked_fill(~valid, 0.0), log_q_AJV, log_p_AJV)
            total += (weight * distance).sum()
            total_weight += weight.sum()
            nll_AJ[rows] = nll
            if d_hidden_AJD is None:
                continue
            # Weighted after the products: D columns instead of V.
            d_logits_PV, weight_P1 = d_logits_AJV.flatten(0, 1).to(dtype), weight.flatten()[:, None]
            d_hidden_PD = (d_logits_PV @ head_VD).float() * weight_P1
            d_hidden_AJD[rows] = d_hidden_PD.unflatten(0, weight.shape).to(d_hidden_AJD.dtype)
            if markov_AJR is not None and table_VR is not None and d_markov_AJR is not None and d_markov_VR is not None:
                d_markov_PR = (d_logits_PV @ table_VR).float() * weight_P1
                d_markov_AJR[rows] = d_markov_PR.unflatten(0, weight.shape).to(d_markov_AJR.dtype)
                weighted_PR = (markov_AJR[rows].flatten(0, 1).float() * weight_P1).to(dtype)
                d_markov_VR += (d_logits_PV.T @ weighted_PR).float()
        normaliser = total_weight.clamp_min(torch.finfo(torch.float32).tiny)
        ctx.save_for_backward(*(None if gradient is None else gradient.div_(normaliser) for gradient in gradients))
        ctx.mark_non_differentiable(correct_AJ, nll_AJ)
        return total / normaliser, correct_AJ, nll_AJ

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        gradients = [None if gradient is None else gradient * d_loss for gradient in ctx.saved_tensors]
        return *gradients, *[None] * 7


def _project(x_AJD: Tensor, weight_VD: Tensor) -> Tensor:
    """Logits [A, J, V] as one matrix product: a stack of small ones is half as fast on a CPU."""
    return linear(x_AJD.flatten(0, 1).to(weight_VD.dtype), weight_VD).unflatten(0, x_AJD.shape[:2])


def _distance(
    objective: Objective, labels_AJ1: Tensor, nll_AJ: Tensor, log_q_AJV: Tensor, log_p_AJV: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Distance of each position [A, J] and its gradient by the logits [A, J, V]; overwrites `log_q_AJV`.

    With q = softmax(logits): CE has gradient q - onehot, KL(p, q) has q - p, and TV, whose gradient by q is -[q < p],
    has q * (sum of q where q < p, minus [q < p]).
    """
    distance_AJ = objective.ce * nll_AJ
    if log_p_AJV is None:
        d_logits_AJV = log_q_AJV.exp_()
        if objective.ce != 1.0:
            d_logits_AJV *= objective.ce
    else:
        p_AJV = log_p_AJV.exp()
        if objective.kl:
            distance_AJ = distance_AJ + objective.kl * (p_AJV * (log_p_AJV - log_q_AJV)).sum(-1)
        q_AJV = log_q_AJV.exp_()
        d_logits_AJV = (objective.ce + objective.kl) * q_AJV
        if objective.kl:
            d_logits_AJV.sub_(p_AJV, alpha=objective.kl)
        if objective.tv:
            distance_AJ = distance_AJ + objective.tv * (1 - torch.minimum(p_AJV, q_AJV).sum(-1))
            below_AJV = q_AJV * (q_AJV < p_AJV)
            d_logits_AJV.add_(q_AJV * below_AJV.sum(-1, keepdim=True) - below_AJV, alpha=objective.tv)
    if objective.ce:
        d_logits_AJV.scatter_add_(-1, labels_AJ1, torch.full_like(nll_AJ, -objective.ce)[..., None])
    return distance_AJ, d_logits_AJV
