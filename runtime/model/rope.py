"""Rotary position embedding: tables of a layer's cosines and sines, YaRN's too, and the rotation of heads.

Sources: Su et al., "RoFormer" (2021); Peng et al., "YaRN" (2023).

Legend: R rows, N heads, H head dim.
"""

import math

import torch

from speedstack.runtime.model.spec import AttentionSpec, YarnSpec


def rotary_tables(spec: AttentionSpec, num_positions: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, float32 [positions, rotary_dim / 2]."""
    exponents = torch.arange(0, spec.rotary_dim, 2, dtype=torch.float32, device=device) / spec.rotary_dim
    frequencies = 1.0 / spec.rope_theta**exponents
    magnitude = 1.0
    if spec.yarn is not None:
        keep = _yarn_keep(spec.yarn, spec, exponents)
        frequencies = frequencies / spec.yarn.factor * (1 - keep) + frequencies * keep
        magnitude = spec.yarn.magnitude
    angles = torch.arange(num_positions, dtype=torch.float32, device=device)[:, None] * frequencies
    return angles.cos() * magnitude, angles.sin() * magnitude


def _yarn_keep(yarn: YarnSpec, spec: AttentionSpec, like: torch.Tensor) -> torch.Tensor:
    """How much of each frequency stays: 1 for the fast ones, 0 for the slow ones, a ramp between (YaRN, eq. 18)."""

    def dimension(turns: float) -> float:
        """Where a frequency turns that often in the original length."""
        length = yarn.original_length / (turns * 2 * math.pi)
        return spec.rotary_dim * math.log(length) / (2 * math.log(spec.rope_theta))

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.rotary_dim - 1)
    index = torch.arange(len(like), dtype=torch.float32, device=like.device)
    return 1 - ((index - low) / ((high - low) or 0.001)).clamp(0, 1)


def rotate(x_RNH: torch.Tensor, cos_RH: torch.Tensor, sin_RH: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of the leading dimensions of every head, halves paired."""
    half = cos_RH.shape[-1]
    cos, sin = cos_RH[:, None].to(x_RNH.dtype), sin_RH[:, None].to(x_RNH.dtype)
    first, second, rest = x_RNH.split([half, half, x_RNH.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
