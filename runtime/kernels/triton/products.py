"""Norms, and products of weight rows with all rows of a step.

Weights are the tall operand (T of their rows a product) and the step's rows the narrow one, which is what suits tensor
cores when there are few rows. A row's column of the result depends on no other column.

RMSNorm is divided between those who write the hidden state and those who need it normalized. Whoever writes columns of
it also writes them times the weight of the norm that comes next (`scaled`), and their sums of squares; a product of
what is scaled is then divided by the root of the mean square, row by row, when it is done. So nothing is normalized
inside a product's loop, where every item would do it again, and a mean needs the sums alone. It rounds to the
activations' dtype once, where PyTorch does twice.
"""

import triton
import triton.language as tl

from speedstack.runtime.tiles import BLOCK_COLUMNS

BLOCK = tl.constexpr(BLOCK_COLUMNS)
_FP8_COLUMNS = tl.constexpr(128)  # that share a scale


@triton.jit
def write_for_norm(x_TR, first, norm_ptr, scaled_ptr, squares_ptr, D: tl.constexpr):
    """What the norm of float32 columns first, first + 1, ... needs: see the module. T and `first` are whole blocks."""
    T: tl.constexpr = x_TR.shape[0]
    R: tl.constexpr = x_TR.shape[1]
    column_T, r_R = first + tl.arange(0, T), tl.arange(0, R)
    valid_T1 = (column_T < D)[:, None]
    x_TR = tl.where(valid_T1, x_TR, 0.0)
    weight_T = tl.load(norm_ptr + column_T, mask=column_T < D, other=0.0).to(tl.float32)
    at_TR = scaled_ptr + (column_T // BLOCK * (BLOCK * R) + column_T % BLOCK)[:, None] + (r_R * BLOCK)[None, :]
    tl.store(at_TR, (x_TR * weight_T[:, None]).to(scaled_ptr.dtype.element_ty), mask=valid_T1)
    squares_NR = tl.sum(tl.reshape(x_TR * x_TR, (T // BLOCK, BLOCK, R)), axis=1)
    n_N = first // BLOCK + tl.arange(0, T // BLOCK)
    tl.store(squares_ptr + n_N[:, None] * R + r_R[None, :], squares_NR, mask=(n_N * BLOCK < D)[:, None])


@triton.jit
def inverse_rms(squares_ptr, valid_R, eps, D: tl.constexpr, R: tl.constexpr, NP: tl.constexpr):
    """1 / sqrt(mean of squares + eps) of valid rows, out of the sums of NP blocks, a power of two."""
    n_N, r_R = tl.arange(0, NP), tl.arange(0, R)
    mask_NR = (n_N * BLOCK < D)[:, None] & valid_R[None, :]
    squares_NR = tl.load(squares_ptr + n_N[:, None] * R + r_R[None, :], mask=mask_NR, other=0.0)
    return tl.rsqrt(tl.sum(squares_NR, axis=0) / D + eps)


@triton.jit
def normed(x, rms, weight, dtype: tl.constexpr):
    """RMSNorm of float32 values: rounded to `dtype` before and after the weight, as the reference does."""
    return (weight.to(tl.float32) * (x * rms).to(dtype).to(tl.float32)).to(dtype)


@triton.jit
def load_x(x_ptr, x_step, x_R, valid_R, k_B, K: tl.constexpr):
    """Elements k_B of every row, [B, R]; zeros where a row is not valid, of which nothing is read.

    Sixteen neighbours lie together: element k of row r at x_ptr + x_R[r] + k // 16 * x_step + k % 16.
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
    w_T,
    valid_T,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    FP8_ROWS: tl.constexpr = 0,
):
    """Float32 [T, R]: rows w_T of a weight [.., K] times every row's K elements.

    x_ptr, x_step, x_R, valid_R: see `load_x`. With FP8_ROWS, weights are E4M3 [.., K], without NaN, and float32 scales
    [.. / FP8_ROWS, ceil(K / 128)]: what is multiplied is their product in float32, rounded to bfloat16.
    """
    T: tl.constexpr = w_T.shape[0]
    R: tl.constexpr = x_R.shape[0]
    sum_TR = tl.zeros((T, R), tl.float32)
    if FP8_ROWS > 0:
        tl.static_assert(_FP8_COLUMNS % CHUNK == 0)
        NUM_SCALES: tl.constexpr = (K + _FP8_COLUMNS - 1) // _FP8_COLUMNS
        scales_T1 = scales_ptr + (w_T // FP8_ROWS).to(tl.int32)[:, None] * NUM_SCALES
        for start in range(0, K, CHUNK):
            k_B = start + tl.arange(0, CHUNK)
            mask_TB = valid_T[:, None] & (k_B < K)[None, :]
            scale_T1 = tl.load(scales_T1 + start // _FP8_COLUMNS, mask=valid_T[:, None], other=0.0)
            code_TB = tl.load(w_ptr + w_T[:, None] * K + k_B[None, :], mask=mask_TB, other=0.0)
            x_BR = load_x(x_ptr, x_step, x_R, valid_R, k_B, K)
            w_TB = rounded_to_bfloat16(code_TB.to(tl.float32) * scale_T1, x_BR.dtype)
            sum_TR = dot(w_TB, x_BR, sum_TR)
    else:
        for start in range(0, K, CHUNK):
            k_B = start + tl.arange(0, CHUNK)
            mask_TB = valid_T[:, None] & (k_B < K)[None, :]
            w_TB = tl.load(w_ptr + w_T[:, None] * K + k_B[None, :], mask=mask_TB, other=0.0)
            x_BR = load_x(x_ptr, x_step, x_R, valid_R, k_B, K)
            sum_TR = dot(w_TB, x_BR, sum_TR)
    return sum_TR


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in float32; float32 operands are not rounded to TF32."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def rounded_to_bfloat16(x, dtype: tl.constexpr):
    """Finite float32 values rounded to the nearest of bfloat16, ties to even, in `dtype`, bfloat16 or float32."""
    if dtype == tl.bfloat16:
        return x.to(tl.bfloat16)
    else:
        # What the interpreter computes with; its own conversion rounds towards zero.
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        return bits.to(tl.float32, bitcast=True)
