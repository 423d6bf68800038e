"""Projections with weights shared by all rows. Legend: see the package."""

import triton
import triton.language as tl

from speedstack.runtime.backends.gpu.kernels.layers.matmul import (
    BLOCK,
    in_blocks,
    inverse_rms,
    multiply,
    write_for_norm,
)
from speedstack.runtime.backends.gpu.kernels.rows import is_used


@triton.jit
def qkv_item(
    kv_head,
    tile,
    rows_ptr,
    scaled_ptr,
    squares_ptr,
    w_ptr,
    bias_ptr,
    qkv_ptr,
    scales_ptr,
    eps,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    NP: tl.constexpr,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FP8_ROWS: tl.constexpr,
):
    """Norm, then T columns of a group's queries, key and value. COLUMNS of a group, padded to whole tiles.

    scaled_ptr, squares_ptr, NP, scales_ptr, FP8_ROWS: see `matmul.py`; here and below.
    """
    r_R = tl.arange(0, R)
    valid_R = is_used(rows_ptr, R)
    first = (kv_head * COLUMNS + tile * T).to(tl.int64)
    column_T = first + tl.arange(0, T)
    out_TR = multiply(
        scaled_ptr, BLOCK * R, r_R * BLOCK, valid_R, w_ptr, scales_ptr, first, T, D, T, CHUNK, FP8_ROWS
    )  # fmt: skip
    out_TR *= inverse_rms(squares_ptr, valid_R, eps, D, R, NP)[None, :]
    if HAS_BIAS:
        out_TR += tl.load(bias_ptr + column_T).to(tl.float32)[:, None]
    tl.store(qkv_ptr + column_T[:, None] * R + r_R[None, :], out_TR.to(qkv_ptr.dtype.element_ty))


@triton.jit
def project_item(
    tile,
    rows_ptr,
    x_ptr,
    w_ptr,
    bias_ptr,
    hidden_ptr,
    norm_ptr,
    scaled_ptr,
    squares_ptr,
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
    """T columns of a projection to the hidden size, added in place (see `add_to_hidden`).

    x_step, x_row_step: strides of sixteen elements and of a row (see `matmul.load_x`).
    """
    r_R = tl.arange(0, R)
    first = (tile * T).to(tl.int64)
    column_T = first + tl.arange(0, T)
    valid_T = column_T < D
    out_TR = multiply(
        x_ptr, x_step, r_R * x_row_step, is_used(rows_ptr, R), w_ptr, scales_ptr, first, D - tile * T, K, T,
        CHUNK, FP8_ROWS,
    )  # fmt: skip
    if HAS_BIAS:
        out_TR += tl.load(bias_ptr + column_T, mask=valid_T, other=0.0).to(tl.float32)[:, None]
    add_to_hidden(out_TR, tile * T, hidden_ptr, norm_ptr, scaled_ptr, squares_ptr, tap_ptr, D, HAS_TAP)


@triton.jit
def add_to_hidden(
    out_TR, first, hidden_ptr, norm_ptr, scaled_ptr, squares_ptr, tap_ptr, D: tl.constexpr, HAS_TAP: tl.constexpr
):
    """Adds float32 [T, R] to hidden columns from `first` and writes the next norm's inputs.

    norm_ptr: the next norm's weight. tap_ptr [D / 16, R, 16]: optional copy of the sum.
    """
    T: tl.constexpr = out_TR.shape[0]
    R: tl.constexpr = out_TR.shape[1]
    column_T = first + tl.arange(0, T)
    at_TR = column_T[:, None] * R + tl.arange(0, R)[None, :]
    valid_T1 = (column_T < D)[:, None]
    before_TR = tl.load(hidden_ptr + at_TR, mask=valid_T1, other=0.0).to(tl.float32)
    sum_TR = (before_TR + out_TR).to(hidden_ptr.dtype.element_ty)
    tl.store(hidden_ptr + at_TR, sum_TR, mask=valid_T1)
    if HAS_TAP:
        tl.store(tap_ptr + in_blocks(column_T, R), sum_TR, mask=valid_T1)
    write_for_norm(sum_TR.to(tl.float32), first, norm_ptr, scaled_ptr, squares_ptr, D)


@triton.jit
def dense_gate_up_item(
    tile,
    rows_ptr,
    scaled_ptr,
    squares_ptr,
    w_ptr,
    act_ptr,
    scales_ptr,
    eps,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    NP: tl.constexpr,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
    FP8_ROWS: tl.constexpr,
):
    """Norm, then silu(gate) * up of T columns; the weight's gate rows precede its up rows."""
    r_R = tl.arange(0, R)
    valid_R = is_used(rows_ptr, R)
    first, num_rows = (tile * T).to(tl.int64), WIDTH - tile * T
    column_T = first + tl.arange(0, T)
    valid_T = column_T < WIDTH
    gate_TR = multiply(
        scaled_ptr, BLOCK * R, r_R * BLOCK, valid_R, w_ptr, scales_ptr, first, num_rows, D, T, CHUNK, FP8_ROWS
    )  # fmt: skip
    up_TR = multiply(
        scaled_ptr, BLOCK * R, r_R * BLOCK, valid_R, w_ptr, scales_ptr, WIDTH + first, num_rows, D, T, CHUNK,
        FP8_ROWS,
    )  # fmt: skip
    rms_1R = inverse_rms(squares_ptr, valid_R, eps, D, R, NP)[None, :]
    gate_TR, up_TR = gate_TR * rms_1R, up_TR * rms_1R
    out_TR = gate_TR * tl.sigmoid(gate_TR) * up_TR
    tl.store(act_ptr + in_blocks(column_T, R), out_TR.to(act_ptr.dtype.element_ty), mask=valid_T[:, None])
