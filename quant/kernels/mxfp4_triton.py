"""MXFP4 on a GPU in one pass over memory, in Triton, bit-identical to `speedstack.quant.mxfp4`.

bfloat16 is read and written as 16-bit integers, the upper halves of float32, exactly: Triton's interpreter, used in
tests, does not compute in bfloat16. Launches forbid fused multiply-adds, because `mse` rounds squared errors before
adding.

Shape suffixes: N = leading dimensions, K = contraction, G = blocks (of 32 elements; here those of one program), B = 32
elements of a block, H = B / 2 bytes of codes.
"""

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl

BLOCK_SIZE = 32
# 2,048 elements: each thread of four warps loads 16, two 16-byte loads in bfloat16.
BLOCKS_PER_PROGRAM = 64
NUM_WARPS = 4

_NAN_SCALE = tl.constexpr(255)
_MAX_SCALE = tl.constexpr(127 + 125)
_INFINITY_BITS = tl.constexpr(0x7F800000)
_NAN_BITS = tl.constexpr(0x7FC00000)
_ONE_BITS = tl.constexpr(0x3F800000)
_HALF_BITS = tl.constexpr(0x3F000000)
_MAGNITUDE_BITS = tl.constexpr(0x7FFFFFFF)
_MAGIC_BITS = tl.constexpr((22 << 23) + (1 << 22))
_SIGN_BIT = tl.constexpr(-(2**31))


def quantize(w_NK: torch.Tensor, scale_rule: str) -> tuple[torch.Tensor, torch.Tensor]:
    """See `Kernels`."""
    codes_NH = torch.empty((*w_NK.shape[:-1], w_NK.shape[-1] // 2), dtype=torch.uint8, device=w_NK.device)
    scales_NG = torch.empty((*w_NK.shape[:-1], w_NK.shape[-1] // BLOCK_SIZE), dtype=torch.uint8, device=w_NK.device)
    num_blocks = scales_NG.numel()
    _launch(quantize_kernel, num_blocks, _words(w_NK), codes_NH, scales_NG, num_blocks, RULE=scale_rule)
    return codes_NH, scales_NG


def dequantize(codes_NH: torch.Tensor, scales_NG: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """See `Kernels`."""
    out_NK = torch.empty((*codes_NH.shape[:-1], codes_NH.shape[-1] * 2), dtype=dtype, device=codes_NH.device)
    _launch(dequantize_kernel, scales_NG.numel(), codes_NH, scales_NG, _words(out_NK), scales_NG.numel())
    return out_NK


def fake_quantize(w_NK: torch.Tensor, scale_rule: str) -> torch.Tensor:
    """See `Kernels`."""
    out_NK = torch.empty_like(w_NK)
    num_blocks = w_NK.numel() // BLOCK_SIZE
    _launch(fake_quantize_kernel, num_blocks, _words(w_NK), _words(out_NK), num_blocks, RULE=scale_rule)
    return out_NK


def _words(values: torch.Tensor) -> torch.Tensor:
    """The same memory as the kernels' integers: int32 for float32, int16 for bfloat16."""
    return values.detach().view(torch.int32 if values.dtype == torch.float32 else torch.int16)


def _launch(kernel: Any, num_blocks: int, *arguments: torch.Tensor | int, **options: str) -> None:
    grid = (triton.cdiv(num_blocks, BLOCKS_PER_PROGRAM),)
    first = arguments[0]
    assert isinstance(first, torch.Tensor)
    # Triton launches on the current device, which may not be the tensors'.
    with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
        kernel[grid](*arguments, **options, G=BLOCKS_PER_PROGRAM, num_warps=NUM_WARPS, enable_fp_fusion=False)


@triton.jit
def quantize_kernel(w_ptr, codes_ptr, scales_ptr, num_blocks, RULE: tl.constexpr, G: tl.constexpr):
    """One program: G blocks to codes and scale bytes."""
    block_G = tl.program_id(0).to(tl.int64) * G + tl.arange(0, G)
    valid_G = block_G < num_blocks
    bits_GB = _load(w_ptr, block_G, valid_G)
    magnitude_GB = _magnitude(bits_GB)
    scale_G = _scale_bytes(magnitude_GB, RULE, G)
    magic_GB, sum_GB, binade_GB = _round_to_grid(magnitude_GB, tl.where(scale_G == _NAN_SCALE, 127, scale_G))
    # Steps from the binade's zero, plus two codes for every binade above [1, 2).
    steps_GB = sum_GB.to(tl.int32, bitcast=True) - magic_GB.to(tl.int32, bitcast=True)
    code_GB = tl.minimum(steps_GB + (binade_GB >> 22) - (_ONE_BITS >> 22), 7) | ((bits_GB >> 28) & 8)
    low_GH, high_GH = tl.split(tl.reshape(code_GB, (G, 16, 2)))
    byte_GH = (low_GH & 15) | ((high_GH & 15) << 4)
    offsets_GH = block_G[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(codes_ptr + offsets_GH, byte_GH.to(tl.uint8), mask=valid_G[:, None])
    tl.store(scales_ptr + block_G, scale_G.to(tl.uint8), mask=valid_G)


@triton.jit
def dequantize_kernel(codes_ptr, scales_ptr, out_ptr, num_blocks, G: tl.constexpr):
    """One program: G blocks of codes and scale bytes to values."""
    block_G = tl.program_id(0).to(tl.int64) * G + tl.arange(0, G)
    valid_G = block_G < num_blocks
    offsets_GH = block_G[:, None] * 16 + tl.arange(0, 16)[None, :]
    byte_GH = tl.load(codes_ptr + offsets_GH, mask=valid_G[:, None], other=0).to(tl.int32)
    scale_G = tl.load(scales_ptr + block_G, mask=valid_G, other=127).to(tl.int32)
    code_GB = tl.reshape(tl.join(byte_GH & 15, byte_GH >> 4), (G, 32))
    index_GB = code_GB & 7
    normal_GB = (index_GB << 22) + (_ONE_BITS - (2 << 22))
    value_bits_GB = tl.where(index_GB < 2, index_GB * _HALF_BITS, normal_GB)
    value_GB = value_bits_GB.to(tl.float32, bitcast=True) * _power_of_two(scale_G)[:, None]
    _store(out_ptr, block_G, valid_G, value_GB.to(tl.int32, bitcast=True) | (((code_GB >> 3) & 1) << 31))


@triton.jit
def fake_quantize_kernel(w_ptr, out_ptr, num_blocks, RULE: tl.constexpr, G: tl.constexpr):
    """One program: G blocks to their rounded values."""
    block_G = tl.program_id(0).to(tl.int64) * G + tl.arange(0, G)
    valid_G = block_G < num_blocks
    bits_GB = _load(w_ptr, block_G, valid_G)
    magnitude_GB = _magnitude(bits_GB)
    scale_G = _scale_bytes(magnitude_GB, RULE, G)
    value_bits_GB = _snap(magnitude_GB, scale_G).to(tl.int32, bitcast=True) | (bits_GB & _SIGN_BIT)
    _store(out_ptr, block_G, valid_G, tl.where(scale_G[:, None] == _NAN_SCALE, _NAN_BITS, value_bits_GB))


@triton.jit
def _load(w_ptr, block_G, valid_G):
    """float32 bits [G, 32] of float32 or bfloat16 words."""
    word_GB = tl.load(w_ptr + block_G[:, None] * 32 + tl.arange(0, 32)[None, :], mask=valid_G[:, None], other=0)
    bits_GB = word_GB.to(tl.int32)
    if w_ptr.dtype.element_ty == tl.int16:
        bits_GB = bits_GB << 16
    return bits_GB


@triton.jit
def _store(out_ptr, block_G, valid_G, bits_GB):
    if out_ptr.dtype.element_ty == tl.int16:
        bits_GB = bits_GB >> 16
    word_GB = bits_GB.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + block_G[:, None] * 32 + tl.arange(0, 32)[None, :], word_GB, mask=valid_G[:, None])


@triton.jit
def _magnitude(bits_GB):
    return (bits_GB & _MAGNITUDE_BITS).to(tl.float32, bitcast=True)


@triton.jit
def _scale_bytes(magnitude_GB, RULE: tl.constexpr, G: tl.constexpr):
    """E8M0 scale of each block as int32; 255 (NaN) for a block with NaN or infinity."""
    # Bits of magnitudes order as integers, NaN above infinity.
    amax_bits_G = tl.max(magnitude_GB.to(tl.int32, bitcast=True), axis=1)
    if RULE == "even":
        raised_G = amax_bits_G + 0x200000
    elif RULE == "rceil":
        raised_G = amax_bits_G + 0x3FFFFF
    else:
        tl.static_assert(RULE == "floor" or RULE == "mse")
        raised_G = amax_bits_G
    scale_G = _clamp_scale((raised_G >> 23) - 2)
    if RULE == "mse":
        floor_G = scale_G
        least_G = _squared_errors(magnitude_GB, floor_G, G)
        for step in tl.static_range(1, -2, -2):
            other_G = _clamp_scale(floor_G + step)
            error_G = _squared_errors(magnitude_GB, other_G, G)
            scale_G = tl.where(error_G < least_G, other_G, scale_G)
            least_G = tl.where(error_G < least_G, error_G, least_G)
    return tl.where(amax_bits_G >= _INFINITY_BITS, _NAN_SCALE, scale_G)


@triton.jit
def _clamp_scale(scale_G):
    return tl.minimum(tl.maximum(scale_G, 0), _MAX_SCALE)


@triton.jit
def _squared_errors(magnitude_GB, scale_G, G: tl.constexpr):
    """Squared error of each block in float64, summed over the reference's tree: always low half plus high half."""
    error_GB = _snap(magnitude_GB, scale_G).to(tl.float64) - magnitude_GB.to(tl.float64)
    error_GB = error_GB * error_GB
    for level in tl.static_range(5):
        low_GB, high_GB = tl.split(tl.permute(tl.reshape(error_GB, (G, 2, 16 >> level)), (0, 2, 1)))
        error_GB = low_GB + high_GB
    return tl.reshape(error_GB, (G,))


@triton.jit
def _snap(magnitude_GB, scale_G):
    """Each magnitude replaced by its MXFP4 value."""
    magic_GB, sum_GB, _ = _round_to_grid(magnitude_GB, scale_G)
    return tl.minimum(sum_GB - magic_GB, 6.0) * _power_of_two(scale_G)[:, None]


@triton.jit
def _round_to_grid(magnitude_GB, scale_G):
    """The magic number, its sum with magnitude / scale (rounded), and the bits of the binade's first value."""
    y_GB = magnitude_GB * _power_of_two(2 * 127 - scale_G)[:, None]
    binade_GB = tl.maximum(y_GB.to(tl.int32, bitcast=True) & _INFINITY_BITS, _ONE_BITS)
    magic_GB = (binade_GB + _MAGIC_BITS).to(tl.float32, bitcast=True)
    return magic_GB, y_GB + magic_GB, binade_GB


@triton.jit
def _power_of_two(scale_G):
    """2**(scale - 127) in float32 for int32 0 to 254; NaN otherwise."""
    bits_G = tl.where(scale_G == 0, 1 << 22, scale_G << 23)
    bits_G = tl.where((scale_G < 0) | (scale_G >= _NAN_SCALE), _NAN_BITS, bits_G)
    return bits_G.to(tl.float32, bitcast=True)
