"""Projections whose weights all rows share. See the package for the legend."""

import triton
import triton.language as tl

from speedstack.runtime.kernels.triton.products import inverse_rms, multiply


@triton.jit
def qkv_item(
    kv_head,
    tile,
    hidden_ptr,
    norm_ptr,
    w_ptr,
    bias_ptr,
    qkv_ptr,
    scales_ptr,
    eps,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FP8_ROWS: tl.constexpr,
):
    """Norm, then T columns of a group's queries, key and value. COLUMNS of a group, padded to whole tiles.

    scales_ptr, FP8_ROWS: see `products.multiply`, here and below.
    """
    r_R = tl.arange(0, R)
    all_R = r_R >= 0
    rms_R = inverse_rms(hidden_ptr, eps, D, R, CHUNK)
    column_T = (kv_head * COLUMNS + tile * T + tl.arange(0, T)).to(tl.int64)
    all_T = column_T >= 0
    out_TR = multiply(
        hidden_ptr, R, r_R, all_R, norm_ptr, rms_R, w_ptr, scales_ptr, column_T, all_T, D, CHUNK, True, False, FP8_ROWS
    )  # fmt: skip
    if HAS_BIAS:
        out_TR += tl.load(bias_ptr + column_T).to(tl.float32)[:, None]
    tl.store(qkv_ptr + column_T[:, None] * R + r_R[None, :], out_TR.to(qkv_ptr.dtype.element_ty))


@triton.jit
def project_item(
    tile,
    x_ptr,
    w_ptr,
    bias_ptr,
    hidden_ptr,
    tap_ptr,
    scales_ptr,
    x_step,
    x_row_step,
    K: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TAP: tl.constexpr,
    FP8_ROWS: tl.constexpr,
):
    """T columns of a projection to the hidden size, added in place; tap_ptr [D, R] takes a copy.

    Element k of row r lies at x[k * x_step + r * x_row_step].
    """
    r_R = tl.arange(0, R)
    all_R = r_R >= 0
    column_T = (tile * T + tl.arange(0, T)).to(tl.int64)
    valid_T = column_T < D
    out_TR = multiply(
        x_ptr, x_step, r_R * x_row_step, all_R, x_ptr, r_R, w_ptr, scales_ptr, column_T, valid_T, K, CHUNK, False,
        False, FP8_ROWS,
    )  # fmt: skip
    if HAS_BIAS:
        out_TR += tl.load(bias_ptr + column_T, mask=valid_T, other=0.0).to(tl.float32)[:, None]
    add_to_hidden(out_TR, column_T, hidden_ptr, tap_ptr, D, HAS_TAP)


@triton.jit
def add_to_hidden(out_TR, column_T, hidden_ptr, tap_ptr, D: tl.constexpr, HAS_TAP: tl.constexpr):
    """Adds float32 [T, R] to columns of the hidden state, and copies the sum to tap_ptr [D, R] where that is wanted."""
    R: tl.constexpr = out_TR.shape[1]
    at_TR = column_T[:, None] * R + tl.arange(0, R)[None, :]
    valid_T1 = (column_T < D)[:, None]
    before_TR = tl.load(hidden_ptr + at_TR, mask=valid_T1, other=0.0).to(tl.float32)
    sum_TR = (before_TR + out_TR).to(hidden_ptr.dtype.element_ty)
    tl.store(hidden_ptr + at_TR, sum_TR, mask=valid_T1)
    if HAS_TAP:
        tl.store(tap_ptr + at_TR, sum_TR, mask=valid_T1)


@triton.jit
def dense_gate_up_item(
    tile,
    hidden_ptr,
    norm_ptr,
    w_ptr,
    act_ptr,
    scales_ptr,
    eps,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
    FP8_ROWS: tl.constexpr,
):
    """Norm, then silu(gate) * up of T columns; gate rows of the weight come before up rows."""
    r_R = tl.arange(0, R)
    all_R = r_R >= 0
    rms_R = inverse_rms(hidden_ptr, eps, D, R, CHUNK)
    column_T = (tile * T + tl.arange(0, T)).to(tl.int64)
    valid_T = column_T < WIDTH
    gate_TR = multiply(
        hidden_ptr, R, r_R, all_R, norm_ptr, rms_R, w_ptr, scales_ptr, column_T, valid_T, D, CHUNK, True, False,
        FP8_ROWS,
    )  # fmt: skip
    up_TR = multiply(
        hidden_ptr, R, r_R, all_R, norm_ptr, rms_R, w_ptr, scales_ptr, WIDTH + column_T, valid_T, D, CHUNK, True, False,
        FP8_ROWS,
    )  # fmt: skip
    out_TR = gate_TR * tl.sigmoid(gate_TR) * up_TR
    at_TR = act_ptr + column_T[:, None] * R + r_R[None, :]
    tl.store(at_TR, out_TR.to(act_ptr.dtype.element_ty), mask=valid_T[:, None])
