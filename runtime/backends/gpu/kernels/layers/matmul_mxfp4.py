"""Products of MXFP4 weights with all rows of a step; weights are decoded in registers, two at a time.

At memory speed, a program may spend about three lane instructions per 4-bit weight, everything included. Hence:

- Each warp takes a slice of the contraction axis for all T rows, so no two warps decode the same weight. The slices'
  sums are added at the end.
- A lane reads a block of 32 weights, 16 bytes under one scale, and decodes its own part of the tensor core's operand.
  This permutes the contraction axis; activations are permuted to match, and those between an expert's two products are
  stored so.
- A code's bits become the sign, low exponent and high mantissa bits of a bfloat16, in both halves of a word at once.
  That is the value times 2**-126, also for code 1, which is subnormal in both formats. One multiplication by a power of
  two gives the weight. All this is exact.
- Words come by asynchronous copies, several rounds ahead. Scales are bytes, which such copies do not support: they are
  loaded a round ahead.

No value moves between lanes because of Triton's layout of loads: axes that are not contiguous in memory go to lanes,
then warps, then registers, first axis first in Triton 3.6 and last first in 3.9.0 (`_axis`). It also depends on the
lane's neighbours in the operand (`_NEIGHBOURS`). Under another version, operands move through shared memory: the same
numbers, slower.

Legend, besides the package's: S slices (there: splits), C lanes that share a row of the operand, U rows of a group of
eight, V groups of eight rows, W words of a block. U and V are T, S and C and W are blocks and words of a stretch of the
contraction axis, B elements of a slice of it.
"""

import triton
import triton.language as tl

from speedstack.runtime.backends.gpu.bindings.layers import SLICE
from speedstack.runtime.backends.gpu.kernels.layers.matmul import BLOCK, dot, not_constant
from speedstack.runtime.backends.gpu.kernels.rows import EXPERT
from speedstack.runtime.plan import record_layout

_IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_SLICE = tl.constexpr(SLICE)
_IS_FIRST_DEALT_FIRST = tl.constexpr(triton.__version__.startswith("3.6."))
route_words = triton.constexpr_function(record_layout.route_words)
_STAGES = tl.constexpr(4)  # of `experts_sum_mxfp4`: rounds of words in flight, plus one
# Adjacent element pairs that a lane has of each half of a tensor core operand, for joined operands in either Triton
# version; another number would move them through shared memory.
_NEIGHBOURS = tl.constexpr(2 if _IS_FIRST_DEALT_FIRST.value else 1)
_ONE_BITS = tl.constexpr(0x3F800000)
_HALF_BITS = tl.constexpr(0x3F000000)
_NAN_BITS = tl.constexpr(0x7FC00000)


def _decode(is_wide: bool) -> str:
    """PTX from a word of codes ($8) and a power of two in both halves of a word ($9) to eight bfloat16, in order.

    Codes 16 bits apart form a pair; masks clear the other bits. Wide: for scales of all sizes, with two
    multiplications.
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
def multiply_pair_mxfp4(
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
):
    """Two float32 [T, R]: weight rows `row` to row + T, [.., K], times every row's K elements, and the rows `step`
    later.

    num_rows of the T rows exist; other results are garbage. It may be negative: nothing past row + num_rows is read.
    Codes are uint8 [.., K / 2], scales uint8 [.., K / 32], at most `LARGEST_NARROW_SCALE` without IS_WIDE. Activations:
    see `matmul.load_x`.
    """
    R: tl.constexpr = x_R.shape[0]
    STRETCH: tl.constexpr = _stretch(SLICES)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    k_SB = tl.arange(0, SLICES)[:, None] * _SLICE + tl.arange(0, _SLICE)[None, :]
    at_SBR = (k_SB // BLOCK * x_step + k_SB % BLOCK)[:, :, None] + x_R[None, None, :]
    sum_STR, second_STR = tl.zeros((SLICES, T, R), tl.float32), tl.zeros((SLICES, T, R), tl.float32)
    scale = _scales(scales_ptr, row, num_rows, 0, K, T, SLICES)
    second_scale = _scales(scales_ptr, row + step, num_rows, 0, K, T, SLICES)
    for start in range(0, not_constant(K, num_rows), STRETCH):
        is_valid_SBR = (start + k_SB < K)[:, :, None] & valid_R[None, None, :]
        x_SBR = tl.load(x_ptr + start // BLOCK * x_step + at_SBR, mask=is_valid_SBR, other=0.0)
        word = _words(w_ptr, row, num_rows, start, K, T, SLICES)
        second_word = _words(w_ptr, row + step, num_rows, start, K, T, SLICES)
        later_scale = _scales(scales_ptr, row, num_rows, start + STRETCH, K, T, SLICES)
        later_second_scale = _scales(scales_ptr, row + step, num_rows, start + STRETCH, K, T, SLICES)
        x_SBR = _sorted(x_SBR)
        sum_STR = dot(_operand(decoded(word, scale.to(tl.int32), IS_WIDE), dtype), x_SBR, sum_STR)
        second = _operand(decoded(second_word, second_scale.to(tl.int32), IS_WIDE), dtype)
        second_STR = dot(second, x_SBR, second_STR)
        scale, second_scale = later_scale, later_second_scale
    return tl.sum(sum_STR, axis=0), tl.sum(second_STR, axis=0)


@triton.jit
def experts_sum_mxfp4(
    x_ptr,
    routes_ptr,
    num_experts,
    w_ptr,
    scales_ptr,
    first,
    N: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    T: tl.constexpr,
    R: tl.constexpr,
    SLICES: tl.constexpr,
    IS_WIDE: tl.constexpr,
):
    """Float32 [T, R]: rows first to first + T of each active expert's weights [.., N, K] times the activations routed
    to it times the choice's weight, summed in ascending order of expert.

    routes_ptr: records of num_experts active experts. x_ptr: [R * TOP_K, K], columns in the order of `sorted_column`.
    w_ptr, scales_ptr, IS_WIDE: see `multiply_pair_mxfp4`. Results from row N on are garbage.

    One loop covers all experts, so that weights load while others are multiplied, and slices are added once. An
    expert's record is loaded an iteration ahead: an address loaded in the same iteration would halve the prefetch
    distance.
    """
    STRETCH: tl.constexpr = _stretch(SLICES)
    ROUNDS: tl.constexpr = _num_rounds(K, SLICES)
    WORDS: tl.constexpr = route_words(R)
    EXPERT_WORD: tl.constexpr = 2 * R + EXPERT
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    r_R, r_UV = tl.arange(0, R), _rows_of_lanes(R)
    sum_STR = tl.zeros((SLICES, T, R), tl.float32)
    num_units = num_experts * ROUNDS
    # Without an active expert, its record is stale.
    expert, choice_UV = tl.load(routes_ptr + EXPERT_WORD, mask=num_units > 0, other=0), tl.load(routes_ptr + r_UV)
    weight_R = tl.load(routes_ptr + R + r_R)
    scale = _scales(scales_ptr, expert.to(tl.int64) * N + first, N - first, 0, K, T, SLICES)
    for unit in tl.range(0, num_units, num_stages=_STAGES):
        next_unit = tl.minimum(unit + 1, num_units - 1)
        start, later_start = unit % ROUNDS * STRETCH, next_unit % ROUNDS * STRETCH
        record_ptr = routes_ptr + next_unit // ROUNDS * WORDS
        later = tl.load(record_ptr + EXPERT_WORD)
        later_scale = _scales(scales_ptr, later.to(tl.int64) * N + first, N - first, later_start, K, T, SLICES)
        x_SBR = _activations(x_ptr, r_UV, choice_UV, start, K, TOP_K, SLICES, R)
        word = _words(w_ptr, expert.to(tl.int64) * N + first, N - first, start, K, T, SLICES)
        w = _operand(decoded(word, scale.to(tl.int32), IS_WIDE), dtype)
        part_STR = dot(w, x_SBR, tl.zeros((SLICES, T, R), tl.float32))
        later_STR = sum_STR + part_STR * weight_R.to(tl.float32, bitcast=True)[None, None, :]
        if IS_WIDE:
            # A weight may be NaN, which zero activations do not remove.
            choice_R = tl.load(routes_ptr + unit // ROUNDS * WORDS + r_R)
            later_STR = tl.where((choice_R >= 0)[None, None, :], later_STR, sum_STR)
        sum_STR = later_STR
        expert, scale = later, later_scale
        choice_UV, weight_R = tl.load(record_ptr + r_UV), tl.load(record_ptr + R + r_R)
    return tl.sum(sum_STR, axis=0)


@triton.constexpr_function
def _stretch(num_slices: int) -> int:
    """Elements of the contraction axis per round of all slices."""
    return num_slices * SLICE


@triton.constexpr_function
def _num_rounds(num_elements: int, num_slices: int) -> int:
    return triton.cdiv(num_elements, num_slices * SLICE)


@triton.jit
def sorted_column(column):
    """A column's place in the activations of `experts_sum_mxfp4`: codes c and c + 4 of a word in turn."""
    return column // 8 * 8 + column % 4 * 2 + column % 8 // 4


@triton.jit
def _activations(
    x_ptr, r_UV, choice_UV, start, K: tl.constexpr, TOP_K: tl.constexpr, SLICES: tl.constexpr, R: tl.constexpr
):  # fmt: skip
    """A stretch of the activations routed to an expert, [S, B, R] in the product's order; zeros for other rows.

    A lane reads and keeps 64 bytes of each of its rows of the operand.
    """
    U: tl.constexpr = R if R < 8 else 8
    V: tl.constexpr = R // U
    k_CS = start + _along(tl.arange(0, SLICES), 2, 6) * _SLICE + _along(tl.arange(0, 4), 0, 6) * 32
    at_CUSV = (r_UV * TOP_K + choice_UV) * K + k_CS
    at_CUSVW = at_CUSV + _along(tl.arange(0, 4), 4, 6) * 8 + tl.arange(0, 8)[None, None, None, None, None, :]
    x = tl.load(x_ptr + at_CUSVW, mask=(choice_UV >= 0) & (k_CS < K), other=0.0)
    if _axis(0, 6) == 0:
        x = tl.permute(x, (2, 0, 4, 5, 3, 1))
    else:
        x = tl.permute(x, (2, 4, 0, 5, 1, 3))
    return _in_order(tl.reshape(x, (SLICES, 4, 32, V * U)))


@triton.jit
def _rows_of_lanes(R: tl.constexpr):
    """The step's rows along axes U and V of `_activations`."""
    U: tl.constexpr = R if R < 8 else 8
    return _along(tl.arange(0, R // U), 3, 6) * U + _along(tl.arange(0, U), 1, 6)


@triton.jit
def _sorted(x_SBR):
    """Activations [S, B, R] from storage order to the product's: codes c and c + 4 in turn."""
    S: tl.constexpr = x_SBR.shape[0]
    R: tl.constexpr = x_SBR.shape[2]
    x = tl.permute(tl.reshape(x_SBR, (S, 4, 4, 2, 4, R)), (0, 1, 2, 4, 3, 5))
    return _in_order(tl.reshape(x, (S, 4, 32, R)))


@triton.jit
def _in_order(x_SC):
    """[S, lanes, a lane's elements in pairs, R] as an operand [S, B, R] in the product's order (see `_NEIGHBOURS`)."""
    S: tl.constexpr = x_SC.shape[0]
    R: tl.constexpr = x_SC.shape[3]
    NEAR: tl.constexpr = _NEIGHBOURS
    x = tl.permute(tl.reshape(x_SC, (S, 4, 8 // NEAR, NEAR, 2, 2, R)), (0, 2, 4, 1, 3, 5, 6))
    return tl.reshape(x, (S, _SLICE, R))


@triton.jit
def _scales(scales_ptr, row, num_rows, start, K: tl.constexpr, T: tl.constexpr, SLICES: tl.constexpr):
    """Scales of a stretch of T rows, uint8 [C, U, S, V, 1] or [V, S, U, C, 1]; zeros past the end."""
    block_CS = _blocks(start, SLICES)
    at_CUSV = _rows_of_tile(num_rows, T) * (K // 32) + block_CS
    return tl.load(scales_ptr + row * (K // 32) + at_CUSV, mask=block_CS < K // 32, other=0)


@triton.jit
def _words(w_ptr, row, num_rows, start, K: tl.constexpr, T: tl.constexpr, SLICES: tl.constexpr):
    """Code words of a stretch of T rows, int32 [C, U, S, V, W] or [V, S, U, C, W]; zeros past the end."""
    block_CS = _blocks(start, SLICES)
    at_CUSV = _rows_of_tile(num_rows, T) * (K // 8) + block_CS * 4
    words_ptr = w_ptr.to(tl.pointer_type(tl.int32)) + row * (K // 8)
    at_CUSVW = at_CUSV + tl.arange(0, 4)[None, None, None, None, :]
    return tl.load(words_ptr + at_CUSVW, mask=block_CS < K // 32, other=0)


@triton.jit
def _blocks(start, SLICES: tl.constexpr):
    """Each lane's block of the contraction axis."""
    # Written so that the compiler does not see consecutive blocks, or a lane would get several scales.
    return start // 32 + _along(tl.arange(0, SLICES), 2, 5) * 4 + _along(tl.arange(0, 4) * 5 % 4, 0, 5)


@triton.jit
def _rows_of_tile(num_rows, T: tl.constexpr):
    return tl.minimum(_along(tl.arange(0, 8), 1, 5) + _along(tl.arange(0, T // 8), 3, 5) * 8, num_rows - 1)


@triton.jit
def _along(x_N, NUMBER: tl.constexpr, RANK: tl.constexpr):
    """N elements along axis C, U, S, V or W (0 to 4) of RANK axes, the last one contiguous."""
    AXIS: tl.constexpr = _axis(NUMBER, RANK)
    for axis in tl.static_range(RANK):
        if axis != AXIS:
            x_N = tl.expand_dims(x_N, axis)
    return x_N


@triton.constexpr_function
def _axis(number: int, rank: int) -> int:
    return number if _IS_FIRST_DEALT_FIRST else rank - 2 - number


@triton.jit
def decoded(word, scale, IS_WIDE: tl.constexpr):
    """Eight values of int32 code words under int32 E8M0 scales; bfloat16, or float32 if interpreted."""
    if _IS_INTERPRETED:
        # The interpreter cannot run assembly.
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
    NEAR: tl.constexpr = _NEIGHBOURS
    codes = tl.reshape(both, (A, B, C, D, 8 // NEAR, NEAR, 2, 2))
    if _axis(0, 5) == 3:
        return tl.reshape(tl.permute(codes, (1, 0, 2, 4, 6, 3, 5, 7)), (B, A * C, _SLICE)).to(dtype)
    else:
        return tl.reshape(tl.permute(codes, (2, 3, 1, 4, 6, 0, 5, 7)), (C, D * B, _SLICE)).to(dtype)


@triton.jit
def e2m1(code):
    """The float32 value of an int32's low four bits."""
    index = code & 7
    bits = tl.where(index < 2, index * _HALF_BITS, (index << 22) + (_ONE_BITS - (2 << 22)))
    return (bits | ((code & 8) << 28)).to(tl.float32, bitcast=True)


@triton.jit
def power_of_two(scale):
    """2**(scale - 127) in float32 for E8M0 bytes as int32; NaN for 255."""
    bits = tl.where(scale == 0, 1 << 22, scale << 23)
    return tl.where(scale == 255, _NAN_BITS, bits).to(tl.float32, bitcast=True)
