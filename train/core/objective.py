"""Losses over next-token distributions, and the held-out windows they are measured on.

Logits are reduced in float32 whatever their dtype, a few rows at a time, and their gradient is computed in the forward.
The gradient is then the only other array of that size; autograd keeps half a dozen, which costs a tenth of a small
model's step on a CPU and gigabytes at a vocabulary of 150,000. Held-out metrics come from `eval.quality.divergence`.
A window of T tokens has T - 1 predictions; KL needs no label and is taken over all T positions.

Shape suffixes: B sequences, T tokens, V vocabulary, R rows of logits, P rows of a part.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from speedstack.train.config.recipes import JobConfig
from speedstack.train.core.batches import PackedWindows
from speedstack.train.core.distributed import World

# Logits of one part: what a CPU's caches hold; on other devices a bound of the temporary memory.
_MAX_PART_ELEMENTS = {"cpu": 2**18}
_MAX_PART_ELEMENTS_ELSEWHERE = 2**26


def next_token_cross_entropy(logits_BTV: torch.Tensor, ids_BT: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token in nats, a float32 scalar."""
    # The last position predicts nothing; slicing it off the logits would copy them.
    labels_BT = torch.cat([ids_BT[:, 1:], torch.full_like(ids_BT[:, :1], -1)], dim=1)
    return _CrossEntropy.apply(logits_BTV.flatten(0, 1), labels_BT.flatten())


def forward_kl(teacher_logits_BTV: torch.Tensor, student_logits_BTV: torch.Tensor) -> torch.Tensor:
    """Mean KL(teacher || student) at temperature 1 in nats, a float32 scalar; only the student gets gradients."""
    return _ForwardKL.apply(student_logits_BTV.flatten(0, 1), teacher_logits_BTV.detach().flatten(0, 1))


class _CrossEntropy(torch.autograd.Function):
    """Mean over the rows whose label is not -1."""

    @staticmethod
    def forward(ctx: Any, logits_RV: torch.Tensor, labels_R: torch.Tensor) -> torch.Tensor:
        grad_RV = torch.empty_like(logits_RV) if ctx.needs_input_grad[0] else None
        counts_R = labels_R >= 0
        share_R = counts_R / counts_R.sum()
        total = torch.zeros((), device=logits_RV.device)
        for rows in _parts(logits_RV):
            labels_P1, share_P1 = labels_R[rows].clamp_min(0)[:, None], share_R[rows, None]
            log_q_PV = logits_RV[rows].float().log_softmax(dim=-1)
            total -= (log_q_PV.gather(-1, labels_P1) * share_P1).sum()
            if grad_RV is not None:
                grad_PV = log_q_PV.exp_().mul_(share_P1)
                grad_RV[rows] = grad_PV.scatter_add_(-1, labels_P1, -share_P1)
        ctx.save_for_backward(grad_RV)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (grad_RV,) = ctx.saved_tensors
        return grad_RV * d_loss, None


class _ForwardKL(torch.autograd.Function):
    """Mean over the rows."""

    @staticmethod
    def forward(ctx: Any, student_RV: torch.Tensor, teacher_RV: torch.Tensor) -> torch.Tensor:
        grad_RV = torch.empty_like(student_RV) if ctx.needs_input_grad[0] else None
        num_rows = len(student_RV)
        total = torch.zeros((), device=student_RV.device)
        for rows in _parts(student_RV):
            log_p_PV, log_q_PV = (x_RV[rows].float().log_softmax(dim=-1) for x_RV in (teacher_RV, student_RV))
            p_PV = log_p_PV.exp()
            total += log_p_PV.sub_(log_q_PV).mul_(p_PV).sum()
            if grad_RV is not None:
                grad_RV[rows] = log_q_PV.exp_().sub_(p_PV).div_(num_rows)
        ctx.save_for_backward(grad_RV)
        return total / num_rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (grad_RV,) = ctx.saved_tensors
        return grad_RV * d_loss, None


def _parts(logits_RV: torch.Tensor) -> Iterator[slice]:
    limit = _MAX_PART_ELEMENTS.get(logits_RV.device.type, _MAX_PART_ELEMENTS_ELSEWHERE)
    num_rows = max(1, limit // logits_RV.shape[-1])
    for start in range(0, len(logits_RV), num_rows):
        yield slice(start, start + num_rows)


def heldout_batches(windows: PackedWindows, config: JobConfig, world: World) -> Iterator[torch.Tensor]:
    """This process's evaluation windows, spread evenly over the split, in micro-batches int64 [B, T] on the device."""
    num_windows = min(config.data.eval_sequences, len(windows))
    num_windows = max(world.size, num_windows - num_windows % world.size)
    places = world.share([index * len(windows) // num_windows for index in range(num_windows)])
    size = config.loop.micro_batch_size or config.loop.batch_size // world.size
    for start in range(0, len(places), size):
        yield torch.stack([windows.window(place) for place in places[start : start + size]]).to(world.device)
