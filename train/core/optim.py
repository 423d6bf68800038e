"""Optimizers and learning-rate schedules: Muon with AdamW for what is not a hidden matrix, or AdamW throughout.

Muon (K. Jordan, 2024, https://kellerjordan.github.io/posts/muon) replaces a matrix's momentum by the nearest
semi-orthogonal matrix, approximated by a few matrix products. Expert tensors [E, out, in] are stacks of matrices. All
matrices of one shape are orthogonalized in batched products, so that launches do not dominate. `torch.optim.Muon` has
the same update with Jordan's polynomial, but takes 2-D parameters only, one at a time.

Master weights and optimizer state are float32. `set_learning_rate` is called at every step with a pure function of the
step, so there is no scheduler state to save.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.adamw import adamw

from speedstack.train.config.recipes import OptimSection
from speedstack.train.core.precision import is_bfloat16_faster
from speedstack.train.core.sharding import whole_shape

# Odd quintics a x + b x^3 + c x^5, applied in turn: the greedy composition of Polar Express (arXiv 2505.16932). Each
# brings the remaining range as close to 1 as a quintic can; together they map [0.0026, 1] to [0.7, 1.3], about as far
# as five of Jordan's Newton-Schulz steps (0.0015; [0.68, 1.2]). Each is fitted up to 1.05 times the largest possible
# value: beyond that they rise steeply, and bfloat16 products do round to there.
_QUINTICS = (
    (8.0057, -21.4697, 14.4381),
    (3.8939, -2.6314, 0.4500),
    (3.4917, -2.3792, 0.4260),
    (2.6204, -1.7943, 0.3721),
)
# Elements of one batch; bounds the temporary memory on models with gigabytes of experts.
_MAX_BATCH_ELEMENTS = 2**26
# Elements that a CPU orthogonalizes at once; its caches hold them from one product to the next.
_MAX_CACHED_ELEMENTS = 2**18
# Matrices that are tables or read-outs, not maps between hidden states; AdamW trains them.
_ADAMW_NAMES = ("embed", "lm_head", "gate.weight", "router", "markov")


class Muon(torch.optim.Optimizer):
    """Muon and AdamW in one optimizer, chosen by a group's `algorithm`: "muon" or "adamw".

    Parameters of a Muon group are float32 [..., out, in].
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "num_joined": 1})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "closures are not used by the training loop"
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["algorithm"] == "muon":
                self._muon_step(group, parameters)
            elif parameters:
                self._adamw_step(group, parameters)

    def _muon_step(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        batches: dict[tuple[int, ...], list[torch.Tensor]] = defaultdict(list)
        for parameter in parameters:
            batches[tuple(sorted(_matrix_shape(parameter, group)))].append(parameter)
        for shape, alike in batches.items():
            for chunk in _chunks(alike):
                # A wide matrix and the transpose of a tall one share a batch.
                sizes = [parameter.numel() // math.prod(shape) for parameter in chunk]
                update = torch.empty((sum(sizes), *shape), dtype=torch.float32, device=chunk[0].device)
                for parameter, part in zip(chunk, update.split(sizes), strict=True):
                    self._nesterov(parameter, group, out=_as_parameter(part, parameter, group))
                for parameter, part in zip(chunk, orthogonalize(update).split(sizes), strict=True):
                    num_rows, num_columns = _matrix_shape(parameter, group)
                    if group["weight_decay"]:
                        parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    scale = max(1.0, num_rows / num_columns) ** 0.5
                    part = _as_parameter(part, parameter, group).reshape(parameter.shape)
                    parameter.add_(part, alpha=-group["lr"] * scale)

    def _nesterov(self, parameter: torch.Tensor, group: dict[str, Any], out: torch.Tensor) -> None:
        """Update the momentum with the gradient, and write Nesterov's update into `out`, [..., rows, columns]."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
        torch.lerp(parameter.grad.reshape(out.shape), momentum.reshape(out.shape), group["momentum"], out=out)

    def _adamw_step(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],  # type: ignore[misc]
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _matrix_shape(parameter: torch.Tensor, group: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns of each matrix in the parameter's stack."""
    return parameter.shape[-2] // group["num_joined"], parameter.shape[-1]


def _as_parameter(part: torch.Tensor, parameter: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    """View matrices stored short side first in the parameter's orientation."""
    num_rows, num_columns = _matrix_shape(parameter, group)
    return part if num_rows <= num_columns else part.mT


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Approximately U V^T of each matrix U S V^T: float32 [batch, m, n] with m <= n in and out.

    Singular values end between about 0.7 and 1.3, those below 0.0026 of the matrix's norm lower. That serves as well as
    exactly 1, and so do bfloat16 products (Jordan 2024), which run wherever the hardware multiplies them faster.
    """
    dtype = torch.bfloat16 if is_bfloat16_faster(matrices.device) else torch.float32
    limit = _MAX_CACHED_ELEMENTS if matrices.device.type == "cpu" else matrices.numel()
    result = torch.empty_like(matrices)
    for rows in torch.arange(len(matrices)).split(max(1, limit // matrices[0].numel())):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        norm = matrices[part].norm(dim=(-2, -1), keepdim=True)
        x = (matrices[part] / (norm + 1e-7)).to(dtype)
        for a, b, c in _QUINTICS:
            gram = torch.bmm(x, x.mT)
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        result[part] = x
    return result


def build_optimizer(model: nn.Module, section: OptimSection) -> torch.optim.Optimizer:
    """The optimizer of `section` over the trainable parameters of `model`; each group carries its `peak_lr`.

    Matrices get `weight_decay`, vectors none. Raises ValueError for no parameter or a master that is not float32.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not named:
        raise ValueError("the model has no parameter to train")
    for name, parameter in named:
        if parameter.dtype != torch.float32:
            raise ValueError(f"{name} is {parameter.dtype}: master weights have to be float32, load the model as such")
    matrices = [parameter for name, parameter in named if is_muon_parameter(name, parameter)]
    others = [parameter for name, parameter in named if not is_muon_parameter(name, parameter)]
    if section.name == "adamw":
        matrices, others = [], [parameter for _, parameter in named]
    adamw_lr = section.lr if section.name == "adamw" else section.adamw_lr
    adamw_options = {"betas": section.betas, "eps": section.eps, "peak_lr": adamw_lr, "lr": adamw_lr}
    adamw_groups = [
        {"params": [p for p in others if is_matrix(p)], "weight_decay": section.weight_decay, **adamw_options},
        {"params": [p for p in others if not is_matrix(p)], "weight_decay": 0.0, **adamw_options},
    ]
    adamw_groups = [group for group in adamw_groups if group["params"]]
    if section.name == "adamw":
        return torch.optim.AdamW(adamw_groups, fused=True)
    # A fused gate-and-up projection [E, 2 I, H] is two maps, and two small matrices are cheaper than one large.
    fused = {
        id(module.gate_up_proj)
        for module in model.modules()
        if isinstance(getattr(module, "gate_up_proj", None), nn.Parameter)
        and not getattr(module, "is_transposed", False)
    }
    groups = [
        {
            "params": [parameter for parameter in matrices if (id(parameter) in fused) == is_fused],
            "algorithm": "muon",
            "num_joined": 2 if is_fused else 1,
            "momentum": section.momentum,
            "weight_decay": section.weight_decay,
            "peak_lr": section.lr,
            "lr": section.lr,
        }
        for is_fused in (False, True)
    ]
    groups = [group for group in groups if group["params"]]
    return Muon(groups + [{**group, "algorithm": "adamw"} for group in adamw_groups])


def is_muon_parameter(name: str, parameter: torch.Tensor) -> bool:
    """Whether Muon trains this parameter: a matrix, or a stack of expert matrices, between hidden states."""
    return is_matrix(parameter) and not any(part in name for part in _ADAMW_NAMES)


def is_matrix(parameter: torch.Tensor) -> bool:
    """Whether the whole parameter has two or more dimensions; ZeRO-3 holds a 1-D part of it."""
    return len(whole_shape(parameter)) >= 2


def learning_rate_factor(section: OptimSection, step: int, num_steps: int) -> float:
    """Factor on the peak learning rate in step `step` (from 0) of `num_steps`.

    The final fraction belongs to the step after the last one, so the last step still learns.
    """
    num_warmup_steps = max(1, round(section.warmup_fraction * num_steps))
    if step < num_warmup_steps:
        return (step + 1) / num_warmup_steps
    floor = section.final_lr_fraction
    if section.schedule == "cosine":
        progress = (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    num_decay_steps = round(section.decay_fraction * num_steps)
    if not num_decay_steps:
        return 1.0
    return floor + (1 - floor) * min(1.0, (num_steps - step) / num_decay_steps)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def _chunks(parameters: list[torch.Tensor]) -> Iterable[list[torch.Tensor]]:
    chunk: list[torch.Tensor] = []
    num_elements = 0
    for parameter in parameters:
        if chunk and num_elements + parameter.numel() > _MAX_BATCH_ELEMENTS:
            yield chunk
            chunk, num_elements = [], 0
        chunk.append(parameter)
        num_elements += parameter.numel()
    if chunk:
        yield chunk
