"""Products of MXFP4 weights with all rows of a step; weights are decoded in registers, two at a time.

A GPU reads memory so fast that a program may spend about three instructions of a lane on a weight of four bits, its
share of everything else included. Hence the shape of this product, which no other has:

- Each warp has a slice of the contraction axis for itself, and all T rows of the tile. No two warps decode the same
  weight, which they would if they shared a tile's few rows out among them. The slices' sums are added at the end.
- A lane reads a block of 32 weights at once, 16 bytes under one scale, and keeps them: what it decodes is its own part
  of the tensor core's operand. That needs another order of the contraction axis, into which the activations are brought
  too.
- A code's bits are moved to the sign, the low exponent and the high mantissa bits of a bfloat16, both halves of a word
  at once. What stands there is the value times 2**-126, also for the code 1, which is subnormal in both formats. One
  product with a power of two makes it the weight. All this is exact.

That no value moves between lanes hangs on the layout that Triton gives to what is loaded: axes that are not consecutive
in memory are dealt out first to lanes, then to warps, then to registers. Triton 3.6 begins with the first of them and
3.9.0 with the last (`_axis`). If another version does otherwise, operands move through shared memory: the same
numbers, later.

Legend, besides the package's: S slices (there: splits), C lanes that share a row of the operand, U rows of a group of
eight, V groups of eight rows, W words of a block. U and V are T, S and C and W are blocks and words of a stretch of the
contraction axis, B elements of a slice of it.
"""

import triton
import triton.language as tl

from speedstack.runtime.bindings import SLICE
from speedstack.runtime.kernels.triton.products import BLOCK, dot, not_constant

_IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_SLICE = tl.constexpr(SLICE)
_IS_FIRST_DEALT_FIRST = tl.constexpr(triton.__version__.startswith("3.6."))
_ONE_BITS = tl.constexpr(0x3F800000)
_HALF_BITS = tl.constexpr(0x3F000000)
_NAN_BITS = tl.constexpr(0x7FC00000)


def _decode(is_wide: bool) -> str:
    """PTX from a word of codes ($8) and a power of two in both halves of a word ($9) to eight bfloat16, in order.

    Codes 16 bits apart make a pair: bits a and b are the same pair's sign and magnitude at their places, what else the
    product brings along is cleared. Wide: scales of all sizes, which takes two products.
    """
    lines = ["{ .reg .b32 q, a, b, c, d;", "shr.u32 q, $8, 8;"]
    for pair, source, mask, shifts in (
        ("a", "$8", 0x000F000F, (1 << 6) + (1 << 12)),
        ("b", "$8", 0x00F000F0, (1 << 2) + (1 << 8)),
        ("c", "q", 0x000F000F, (1 << 6) + (1 << 12)),
        ("d", "q", 0x00F000F0, (1 << 2) + (1 << 8)),
    ):
        lines += [f"and.b32 {pair}, {source}, {mask};", f"mul.lo.u32 {pair}, {pair}, {shifts};"]
        lines += [f"and.b32 {pair}, {pair}, {0x81C081C0};"]
    if is_wide:
        lines += [".reg .b32 k;", f"mov.b32 k, {0x7E807E80};"]  # 2**126
        lines += [f"mul.rn.bf16x2 {pair}, {pair}, k;" for pair in "abcd"]
    lines += [f"mul.rn.bf16x2 {pair}, {pair}, $9;" for pair in "abcd"]
    lines += [f"mov.b32 {{${place}, ${place + 4}}}, {pair};" for place, pair in enumerate("abcd")]
    return "\n".join([*lines, "}"])


NARROW = tl.constexpr(_decode(is_wide=False))
WIDE = tl.constexpr(_decode(is_wide=True))


@triton.jit
def multiply_mxfp4(
    x_ptr,
    x_step,
    x_R,
    valid_R,
    w_ptr,
    scales_ptr,
    row,
    num_rows,
    step,
    K: tl.constexpr,
    T: tl.constexpr,
    SLICES: tl.constexpr,
    IS_WIDE: tl.constexpr,
    IS_PAIR: tl.constexpr,
):
    """Float32 [T, R]: rows `row` to row + T of weights [.., K] times every row's K elements.

    Of the T rows num_rows are there; results of others are garbage. It may be negative: rows end at row + num_rows, and
    none behind that is read. With IS_PAIR, the rows `step` further on too, and a second result. Codes are uint8
    [.., K / 2], scales uint8 [.., K / 32]; without IS_WIDE none is above `bindings.LARGEST_NARROW_SCALE`. x_ptr,
    x_step, x_R, valid_R: see `products.load_x`.
    """
    R: tl.constexpr = x_R.shape[0]
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    k_SB = tl.arange(0, SLICES)[:, None] * _SLICE + tl.arange(0, _SLICE)[None, :]
    at_SBR = (k_SB // BLOCK * x_step + k_SB % BLOCK)[:, :, None] + x_R[None, None, :]
    sum_STR = tl.zeros((SLICES, T, R), tl.float32)
    second_STR = tl.zeros((SLICES, T, R), tl.float32)
    for start in range(0, not_constant(K, num_rows), SLICES * _SLICE):
        is_valid_SBR = (start + k_SB < K)[:, :, None] & valid_R[None, None, :]
        x_SBR = tl.load(x_ptr + start // BLOCK * x_step + at_SBR, mask=is_valid_SBR, other=0.0)
        w = _weights(w_ptr, scales_ptr, row, num_rows, start, K, T, SLICES, IS_WIDE)
        if IS_PAIR:
            second = _weights(w_ptr, scales_ptr, row + step, num_rows, start, K, T, SLICES, IS_WIDE)
        x_SBR = _sorted(x_SBR)
        sum_STR = dot(_operand(w, dtype), x_SBR, sum_STR)
        if IS_PAIR:
            second_STR = dot(_operand(second, dtype), x_SBR, second_STR)
    if IS_PAIR:
        return tl.sum(sum_STR, axis=0), tl.sum(second_STR, axis=0)
    else:
        return tl.sum(sum_STR, axis=0)


@triton.jit
def _sorted(x_SBR):
    """Activations [S, B, R] from the order in which they lie to the product's.

    There they go by lane, word and code; here by word, lane and code, codes c and c + 4 in turn.
    """
    S: tl.constexpr = x_SBR.shape[0]
    R: tl.constexpr = x_SBR.shape[2]
    x = tl.permute(tl.reshape(x_SBR, (S, 4, 4, 2, 4, R)), (0, 2, 1, 4, 3, 5))
    return tl.reshape(x, (S, _SLICE, R))


@triton.jit
def _weights(
    w_ptr, scales_ptr, row, num_rows, start, K: tl.constexpr, T: tl.constexpr, SLICES: tl.constexpr,
    IS_WIDE: tl.constexpr,
):  # fmt: skip
    """Codes 0 to 7 of every word of a stretch of T rows: eight of [C, U, S, V, W], or of [V, S, U, C, W]."""
    # The same as without the product and remainder, but not seen to be consecutive: else a lane gets several scales.
    c_C = _along(tl.arange(0, 4) * 5 % 4, 0)
    block_CS = start // 32 + _along(tl.arange(0, SLICES), 2) * 4 + c_C
    t_UV = tl.minimum(_along(tl.arange(0, 8), 1) + _along(tl.arange(0, T // 8), 3) * 8, num_rows - 1)
    is_there_CS = block_CS < K // 32
    at_CUSV = t_UV * (K // 32) + block_CS
    scale = tl.load(scales_ptr + row * (K // 32) + at_CUSV, mask=is_there_CS, other=0).to(tl.int32)
    words_ptr = w_ptr.to(tl.pointer_type(tl.int32)) + row * (K // 8)
    at_CUSVW = t_UV * (K // 8) + block_CS * 4 + tl.arange(0, 4)[None, None, None, None, :]
    word = tl.load(words_ptr + at_CUSVW, mask=is_there_CS, other=0)
    return decoded(word, scale, IS_WIDE)


@triton.jit
def _along(x_N, NUMBER: tl.constexpr):
    """N elements along axis C, U, S or V, number 0 to 3."""
    AXIS: tl.constexpr = _axis(NUMBER)
    if AXIS == 0:
        return x_N[:, None, None, None, None]
    elif AXIS == 1:
        return x_N[None, :, None, None, None]
    elif AXIS == 2:
        return x_N[None, None, :, None, None]
    else:
        return x_N[None, None, None, :, None]


@triton.constexpr_function
def _axis(number: int) -> int:
    return number if _IS_FIRST_DEALT_FIRST else 3 - number


@triton.jit
def decoded(word, scale, IS_WIDE: tl.constexpr):
    """The eight values of words of codes, int32, under E8M0 scales, int32; float32 where interpreted, else bfloat16."""
    if _IS_INTERPRETED:
        # The interpreter knows no assembly.
        power = power_of_two(scale)
        return (
            e2m1(word) * power, e2m1(word >> 4) * power, e2m1(word >> 8) * power, e2m1(word >> 12) * power,
            e2m1(word >> 16) * power, e2m1(word >> 20) * power, e2m1(word >> 24) * power, e2m1(word >> 28) * power,
        )  # fmt: skip
    else:
        word, factor = tl.broadcast(word, bfloat16_factor(scale, IS_WIDE))
        return tl.inline_asm_elementwise(
            WIDE if IS_WIDE else NARROW,
            "=h,=h,=h,=h,=h,=h,=h,=h,r,r",
            [word, factor],
            dtype=(tl.bfloat16,) * 8,
            is_pure=True,
            pack=1,
        )


@triton.jit
def bfloat16_factor(scale, IS_WIDE: tl.constexpr):
    """2**(scale - 127) as bfloat16 in both halves of an int32, NaN for 255; narrow: 2**126 times that."""
    if IS_WIDE:
        bits = tl.where(scale == 0, 1 << 6, scale << 7)
        bits = tl.where(scale == 255, _NAN_BITS >> 16, bits)
    else:
        bits = (scale + 126) << 7
    return bits | (bits << 16)


@triton.jit
def _operand(w, dtype: tl.constexpr):
    """Eight tensors of `_weights` as one operand [S, T, B] in the product's order."""
    low = tl.join(tl.join(w[0], w[2]), tl.join(w[1], w[3]))
    high = tl.join(tl.join(w[4], w[6]), tl.join(w[5], w[7]))
    both = tl.join(low, high)
    A: tl.constexpr = w[0].shape[0]
    B: tl.constexpr = w[0].shape[1]
    C: tl.constexpr = w[0].shape[2]
    D: tl.constexpr = w[0].shape[3]
    codes = tl.reshape(both, (A, B, C, D, 4, 8))
    if _axis(0) == 3:
        return tl.reshape(tl.permute(codes, (1, 0, 2, 4, 3, 5)), (B, A * C, _SLICE)).to(dtype)
    else:
        return tl.reshape(tl.permute(codes, (2, 3, 1, 4, 0, 5)), (C, D * B, _SLICE)).to(dtype)


@triton.jit
def e2m1(code):
    """The float32 value of the low four bits of an int32: 0, 0.5, then exponent and mantissa moved to their place."""
    index = code & 7
    bits = tl.where(index < 2, index * _HALF_BITS, (index << 22) + (_ONE_BITS - (2 << 22)))
    return (bits | ((code & 8) << 28)).to(tl.float32, bitcast=True)


@triton.jit
def power_of_two(scale):
    """2**(scale - 127) in float32 for E8M0 bytes as int32; NaN for 255."""
    bits = tl.where(scale == 0, 1 << 22, scale << 23)
    return tl.where(scale == 255, _NAN_BITS, bits).to(tl.float32, bitcast=True)
