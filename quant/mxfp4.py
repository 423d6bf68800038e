"""The one definition of MXFP4: E2M1 elements in blocks of 32 with one E8M0 scale (OCP Microscaling Formats v1.0).

Fake-quant, post-training quantization, exporter and kernels all agree with this file bit for bit. Arithmetic is integer
or exact floating point, the same on every device: a scale byte comes from the bits of the largest magnitude, never from
`log2`; an element is rounded by adding and subtracting a constant whose last place is the grid's step.

`quantize`, `dequantize` and `fake_quantize` use compiled kernels (`speedstack.quant.kernels`): C++ on a CPU with a
compiler, Triton on a GPU. Without one, the `*_reference` definitions in PyTorch run; only speed differs.

Layout: blocks lie along the last (contraction) dimension. A byte of `codes` has element 2i in its low nibble and 2i + 1
in its high nibble; a code is sign * 8 + index into 0, .5, 1, 1.5, 2, 3, 4, 6. A scale byte b means 2**(b - 127); 255 is
NaN. compressed-tensors' `mxfp4-pack-quantized`, MiMo and DeepSeek-V4 use these bytes.

Left out: activations, stochastic rounding, and ties toward zero as ModelOpt rounds them.

Shape suffixes: N = any leading dimensions, K = contraction, G = K / 32 blocks, B = 32 elements of a block, H = K / 2.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from speedstack.quant.kernels import kernels_for

BLOCK_SIZE = 32
ScaleRule = Literal["floor", "rceil", "even", "mse"]
DEFAULT_SCALE_RULE: ScaleRule = "even"

E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_VALUES = E2M1_MAGNITUDES + tuple(-magnitude for magnitude in E2M1_MAGNITUDES)
_E2M1_MAX = 6.0
_E2M1_MAX_EXPONENT = 2

_NAN_SCALE = 255
# 6 * 2**125 is the largest MXFP4 value below float32's overflow; larger scales are never chosen, so a block near
# float32's maximum saturates instead of becoming infinite.
_MAX_SCALE = 127 + 125

_F32_MANTISSA_BITS = 23
_F32_INFINITY_BITS = 0x7F800000
_F32_NAN_BITS = 0x7FC00000
_F32_ONE_BITS = 0x3F800000

# Added to the bits of a block's largest magnitude; a mantissa carry doubles the scale. `even` carries from 1.75 on,
# `rceil` above 1.5 (that is, above 6 / 4).
_EXPONENT_CARRY = {"floor": 0, "even": 0x200000, "rceil": 0x3FFFFF}

_FLOAT_DTYPES = (torch.float32, torch.bfloat16)
_NON_FINITE = "cannot quantize NaN or infinity to MXFP4: check the weights (a diverged run, a bad download)"


@dataclass(frozen=True, eq=False)
class MXFP4Tensor:
    """A packed tensor of shape [..., K]. Raises ValueError for inconsistent dtypes or shapes.

    codes: uint8 [..., K / 2], two elements a byte, the even one in the low nibble. scales: uint8 [..., K / 32], E8M0.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.uint8 or self.scales.dtype != torch.uint8:
            raise ValueError(f"MXFP4 codes and scales are uint8, got {self.codes.dtype} and {self.scales.dtype}")
        num_codes = self.codes.shape[-1] * 2
        if self.codes.shape[:-1] != self.scales.shape[:-1] or num_codes != self.scales.shape[-1] * BLOCK_SIZE:
            raise ValueError(
                f"MXFP4 codes {tuple(self.codes.shape)} need scales of shape "
                f"{(*self.codes.shape[:-1], num_codes // BLOCK_SIZE)}, got {tuple(self.scales.shape)}"
            )

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor that `dequantize` returns."""
        return torch.Size((*self.codes.shape[:-1], self.codes.shape[-1] * 2))

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales: 4.25 bits an element."""
        return self.codes.nbytes + self.scales.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """See `dequantize`."""
        return dequantize(self, dtype)

    def to(self, device: torch.device | str) -> "MXFP4Tensor":
        """The same bytes on `device`."""
        return MXFP4Tensor(self.codes.to(device), self.scales.to(device))


def quantize(w_NK: torch.Tensor, scale_rule: ScaleRule = DEFAULT_SCALE_RULE) -> MXFP4Tensor:
    """Rounds float32 or bfloat16 [..., K] to MXFP4 blocks along the last dimension.

    Elements round to nearest, ties to even, saturate at 6 scales, and keep their sign (-0 is code 8); a zero block has
    scale byte 0. With X the largest power of two such that the block's largest magnitude is at least 4 X, the scale is
        floor   X (OCP v1.0 6.3: clips magnitudes above 6 X)
        rceil   X, or 2 X if anything would clip (never clips)
        even    2 X from 7 X on, which the nearest element of the wider grid represents better, else X
        mse     whichever of X / 2, X, 2 X has the least squared error over the block; X if equal

    Raises ValueError for another dtype, K not a multiple of 32, an unknown rule, NaN or infinity.
    """
    _check(w_NK, scale_rule)
    kernels = kernels_for(w_NK)
    if kernels is None:
        return quantize_reference(w_NK, scale_rule)
    codes_NH, scales_NG = kernels.quantize(w_NK.contiguous(), scale_rule)
    if (scales_NG == _NAN_SCALE).any():
        raise ValueError(_NON_FINITE)
    return MXFP4Tensor(codes_NH, scales_NG)


def quantize_reference(w_NK: torch.Tensor, scale_rule: ScaleRule = DEFAULT_SCALE_RULE) -> MXFP4Tensor:
    """`quantize` in PyTorch."""
    w_NGB = _blocks(w_NK, scale_rule)
    scales_NG = scale_bytes(w_NGB, scale_rule)
    if (scales_NG == _NAN_SCALE).any():
        raise ValueError(_NON_FINITE)
    y_NGB = _round_to_grid(w_NGB, scales_NG)
    code_of_doubled_magnitude = torch.zeros(13, dtype=torch.uint8, device=w_NK.device)
    for code, magnitude in enumerate(E2M1_MAGNITUDES):
        code_of_doubled_magnitude[int(2 * magnitude)] = code
    codes_NGB = code_of_doubled_magnitude[(y_NGB.abs() * 2).int()]
    codes_NK = (codes_NGB | (torch.signbit(y_NGB).to(torch.uint8) << 3)).view(w_NK.shape)
    codes_NH = codes_NK[..., 0::2] | (codes_NK[..., 1::2] << 4)
    return MXFP4Tensor(codes_NH, scales_NG.to(torch.uint8))


def dequantize(tensor: MXFP4Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The values [..., K], exact in float32 and bfloat16.

    Scale byte 255 makes its block NaN. Bytes 253 and 254, which `quantize` never writes, may overflow to infinity.
    Raises ValueError for a dtype that cannot hold the scales' range, such as float16.
    """
    if dtype not in _FLOAT_DTYPES:
        raise ValueError(f"MXFP4 values need the range of float32 or bfloat16, not {dtype}: cast them afterwards")
    kernels = kernels_for(tensor.codes, tensor.scales)
    if kernels is None:
        return dequantize_reference(tensor, dtype)
    return kernels.dequantize(tensor.codes.contiguous(), tensor.scales.contiguous(), dtype)


def dequantize_reference(tensor: MXFP4Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """`dequantize` in PyTorch."""
    codes_NH = tensor.codes
    codes_NK = torch.stack((codes_NH & 0xF, codes_NH >> 4), dim=-1).flatten(-2)
    values = torch.tensor(E2M1_VALUES, dtype=dtype, device=codes_NH.device)
    y_NGB = values[codes_NK.int()].unflatten(-1, (-1, BLOCK_SIZE))
    scale_NG = power_of_two(tensor.scales.to(torch.int32)).to(dtype)
    return y_NGB.mul_(scale_NG.unsqueeze(-1)).flatten(-2)


def fake_quantize(w_NK: torch.Tensor, scale_rule: ScaleRule = DEFAULT_SCALE_RULE) -> torch.Tensor:
    """`dequantize(quantize(w), w.dtype)` bit for bit, with the straight-through gradient, also for saturated elements.

    Float32 or bfloat16 [..., K]. A block with NaN or infinity becomes NaN and shows in the loss; checking would stall a
    GPU at every call. Raises ValueError for another dtype, K not a multiple of 32, or an unknown rule.
    """
    return _FakeQuantize.apply(w_NK, scale_rule)


def fake_quantize_reference(w_NK: torch.Tensor, scale_rule: ScaleRule = DEFAULT_SCALE_RULE) -> torch.Tensor:
    """The forward of `fake_quantize` in PyTorch."""
    w_NGB = _blocks(w_NK, scale_rule)
    scales_NG = scale_bytes(w_NGB, scale_rule)
    return snap(w_NGB, scales_NG).view(w_NK.shape).to(w_NK.dtype)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w_NK: torch.Tensor, scale_rule: ScaleRule) -> torch.Tensor:
        _check(w_NK, scale_rule)
        kernels = kernels_for(w_NK)
        if kernels is None:
            return fake_quantize_reference(w_NK, scale_rule)
        return kernels.fake_quantize(w_NK.contiguous(), scale_rule)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


def _check(w_NK: torch.Tensor, scale_rule: ScaleRule) -> None:
    if scale_rule not in get_args(ScaleRule):
        raise ValueError(f"unknown scale rule {scale_rule!r}: choose one of {', '.join(get_args(ScaleRule))}")
    if w_NK.dtype not in _FLOAT_DTYPES:
        raise ValueError(f"MXFP4 quantizes float32 or bfloat16, got {w_NK.dtype}: cast the weights first")
    if w_NK.ndim == 0 or w_NK.shape[-1] == 0 or w_NK.shape[-1] % BLOCK_SIZE:
        raise ValueError(
            f"MXFP4 needs a last dimension that is a multiple of {BLOCK_SIZE}, got shape {tuple(w_NK.shape)}: "
            "choose sizes of the model accordingly"
        )


def _blocks(w_NK: torch.Tensor, scale_rule: ScaleRule) -> torch.Tensor:
    """Checks the arguments; returns w as contiguous float32 blocks."""
    _check(w_NK, scale_rule)
    return w_NK.float().contiguous().unflatten(-1, (-1, BLOCK_SIZE))


def scale_bytes(w_NGB: torch.Tensor, scale_rule: ScaleRule) -> torch.Tensor:
    """E8M0 scale of each block as int32; 255 (NaN) for a block with NaN or infinity."""
    amax_bits_NG = w_NGB.abs().amax(dim=-1).view(torch.int32)
    carry = _EXPONENT_CARRY["floor" if scale_rule == "mse" else scale_rule]
    exponents_NG = ((amax_bits_NG + carry) >> _F32_MANTISSA_BITS) - _E2M1_MAX_EXPONENT
    scales_NG = exponents_NG.clamp_(0, _MAX_SCALE)
    if scale_rule == "mse":
        scales_NG = least_error_scales(w_NGB, scales_NG, snap, _MAX_SCALE)
    return scales_NG.masked_fill_(amax_bits_NG >= _F32_INFINITY_BITS, _NAN_SCALE)


def least_error_scales(
    w_NGB: torch.Tensor,
    floor_scales_NG: torch.Tensor,
    snap: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    max_scale: int,
) -> torch.Tensor:
    """The scale byte among the given, the next and the previous one with the least squared error; the given if equal.

    `snap` gives the values of blocks under scale bytes, of MXFP4 or another format.
    """
    best_scales_NG = floor_scales_NG
    best_errors_NG = _squared_errors(snap(w_NGB, floor_scales_NG), w_NGB)
    for step in (1, -1):
        scales_NG = (floor_scales_NG + step).clamp_(0, max_scale)
        errors_NG = _squared_errors(snap(w_NGB, scales_NG), w_NGB)
        is_better_NG = errors_NG < best_errors_NG
        best_scales_NG = torch.where(is_better_NG, scales_NG, best_scales_NG)
        best_errors_NG = torch.where(is_better_NG, errors_NG, best_errors_NG)
    return best_scales_NG


def _squared_errors(values_NGB: torch.Tensor, w_NGB: torch.Tensor) -> torch.Tensor:
    """Squared error of each block in float64, which cannot overflow or vanish.

    Summed over a fixed tree: the order of `sum` depends on the device and could break a tie differently.
    """
    errors = (values_NGB.double() - w_NGB.double()).square_()
    while errors.shape[-1] > 1:
        low, high = errors.chunk(2, dim=-1)
        errors = low + high
    return errors.squeeze(-1)


def snap(w_NGB: torch.Tensor, scales_NG: torch.Tensor) -> torch.Tensor:
    """Each element replaced by its MXFP4 value."""
    return _round_to_grid(w_NGB, scales_NG).mul_(power_of_two(scales_NG).unsqueeze(-1))


def _round_to_grid(w_NGB: torch.Tensor, scales_NG: torch.Tensor) -> torch.Tensor:
    """w / scale rounded to the nearest E2M1 value, ties to even, saturating, signed zeros kept.

    The grid's step is 0.5 below 2, 1 below 4 and 2 above. Adding 1.5 * 2**23 steps puts the step in float32's last
    place, so the addition rounds to even; 1.5 instead of 1 keeps a negative element in the binade.
    """
    y_NGB = w_NGB * power_of_two(2 * 127 - scales_NG).unsqueeze(-1)
    binade_bits_NGB = (y_NGB.view(torch.int32) & _F32_INFINITY_BITS).clamp_(min=_F32_ONE_BITS)
    half_steps_bits = 22 << _F32_MANTISSA_BITS
    one_and_a_half_bits = 1 << (_F32_MANTISSA_BITS - 1)
    magic_NGB = (binade_bits_NGB + (half_steps_bits + one_and_a_half_bits)).view(torch.float32)
    y_NGB.add_(magic_NGB).sub_(magic_NGB).clamp_(-_E2M1_MAX, _E2M1_MAX)
    return y_NGB.copysign_(w_NGB)


def power_of_two(scale: torch.Tensor) -> torch.Tensor:
    """2**(scale - 127) in float32 for int32 0 to 254; NaN otherwise. Exact, which `exp2` is not on every device."""
    normal_bits = scale << _F32_MANTISSA_BITS
    subnormal_bits = 1 << (_F32_MANTISSA_BITS - 1)
    bits = torch.where(scale == 0, subnormal_bits, normal_bits)
    is_nan = (scale < 0) | (scale >= _NAN_SCALE)
    return bits.masked_fill_(is_nan, _F32_NAN_BITS).view(torch.float32)
