"""Attention of one split of a context, and the combination of splits. Legend: see the package.

A split is a block of absolute positions walked in absolute chunks, so a row's partial result depends on its position
alone. An item takes all rows of one sequence, QUERIES (row, head) pairs at a time, and appends those rows' keys and
values that lie in its split first.
"""

import triton
import triton.language as tl

from speedstack.runtime.backends.gpu.kernels.layers.matmul import dot, normed
from speedstack.runtime.backends.gpu.kernels.rows import (
    FIRST_POSITION,
    FIRST_ROW,
    NUM_ROWS,
    POSITION,
    SLOT,
    TOKEN,
    field,
    first_visible,
    last_position_of,
)

# Rows appended at a time.
APPENDED = tl.constexpr(4)


@triton.jit
def rotated(
    qkv_ptr,
    column_I,
    row_I,
    valid_I,
    position_I,
    norm_ptr,
    cos_ptr,
    sin_ptr,
    eps,
    H: tl.constexpr,
    HP: tl.constexpr,
    HALF: tl.constexpr,
    R: tl.constexpr,
    HAS_QK_NORM: tl.constexpr,
):
    """Heads [I, HP] from columns column_I: QK-norm, then rotary of the first 2 * HALF dimensions.

    The rotation partner is loaded again, because lanes cannot read each other's values. Cosines and sines are
    [positions, HALF] in the activations' dtype.
    """
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    h_H = tl.arange(0, HP)
    is_turned_H = h_H < 2 * HALF
    partner_H = tl.where(h_H < HALF, h_H + HALF, tl.where(is_turned_H, h_H - HALF, h_H))
    mask_IH = valid_I[:, None] & (h_H < H)[None, :]
    x_IH = tl.load(qkv_ptr + (column_I[:, None] + h_H[None, :]) * R + row_I[:, None], mask=mask_IH, other=0.0)
    y_IH = tl.load(qkv_ptr + (column_I[:, None] + partner_H[None, :]) * R + row_I[:, None], mask=mask_IH, other=0.0)
    x_IH, y_IH = x_IH.to(tl.float32), y_IH.to(tl.float32)
    if HAS_QK_NORM:
        rms_I1 = tl.rsqrt(tl.sum(x_IH * x_IH, axis=1) / H + eps)[:, None]
        x_IH = normed(x_IH, rms_I1, tl.load(norm_ptr + h_H, mask=h_H < H, other=0.0)[None, :], dtype).to(tl.float32)
        y_IH = normed(y_IH, rms_I1, tl.load(norm_ptr + partner_H, mask=h_H < H, other=0.0)[None, :], dtype)
        y_IH = y_IH.to(tl.float32)
    angle_IH = position_I[:, None] * HALF + tl.where(h_H < HALF, h_H, h_H - HALF)[None, :]
    is_turned_IH = mask_IH & is_turned_H[None, :]
    cos_IH = tl.load(cos_ptr + angle_IH, mask=is_turned_IH, other=1.0).to(tl.float32)
    sin_IH = tl.load(sin_ptr + angle_IH, mask=is_turned_IH, other=0.0).to(tl.float32)
    return x_IH * cos_IH + y_IH * tl.where((h_H < HALF)[None, :], -sin_IH, sin_IH)


@triton.jit
def append_rows(
    first_row,
    end_row,
    shift,
    column,
    qkv_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    keys_ptr,
    eps,
    value_scale,
    H: tl.constexpr,
    V: tl.constexpr,
    HALF: tl.constexpr,
    R: tl.constexpr,
    RING: tl.constexpr,
    HP: tl.constexpr,
    VP: tl.constexpr,
    HAS_QK_NORM: tl.constexpr,
):
    """Appends keys and values of rows first_row to end_row of one sequence to its ring; row r is at position r + shift.

    column: of the key's first dimension; the value follows. A few rows at a time: a step appends few, and rotating all
    of them at once fills the registers.
    """
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    h_H, v_V = tl.arange(0, HP), tl.arange(0, VP)
    for row in range(first_row, end_row, APPENDED):
        row_A = row + tl.arange(0, APPENDED)
        is_new_A = row_A < end_row
        position_A = row_A + shift
        key_AH = rotated(
            qkv_ptr, column + row_A * 0, row_A, is_new_A, position_A, k_norm_ptr, cos_ptr, sin_ptr, eps, H, HP, HALF, R,
            HAS_QK_NORM,
        )  # fmt: skip
        value_mask_AV = is_new_A[:, None] & (v_V < V)[None, :]
        value_AV = tl.load(
            qkv_ptr + (column + H + v_V)[None, :] * R + row_A[:, None], mask=value_mask_AV, other=0.0
        )  # fmt: skip
        value_AV = value_AV.to(tl.float32) * value_scale
        place_A = (position_A % RING) * (H + V)
        key_mask_AH = is_new_A[:, None] & (h_H < H)[None, :]
        tl.store(keys_ptr + place_A[:, None] + h_H[None, :], key_AH.to(dtype), mask=key_mask_AH)
        tl.store(keys_ptr + place_A[:, None] + H + v_V[None, :], value_AV.to(dtype), mask=value_mask_AV)


@triton.jit
def attention_item(
    sequence,
    kv_head,
    split,
    rows_ptr,
    qkv_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    cache_ptr,
    partial_ptr,
    eps,
    value_scale,
    softmax_scale,
    num_slots,
    M: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    V: tl.constexpr,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
    R: tl.constexpr,
    RING: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    HP: tl.constexpr,
    VP: tl.constexpr,
    MP: tl.constexpr,
    QUERIES: tl.constexpr,
    C: tl.constexpr,
    HAS_QK_NORM: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """One sequence, key/value head and split: appends its rows, then writes every row's partial result.

    A row also sees AHEAD later positions that the step has. Splits count from the first that the sequence's first row
    sees; one past the last row does nothing. A partial result is V unnormalized sums, the softmax's peak and its total.
    HP, VP, MP: H, V, M as powers of two.
    """
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    num_rows = field(rows_ptr, sequence, NUM_ROWS)
    if num_rows > 0:
        first_row = field(rows_ptr, sequence, FIRST_ROW)
        first_position, slot = field(rows_ptr, first_row, POSITION), field(rows_ptr, first_row, SLOT)
        last_position = first_position + num_rows - 1
        low = first_visible(first_position, WINDOW)
        start = (low // SPLIT + split) * SPLIT
        if start <= last_position:
            own_columns = kv_head * COLUMNS
            keys_ptr = cache_ptr + (kv_head * num_slots + slot).to(tl.int64) * (RING * (H + V))
            h_H, v_V = tl.arange(0, HP), tl.arange(0, VP)

            first_new = first_row + tl.maximum(start - first_position, 0)
            end_new = first_row + tl.minimum(start + SPLIT - first_position, num_rows)
            append_rows(
                first_new, end_new, first_position - first_row, own_columns + M * H, qkv_ptr, k_norm_ptr, cos_ptr,
                sin_ptr, keys_ptr, eps, value_scale, H, V, HALF, R, RING, HP, VP, HAS_QK_NORM,
            )  # fmt: skip
            # Other threads of this program read these stores.
            tl.debug_barrier()

            i_I = tl.arange(0, QUERIES)
            head_I = i_I % MP
            begin = tl.maximum(start, low) // C * C
            end = tl.minimum(start + SPLIT, last_position + 1)
            # Usually one tile: hoisting its keys' addresses is not worth the registers.
            for first in tl.range(0, num_rows, QUERIES // MP, disable_licm=True):
                nth_I = first + i_I // MP
                valid_I = (nth_I < num_rows) & (head_I < M)
                row_I, position_I = first_row + nth_I, first_position + nth_I
                q_IH = rotated(
                    qkv_ptr, own_columns + head_I * H, row_I, valid_I, position_I, q_norm_ptr, cos_ptr, sin_ptr, eps,
                    H, HP, HALF, R, HAS_QK_NORM,
                ).to(dtype)  # fmt: skip
                low_I = first_visible(position_I, WINDOW)
                high_I = position_I
                if AHEAD > 0:
                    high_I = tl.minimum(position_I + AHEAD, last_position)
                peak_I = tl.full((QUERIES,), float("-inf"), tl.float32)
                total_I = tl.zeros((QUERIES,), tl.float32)
                sum_IV = tl.zeros((QUERIES, VP), tl.float32)
                for chunk in range(begin, end, C):
                    key_C = chunk + tl.arange(0, C)
                    # Values outside may be anything, even NaN; they must not be multiplied by zero.
                    is_there_C = (key_C >= low) & (key_C <= last_position)
                    place_C = (key_C % RING) * (H + V)
                    k_HC = tl.load(
                        keys_ptr + place_C[None, :] + h_H[:, None],
                        mask=is_there_C[None, :] & (h_H < H)[:, None],
                        other=0.0,
                    )
                    v_CV = tl.load(
                        keys_ptr + place_C[:, None] + H + v_V[None, :],
                        mask=is_there_C[:, None] & (v_V < V)[None, :],
                        other=0.0,
                    )
                    scores_IC = dot(q_IH, k_HC, tl.zeros((QUERIES, C), tl.float32)) * softmax_scale
                    is_seen_IC = (key_C[None, :] >= low_I[:, None]) & (key_C[None, :] <= high_I[:, None])
                    scores_IC = tl.where(is_seen_IC, scores_IC, float("-inf"))
                    new_peak_I = tl.maximum(peak_I, tl.max(scores_IC, axis=1))
                    shift_I = tl.where(new_peak_I == float("-inf"), 0.0, new_peak_I)
                    rescale_I = tl.exp(peak_I - shift_I)
                    p_IC = tl.exp(scores_IC - shift_I[:, None])
                    total_I = total_I * rescale_I + tl.sum(p_IC, axis=1)
                    sum_IV = dot(p_IC.to(dtype), v_CV, sum_IV * rescale_I[:, None])
                    peak_I = new_peak_I
                at_I = partial_ptr + ((row_I * (G * M) + kv_head * M + head_I) * SPLITS + split) * (V + 2)
                tl.store(at_I[:, None] + v_V[None, :], sum_IV, mask=valid_I[:, None] & (v_V < V)[None, :])
                tl.store(at_I + V, peak_I, mask=valid_I)
                tl.store(at_I + V + 1, total_I, mask=valid_I)


@triton.jit
def combine_item(
    row,
    head,
    rows_ptr,
    sinks_ptr,
    partial_ptr,
    attended_ptr,
    N: tl.constexpr,
    V: tl.constexpr,
    VP: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    S: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    R: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Combines one row's splits, S absolute ones at a time, ascending; a sink only adds to the total."""
    if field(rows_ptr, row, TOKEN) >= 0:
        position = field(rows_ptr, row, POSITION)
        base = first_visible(field(rows_ptr, row, FIRST_POSITION), WINDOW) // SPLIT
        last = position
        if AHEAD > 0:
            last = tl.minimum(position + AHEAD, last_position_of(row, rows_ptr, R))
        low, high = first_visible(position, WINDOW) // SPLIT, last // SPLIT
        v_V, s_S = tl.arange(0, VP), tl.arange(0, S)
        peak = position.to(tl.float32) * 0 - float("inf")
        total = position.to(tl.float32) * 0
        if HAS_SINKS:
            peak = tl.load(sinks_ptr + head).to(tl.float32)
            total = total + 1.0
        sum_V = tl.zeros((VP,), tl.float32)
        for group in range(low // S, high // S + 1):
            split_S = group * S + s_S
            valid_S = (split_S >= low) & (split_S <= high)
            at_S = partial_ptr + ((row * N + head) * SPLITS + split_S - base) * (V + 2)
            peak_S = tl.load(at_S + V, mask=valid_S, other=float("-inf"))
            total_S = tl.load(at_S + V + 1, mask=valid_S, other=0.0)
            sum_SV = tl.load(at_S[:, None] + v_V[None, :], mask=valid_S[:, None] & (v_V < V)[None, :], other=0.0)
            new_peak = tl.maximum(peak, tl.max(peak_S, axis=0))
            shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            rescale, rescale_S = tl.exp(peak - shift), tl.exp(peak_S - shift)
            total = total * rescale + tl.sum(total_S * rescale_S, axis=0)
            sum_V = sum_V * rescale + tl.sum(sum_SV * rescale_S[:, None], axis=0)
            peak = new_peak
        out_V = (sum_V / total).to(attended_ptr.dtype.element_ty)
        tl.store(attended_ptr + (row * N + head) * V + v_V, out_V, mask=v_V < V)
