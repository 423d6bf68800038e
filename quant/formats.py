"""Number formats other than MXFP4, for ablations: fake-quantization and sizes.

A format is a block shape, a scale rule and an element type. `fake_quantize` rounds with the straight-through gradient:
to nearest, ties to even, saturating, in float32, then to bfloat16 if the weight is. Float elements keep the sign of
zero.

    mxfp4          `speedstack.quant.mxfp4`
    mxfp6_e2m3     E2M3 (5.3.2: largest 7.5), E8M0 scale a block of 32; OCP Microscaling Formats v1.0, clauses as cited
    mxfp6_e3m2     E3M2 (5.3.2: largest 28), E8M0 scale a block of 32
    mxfp8_e4m3     E4M3 (5.3.1: largest 448, no infinity), E8M0 scale a block of 32
    nvfp4          E2M1, E4M3 scale a block of 16, float32 scale a matrix (arXiv 2509.25149); rounded as in
    compressed-tensors' `nvfp4-pack-quantized`
    int4_g32       integers -7 to 7, bfloat16 scale amax / 7 a block of 32, as Kimi K2 Thinking was trained; stored in
    compressed-tensors' `pack-quantized`
    int2_g32       integers -1 to 1, bfloat16 scale amax a block of 32: bad on purpose, for measurements that must
    notice; most weights of a bell-shaped block become zero
    fp8_block128   E4M3, float32 scale amax / 448 a block of 128 x 128 (DeepSeek-V3, arXiv 2412.19437, section 3.3.2)

Left out: packed storage (only MXFP4 has it), activations, and compiled kernels.

Shape suffixes: N = any leading dimensions, K = contraction, G = blocks, B = elements of a block; R = rows of a matrix.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch.nn import functional as F

from speedstack.quant import mxfp4
from speedstack.quant.fp8 import quotient, scales_of
from speedstack.quant.mxfp4 import DEFAULT_SCALE_RULE, ScaleRule, least_error_scales, power_of_two

FormatName = Literal["mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "nvfp4", "int4_g32", "int2_g32", "fp8_block128"]

_F32_MANTISSA_BITS = 23
_F32_EXPONENT_BIAS = 127
_F32_INFINITY_BITS = 0x7F800000
_NAN_SCALE = 255


@dataclass(frozen=True)
class FloatElement:
    """A float type with subnormals: mantissa bits, exponents of smallest normal and largest, largest value."""

    mantissa_bits: int
    min_exponent: int
    max_exponent: int
    max_value: float

    def round(self, y: torch.Tensor) -> torch.Tensor:
        """Float32 rounded to this type: nearest, ties to even, saturating; NaN and signed zeros stay.

        Adding 1.5 * 2**23 steps puts the type's step in float32's last place, so the addition rounds.
        """
        y = y.clamp(-self.max_value, self.max_value)
        smallest_normal_bits = (self.min_exponent + _F32_EXPONENT_BIAS) << _F32_MANTISSA_BITS
        binade_bits = (y.view(torch.int32) & _F32_INFINITY_BITS).clamp_(min=smallest_normal_bits)
        steps_bits = (_F32_MANTISSA_BITS - self.mantissa_bits) << _F32_MANTISSA_BITS
        one_and_a_half_bits = 1 << (_F32_MANTISSA_BITS - 1)
        magic = (binade_bits + (steps_bits + one_and_a_half_bits)).view(torch.float32)
        return (y + magic).sub_(magic).copysign_(y)


E2M1 = FloatElement(mantissa_bits=1, min_exponent=0, max_exponent=2, max_value=6.0)
E2M3 = FloatElement(mantissa_bits=3, min_exponent=0, max_exponent=2, max_value=7.5)
E3M2 = FloatElement(mantissa_bits=2, min_exponent=-2, max_exponent=4, max_value=28.0)
E4M3 = FloatElement(mantissa_bits=3, min_exponent=-6, max_exponent=8, max_value=448.0)


@dataclass(frozen=True)
class NumberFormat:
    """A format. `block_shape`: rows and columns (contraction) per scale of `scale_bits`.

    `bits_per_weight` counts block scales, not `nvfp4`'s float32 per matrix or `fp8_block128`'s partial edge blocks.
    """

    name: FormatName
    block_shape: tuple[int, int]
    element_bits: int
    scale_bits: int
    has_scale_rule: bool
    round: Callable[[torch.Tensor, ScaleRule], torch.Tensor]

    @property
    def bits_per_weight(self) -> float:
        """Bits per element with its share of the block's scale."""
        rows, columns = self.block_shape
        return self.element_bits + self.scale_bits / (rows * columns)

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of weights with matrices [out, in] last: elements, block scales, `nvfp4`'s matrix scales."""
        *stack, num_rows, num_columns = shape
        rows, columns = self.block_shape
        num_blocks = -(-num_rows // rows) * -(-num_columns // columns)
        matrix_scale_bits = 32 if self.name == "nvfp4" else 0
        bits = num_rows * num_columns * self.element_bits + num_blocks * self.scale_bits + matrix_scale_bits
        return math.prod(stack) * bits // 8


def number_format(name: str) -> NumberFormat:
    """The format of that name. Raises ValueError for an unknown one."""
    if name not in FORMATS:
        raise ValueError(f"unknown number format {name!r}: choose one of {', '.join(get_args(FormatName))}")
    return FORMATS[cast(FormatName, name)]


def fake_quantize(w_NK: torch.Tensor, name: FormatName, scale_rule: ScaleRule | None = None) -> torch.Tensor:
    """Float32 or bfloat16 [..., K] rounded to the format `name`, in the same dtype; straight-through gradient.

    `scale_rule`: for power-of-two scales (mx formats); None is the default. X is the largest power of two such that the
    block's largest magnitude is at least X times the type's largest power of two, M the type's largest value (6, 7.5,
    28, 448):
        floor   X (OCP 6.3)
        rceil   X, or 2 X if anything would clip
        even    2 X from M plus half a step on, which the wider grid represents better, else X
        mse     whichever of X / 2, X, 2 X has the least squared error over the block; X if equal
    A block with NaN or infinity becomes NaN (a whole matrix in `nvfp4`).

    Raises ValueError for an unknown format or rule, a rule for a format without one, another dtype, K not a multiple of
    the block, and fewer than two dimensions if blocks have rows.
    """
    chosen = number_format(name)
    if scale_rule is not None and not chosen.has_scale_rule:
        raise ValueError(f"{name} has no scale rule, got {scale_rule!r}: rules choose between powers of two")
    if name == "mxfp4":
        return mxfp4.fake_quantize(w_NK, scale_rule or DEFAULT_SCALE_RULE)
    return _FakeQuantize.apply(w_NK, chosen, scale_rule or DEFAULT_SCALE_RULE)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w_NK: torch.Tensor, chosen: NumberFormat, scale_rule: ScaleRule) -> torch.Tensor:
        _check(w_NK, chosen, scale_rule)
        return chosen.round(w_NK.float().contiguous(), scale_rule).to(w_NK.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grads[0], None, None


def _check(w_NK: torch.Tensor, chosen: NumberFormat, scale_rule: ScaleRule) -> None:
    if scale_rule not in get_args(ScaleRule):
        raise ValueError(f"unknown scale rule {scale_rule!r}: choose one of {', '.join(get_args(ScaleRule))}")
    if w_NK.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"{chosen.name} quantizes float32 or bfloat16, got {w_NK.dtype}: cast the weights first")
    rows, columns = chosen.block_shape
    if rows > 1:
        if w_NK.ndim < 2 or w_NK.numel() == 0:
            raise ValueError(f"{chosen.name} needs matrices, got shape {tuple(w_NK.shape)}")
    elif w_NK.ndim == 0 or w_NK.shape[-1] == 0 or w_NK.shape[-1] % columns:
        raise ValueError(
            f"{chosen.name} needs a last dimension that is a multiple of {columns}, got shape {tuple(w_NK.shape)}: "
            "choose sizes of the model accordingly"
        )


def _mx(element: FloatElement) -> Callable[[torch.Tensor, ScaleRule], torch.Tensor]:
    """Rounds to blocks of 32 with E8M0 scales (OCP v1.0, 5.4.1 and 6.3)."""
    # The part of a binade above the largest value, and half the type's step: see `fake_quantize`.
    above = 2.0 - element.max_value / 2.0**element.max_exponent
    half_step = 2.0 ** -(element.mantissa_bits + 1)
    one = 1 << _F32_MANTISSA_BITS
    # Added to the bits of a block's largest magnitude; a mantissa carry raises the scale.
    carries = {"floor": 0, "mse": 0, "rceil": int(above * one) - 1, "even": int((above - half_step) * one)}
    # Keeps the largest value times the largest scale below float32's overflow.
    max_scale = 2 * _F32_EXPONENT_BIAS - element.max_exponent

    def snap(w_NGB: torch.Tensor, scales_NG: torch.Tensor) -> torch.Tensor:
        y_NGB = element.round(w_NGB * power_of_two(2 * _F32_EXPONENT_BIAS - scales_NG).unsqueeze(-1))
        return y_NGB.mul_(power_of_two(scales_NG).unsqueeze(-1))

    def round_(w_NK: torch.Tensor, scale_rule: ScaleRule) -> torch.Tensor:
        w_NGB = w_NK.unflatten(-1, (-1, 32))
        amax_bits_NG = w_NGB.abs().amax(dim=-1).view(torch.int32)
        exponents_NG = ((amax_bits_NG + carries[scale_rule]) >> _F32_MANTISSA_BITS) - element.max_exponent
        scales_NG = exponents_NG.clamp_(0, max_scale)
        if scale_rule == "mse":
            scales_NG = least_error_scales(w_NGB, scales_NG, snap, max_scale)
        scales_NG = scales_NG.masked_fill(amax_bits_NG >= _F32_INFINITY_BITS, _NAN_SCALE)
        return snap(w_NGB, scales_NG).view(w_NK.shape)

    return round_


def _nvfp4(w_NK: torch.Tensor, scale_rule: ScaleRule) -> torch.Tensor:
    w_NRK = w_NK if w_NK.ndim > 1 else w_NK.unsqueeze(0)
    w_NRGB = w_NRK.unflatten(-1, (-1, 16))
    amax_NRG = w_NRGB.abs().amax(dim=-1)
    amax_N = amax_NRG.amax(dim=(-2, -1), keepdim=True)
    smallest_normal = torch.finfo(torch.float32).tiny
    # The matrix scale spreads block scales over E4M3's range; its inverse multiplies the values. torch computes number
    # / tensor as number times reciprocal, and so does compressed-tensors.
    global_N = E4M3.max_value * E2M1.max_value / amax_N.clamp(min=smallest_normal)
    global_N = torch.where(global_N.isinf(), 1.0, global_N)
    block_scale_NRG = E4M3.round(global_N * quotient(amax_NRG, E2M1.max_value))
    scale_NRG = block_scale_NRG / global_N
    # A block whose scale rounds to zero becomes zeros.
    is_zero_NRG = scale_NRG == 0
    y_NRGB = E2M1.round(w_NRGB / scale_NRG.masked_fill(is_zero_NRG, torch.inf).unsqueeze(-1))
    y_NRGB.mul_(scale_NRG.unsqueeze(-1))
    return _nan_where_not_finite(y_NRGB, amax_N.unsqueeze(-1)).view(w_NK.shape)


def _integers(largest: int) -> Callable[[torch.Tensor, ScaleRule], torch.Tensor]:
    """Rounds to integers up to `largest` in magnitude, with bfloat16 scales of blocks of 32."""

    def round_(w_NK: torch.Tensor, scale_rule: ScaleRule) -> torch.Tensor:
        w_NGB = w_NK.unflatten(-1, (-1, 32))
        amax_NG1 = w_NGB.abs().amax(dim=-1, keepdim=True)
        # Otherwise the largest float32 values would get an infinite scale.
        scale_NG1 = quotient(amax_NG1, largest).clamp(max=torch.finfo(torch.bfloat16).max).bfloat16().float()
        scale_NG1 = torch.where(scale_NG1 == 0, 1.0, scale_NG1)
        # Adding 0 turns a negative zero into the integers' only zero.
        y_NGB = (w_NGB / scale_NG1).round_().clamp_(-largest, largest).add_(0.0).mul_(scale_NG1)
        return _nan_where_not_finite(y_NGB, amax_NG1).view(w_NK.shape)

    return round_


def _fp8_block128(w_NK: torch.Tensor, scale_rule: ScaleRule) -> torch.Tensor:
    num_rows, num_columns = w_NK.shape[-2:]
    # Zero padding changes no block's largest magnitude.
    padded = F.pad(w_NK, (0, -num_columns % 128, 0, -num_rows % 128))
    w_NGBGB = padded.unflatten(-1, (-1, 128)).unflatten(-3, (-1, 128))
    amax = w_NGBGB.abs().amax(dim=(-3, -1), keepdim=True)
    scale = scales_of(amax)
    y_NGBGB = _nan_where_not_finite(E4M3.round(w_NGBGB / scale).mul_(scale), amax)
    return y_NGBGB.flatten(-4, -3).flatten(-2, -1)[..., :num_rows, :num_columns].contiguous()


def _nan_where_not_finite(y: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    return y.masked_fill_(~amax.isfinite(), torch.nan)


FORMATS: dict[FormatName, NumberFormat] = {
    each.name: each
    for each in (
        NumberFormat("mxfp4", (1, 32), 4, 8, True, _mx(E2M1)),
        NumberFormat("mxfp6_e2m3", (1, 32), 6, 8, True, _mx(E2M3)),
        NumberFormat("mxfp6_e3m2", (1, 32), 6, 8, True, _mx(E3M2)),
        NumberFormat("mxfp8_e4m3", (1, 32), 8, 8, True, _mx(E4M3)),
        NumberFormat("nvfp4", (1, 16), 4, 8, False, _nvfp4),
        NumberFormat("int4_g32", (1, 32), 4, 16, False, _integers(7)),
        NumberFormat("int2_g32", (1, 32), 2, 16, False, _integers(1)),
        NumberFormat("fp8_block128", (128, 128), 8, 32, False, _fp8_block128),
    )
}
