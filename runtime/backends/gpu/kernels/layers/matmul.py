"""Norms, and products of weight rows with all rows of a step.

The weight is the tall operand (T rows per product) and the step's rows the narrow one, which suits tensor cores with
few rows. A result column depends on its own row only.

Each warp takes a slice of every stretch of the contraction axis for all T rows; the slices' sums are added at the end.
Sharing 16 rows among eight warps would make all of them load and decode the same weights. Loads are large enough to
keep memory busy.

RMSNorm is split. The writer of hidden columns also writes them times the next norm's weight (`scaled`) and their sums
of squares; the reader multiplies `scaled` and divides each row by the root mean square at the end. So no product loop
normalizes, and rounding to the activations' dtype happens once, where PyTorch does it twice.
"""

import triton
import triton.language as tl

from speedstack.runtime.plan.tiling import BLOCK_COLUMNS, PART_COLUMNS

BLOCK = tl.constexpr(BLOCK_COLUMNS)
_IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_FP8_COLUMNS = tl.constexpr(128)  # columns per scale
_PART = tl.constexpr(PART_COLUMNS)
_SLICES = 8  # at most: one per warp


@triton.jit
def in_blocks(column_T, R: tl.constexpr):
    """Positions of columns, for all rows, in a buffer [columns / 16, R, 16]; [T, R]."""
    return (column_T // BLOCK * (BLOCK * R) + column_T % BLOCK)[:, None] + (tl.arange(0, R) * BLOCK)[None, :]


@triton.jit
def write_for_norm(x_TR, first, norm_ptr, scaled_ptr, squares_ptr, D: tl.constexpr):
    """Writes the norm's inputs for float32 columns from `first`; T and `first` are whole blocks."""
    T: tl.constexpr = x_TR.shape[0]
    R: tl.constexpr = x_TR.shape[1]
    column_T, r_R = first + tl.arange(0, T), tl.arange(0, R)
    valid_T1 = (column_T < D)[:, None]
    x_TR = tl.where(valid_T1, x_TR, 0.0)
    weight_T = tl.load(norm_ptr + column_T, mask=column_T < D, other=0.0).to(tl.float32)
    at_TR = scaled_ptr + in_blocks(column_T, R)
    tl.store(at_TR, (x_TR * weight_T[:, None]).to(scaled_ptr.dtype.element_ty), mask=valid_T1)
    squares_NR = tl.sum(tl.reshape(x_TR * x_TR, (T // BLOCK, BLOCK, R)), axis=1)
    n_N = first // BLOCK + tl.arange(0, T // BLOCK)
    tl.store(squares_ptr + n_N[:, None] * R + r_R[None, :], squares_NR, mask=(n_N * BLOCK < D)[:, None])


@triton.jit
def inverse_rms(squares_ptr, valid_R, eps, D: tl.constexpr, R: tl.constexpr, NP: tl.constexpr):
    """1 / sqrt(mean of squares + eps) of valid rows, from sums of NP blocks, a power of two."""
    n_N, r_R = tl.arange(0, NP), tl.arange(0, R)
    mask_NR = (n_N * BLOCK < D)[:, None] & valid_R[None, :]
    squares_NR = tl.load(squares_ptr + n_N[:, None] * R + r_R[None, :], mask=mask_NR, other=0.0)
    return tl.rsqrt(tl.sum(squares_NR, axis=0) / D + eps)


@triton.jit
def normed(x, rms, weight, dtype: tl.constexpr):
    """RMSNorm of float32 values, rounded to `dtype` before and after the weight, as in the reference."""
    return (weight.to(tl.float32) * (x * rms).to(dtype).to(tl.float32)).to(dtype)


@triton.jit
def load_x(x_ptr, x_step, x_R, valid_R, k_B, K: tl.constexpr):
    """Elements k_B of every row, [B, R]; invalid rows are zeros and not read.

    Element k of row r is at x_ptr + x_R[r] + k // 16 * x_step + k % 16.
    """
    at_B = k_B // BLOCK * x_step + k_B % BLOCK
    return tl.load(x_ptr + at_B[:, None] + x_R[None, :], mask=(k_B < K)[:, None] & valid_R[None, :], other=0.0)


@triton.jit
def multiply(
    x_ptr,
    x_step,
    x_R,
    valid_R,
    w_ptr,
    scales_ptr,
    row,
    num_rows,
    K: tl.constexpr,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
    FP8_ROWS: tl.constexpr = 0,
    STEP: tl.constexpr = 0,
):
    """Float32 [T, R]: weight rows `row` (int64) to row + T, [.., K], times every row's K elements.

    num_rows of the T rows exist, at least one; other results are garbage. STEP: distance of weight rows, K if 0.
    Activations: see `load_x`. FP8_ROWS: weights are E4M3 [.., K] without NaN, scales float32 [.. / FP8_ROWS, ceil(K /
    128)]; their product in float32 is rounded to bfloat16.
    """
    R: tl.constexpr = x_R.shape[0]
    H: tl.constexpr = T if T < _PART else _PART
    P: tl.constexpr = T // H
    p_P = tl.arange(0, P)
    sum_PHR = tl.zeros((P, H, R), tl.float32)
    # Past the last row, repeat it, so that nothing after the weight is read.
    for part in range(P):
        left = tl.maximum(num_rows - part * H, 1)
        first = row + tl.minimum(part * H, num_rows - 1)
        sum_HR = _multiply_part(
            x_ptr, x_step, x_R, valid_R, w_ptr, scales_ptr, first, left, K, H, CHUNK, FP8_ROWS, STEP if STEP > 0 else K
        )  # fmt: skip
        sum_PHR = tl.where((p_P == part)[:, None, None], sum_HR[None, :, :], sum_PHR)
    return tl.reshape(sum_PHR, (T, R))


@triton.jit
def _multiply_part(
    x_ptr, x_step, x_R, valid_R, w_ptr, scales_ptr, row, num_rows, K: tl.constexpr, T: tl.constexpr,
    CHUNK: tl.constexpr, FP8_ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """`multiply` for as many rows as registers and shared memory allow."""
    R: tl.constexpr = x_R.shape[0]
    S: tl.constexpr = num_slices(K, CHUNK)
    NUM_SCALES: tl.constexpr = (K + _FP8_COLUMNS - 1) // _FP8_COLUMNS
    tl.static_assert(_FP8_COLUMNS % CHUNK == 0)
    # 32-bit offsets: 64-bit ones would take the registers of whole variants.
    t_T = tl.minimum(tl.arange(0, T), num_rows - 1)
    k_SB = tl.arange(0, S)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    at_SBR = (k_SB // BLOCK * x_step + k_SB % BLOCK)[:, :, None] + x_R[None, None, :]
    at_STB = t_T[None, :, None] * STEP + k_SB[:, None, :]
    w_ptr += row * STEP
    sum_STR = tl.zeros((S, T, R), tl.float32)
    for start in range(0, not_constant(K, num_rows), S * CHUNK):
        is_there_SB = start + k_SB < K
        mask_SBR = is_there_SB[:, :, None] & valid_R[None, None, :]
        x_SBR = tl.load(x_ptr + start // BLOCK * x_step + at_SBR, mask=mask_SBR, other=0.0)
        w_STB = tl.load(w_ptr + start + at_STB, mask=is_there_SB[:, None, :], other=0.0)
        if FP8_ROWS > 0:
            column_S = (start + tl.arange(0, S) * CHUNK) // _FP8_COLUMNS
            at_ST = ((row + t_T) // FP8_ROWS).to(tl.int32)[None, :] * NUM_SCALES + column_S[:, None]
            scale_ST = tl.load(scales_ptr + at_ST, mask=(column_S < NUM_SCALES)[:, None], other=0.0)
            w_STB = rounded_to_bfloat16(w_STB.to(tl.float32) * scale_ST[:, :, None], x_SBR.dtype)
        sum_STR = dot(w_STB, x_SBR, sum_STR)
    return tl.sum(sum_STR, axis=0)


@triton.jit
def not_constant(K: tl.constexpr, num_rows):
    """K, as a loop end that the compiler cannot prove positive.

    For loops that surely run, it unrolls more and keeps all their addresses.
    """
    if _IS_INTERPRETED:
        return K
    else:
        return tl.where(num_rows > 0, K, 0)


@triton.constexpr_function
def num_slices(num_elements: int, chunk: int) -> int:
    """Slices of a contraction axis walked in parallel, a power of two."""
    return min(_SLICES, triton.next_power_of_2(triton.cdiv(num_elements, chunk)))


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in float32, without TF32 rounding."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def rounded_to_bfloat16(x, dtype: tl.constexpr):
    """Finite float32 rounded to the nearest bfloat16, ties to even, in `dtype` (bfloat16 or float32)."""
    if dtype == tl.bfloat16:
        return x.to(tl.bfloat16)
    else:
        # For the interpreter, whose own conversion rounds towards zero.
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        return bits.to(tl.float32, bitcast=True)
