"""How the MXFP4 values of the masters move during training: flips and oscillation.

A master flips when it crosses the middle between two grid values, and oscillates when it is pushed back and forth; its
final value is then chance. Both cost accuracy (TetraJet, arXiv 2502.20853, section 5). Every `look_every` steps:

    flips_since_start   share of the weights whose value differs from the one before the first step
    flips_since_look    share of the weights whose value changed between the last two looks
    oscillating         share of the weights that returned to the value they had just left, within the last 8 looks

A value is code times scale, so a new block scale alone is no flip. Packed codes of a sample are kept, 0.53 bytes a
weight and look: every n-th row of each tensor, through its experts, about 4M weights in all. For a larger model the
shares are estimates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import nn

from speedstack.quant.experts import contraction_last, routed_experts, weight_names
from speedstack.quant.mxfp4 import MXFP4Tensor, ScaleRule, quantize
from speedstack.train.core.sharding import gathered, whole_shape

_MAX_WEIGHTS = 2**22
_NUM_LOOKS = 8

Look = dict[str, MXFP4Tensor]


class FlipWatch:
    """The looks at one model's routed experts, the first at once. All processes look together and hold the same."""

    def __init__(self, model: nn.Module, scale_rule: ScaleRule) -> None:
        self._model = model
        self._scale_rule = scale_rule
        total = sum(whole_shape(getattr(experts, name)).numel() for _, experts, name in self._weights())
        self._stride = max(1, -(-total // _MAX_WEIGHTS))
        self._start = self._quantized()
        self._looks = [self._start]

    @property
    def has_looked(self) -> bool:
        """Whether there was a look after the first."""
        return len(self._looks) > 1

    def look(self) -> None:
        """Remember the masters' current values."""
        self._looks = [*self._looks, self._quantized()][-_NUM_LOOKS:]

    def metrics(self) -> dict[str, float]:
        """The shares above at the last look."""
        sums = dict.fromkeys(("flips_since_start", "flips_since_look", "oscillating"), 0)
        num_watched = 0
        for name, start in self._start.items():
            values = [look[name].dequantize(torch.bfloat16) for look in self._looks]
            sums["flips_since_start"] += _num_true(values[-1] != start.dequantize(torch.bfloat16))
            sums["flips_since_look"] += _num_true(values[-1] != values[max(0, len(values) - 2)])
            sums["oscillating"] += _num_true(_came_back(values))
            num_watched += values[-1].numel()
        return {key: total / num_watched for key, total in sums.items()}

    def state(self) -> dict[str, torch.Tensor]:
        """Tensors for a resumed run: all looks but the first, which it repeats."""
        return {
            f"look.{index}.{name}.{part}": getattr(packed, part).cpu()
            for index, look in enumerate(self._looks)
            for name, packed in look.items()
            for part in ("codes", "scales")
        }

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continue from what `state` returned. Raises ValueError if it is empty or of another model."""
        num_looks = len({name.split(".")[1] for name in tensors})
        expected = {
            f"look.{index}.{name}.{part}": getattr(packed, part)
            for index in range(num_looks)
            for name, packed in self._start.items()
            for part in ("codes", "scales")
        }
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        if not num_looks or shapes != {name: tensor.shape for name, tensor in expected.items()}:
            raise ValueError("the checkpoint has no record of flips that is of this model")
        moved = {name: tensor.to(expected[name].device) for name, tensor in tensors.items()}
        self._looks = [
            {
                name: MXFP4Tensor(moved[f"look.{index}.{name}.codes"], moved[f"look.{index}.{name}.scales"])
                for name in self._start
            }
            for index in range(num_looks)
        ]

    def _weights(self) -> list[tuple[str, nn.Module, str]]:
        return [
            (f"{module_name}.{name}", experts, name)
            for module_name, experts in routed_experts(self._model).items()
            for name in weight_names(experts)
        ]

    @torch.no_grad()
    def _quantized(self) -> Look:
        look = {}
        for full_name, experts, name in self._weights():
            with gathered([getattr(experts, name)]):
                look[full_name] = quantize(self._sample(experts, getattr(experts, name)), self._scale_rule)
        return look

    def _sample(self, experts: nn.Module, weight: torch.Tensor) -> torch.Tensor:
        """The watched rows of a weight, [rows, K]."""
        weight_EOK = contraction_last(experts, weight)
        num_experts, num_rows, _ = weight_EOK.shape
        stride = self._stride
        # A step must not meet the same rows in every expert, nor gate rows alone where gate and up take turns.
        while stride > 1 and math.gcd(stride, num_rows) > 1:
            stride += 1
        places = torch.arange(0, num_experts * num_rows, stride, device=weight.device)
        return weight_EOK[places // num_rows, places % num_rows]


def _came_back(values: list[torch.Tensor]) -> torch.Tensor:
    """Where a value was left for another and taken again later, bool; `values` are those of successive looks."""
    # NaN equals nothing: no weight has left a value yet.
    left = torch.full_like(values[0], torch.nan)
    came_back = torch.zeros_like(values[0], dtype=torch.bool)
    for before, after in pairwise(values):
        changed = before != after
        came_back |= changed & (after == left)
        left = torch.where(changed, before, left)
    return came_back


def _num_true(mask: torch.Tensor) -> int:
    return int(mask.sum().item())
