"""The DFlash drafter's own phases: blocks, proposals, and context. Its layers use the target's device functions.

Legend: see the package.
"""

import triton
import triton.language as tl

from speedstack.runtime.backends.gpu.kernels.layers.attention import append_rows
from speedstack.runtime.backends.gpu.kernels.layers.matmul import BLOCK, inverse_rms, multiply, write_for_norm
from speedstack.runtime.backends.gpu.kernels.rounds.row_allocation import write_record
from speedstack.runtime.backends.gpu.kernels.rows import (
    CAPACITY,
    END,
    FIRST_PROPOSED,
    FIRST_ROW,
    LENGTH,
    NO_TOKEN,
    NUM_PROPOSED,
    NUM_ROWS,
    POSITION,
    RECORD,
    SLOT,
    TOKEN,
    field,
    is_used,
)


@triton.jit
def block_row(row, sequences_ptr, blocks_ptr, R: tl.constexpr, MASK: tl.constexpr, FIRST_SLOT: tl.constexpr):
    """A block row's token, -1 if idle; writes its record and that of the sequence at its index.

    A block is the newest token and MASK, with as many rows as the sequence can use proposals.
    """
    s_S = tl.arange(0, R)
    capacity_S, length_S = field(sequences_ptr, s_S, CAPACITY), field(sequences_ptr, s_S, LENGTH)
    drafts_S = tl.minimum(capacity_S, field(sequences_ptr, s_S, END) - length_S) - 1
    num_S = tl.where(drafts_S > 0, drafts_S + FIRST_SLOT, 0)
    sequence, number, token = write_record(row, sequences_ptr, blocks_ptr, num_S, tl.cumsum(num_S, axis=0), R)
    token = tl.where((sequence < R) & (number > 0), MASK, token)
    tl.store(blocks_ptr + row * RECORD + TOKEN, token)
    return token


@triton.jit
def pick_item(
    sequence, blocks_ptr, best_ptr, proposals_ptr, TILES: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr,
    FIRST_SLOT: tl.constexpr,
):  # fmt: skip
    """One sequence's proposals: for each block row the argmax over TILES tiles, STEP at a time, up to the first NaN."""
    first_row, num_rows = field(blocks_ptr, sequence, FIRST_ROW), field(blocks_ptr, sequence, NUM_ROWS)
    own_ptr = proposals_ptr + sequence * R
    count = num_rows * 0
    if num_rows > 0:
        r_R = tl.arange(0, R)
        value_R, token_R = tl.full((R,), float("-inf"), tl.float32), tl.full((R,), NO_TOKEN, tl.int32)
        for start in range(0, TILES, STEP):
            t_T = start + tl.arange(0, STEP)
            at_TR = best_ptr + t_T[:, None] * (2 * R) + r_R[None, :]
            is_tile_T1 = (t_T < TILES)[:, None]
            value_TR = tl.load(at_TR, mask=is_tile_T1, other=0).to(tl.float32, bitcast=True)
            value_TR = tl.where(is_tile_T1, value_TR, float("-inf"))
            index_TR = tl.load(at_TR + R, mask=is_tile_T1, other=NO_TOKEN)
            largest_R = tl.max(value_TR, axis=0)
            # A tile with NaN has the index -1, the smallest.
            is_best_TR = (value_TR == largest_R[None, :]) | (index_TR < 0)
            best_R = tl.min(tl.where(is_best_TR, index_TR, NO_TOKEN), axis=0)
            is_better_R = (largest_R > value_R) | (best_R < 0) | (token_R == NO_TOKEN)
            token_R = tl.where(is_better_R & (token_R >= 0), best_R, token_R)
            value_R = tl.maximum(value_R, largest_R)
        number_R = r_R - first_row - FIRST_SLOT
        is_own_R = (number_R >= 0) & (r_R < first_row + num_rows)
        count = num_rows - FIRST_SLOT
        count = tl.min(tl.where(is_own_R & (token_R < 0), number_R, count), axis=0)
        tl.store(own_ptr + FIRST_PROPOSED + number_R, token_R, mask=is_own_R & (number_R < count))
    tl.store(own_ptr + NUM_PROPOSED, count)


@triton.jit
def fuse_item(
    tile,
    rows_ptr,
    features_ptr,
    w_ptr,
    norm_ptr,
    context_ptr,
    squares_ptr,
    TAPS: tl.constexpr,
    TAP_STEP: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """T columns of the projection of all features, prepared for the norm with weight norm_ptr (see `matmul.py`).

    Features [TAPS, D / 16, R, 16] lie TAP_STEP elements apart; a weight row has D columns for each.
    """
    r_R = tl.arange(0, R)
    valid_R = is_used(rows_ptr, R)
    out_TR = tl.zeros((T, R), tl.float32)
    for tap in range(TAPS):
        out_TR += multiply(
            features_ptr + tap * TAP_STEP, BLOCK * R, r_R * BLOCK, valid_R, w_ptr + tap * D, w_ptr,
            (tile * T).to(tl.int64), D - tile * T, D, T, CHUNK, 0, TAPS * D,
        )  # fmt: skip
    out_TR = out_TR.to(context_ptr.dtype.element_ty).to(tl.float32)
    write_for_norm(out_TR, tile * T, norm_ptr, context_ptr, squares_ptr, D)


@triton.jit
def context_item(
    head,
    tile,
    rows_ptr,
    context_ptr,
    squares_ptr,
    w_ptr,
    kv_ptr,
    eps,
    FIRST: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    NP: tl.constexpr,
    T: tl.constexpr,
    TILES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """T columns of one head's key and value (WIDTH in all), from weight row FIRST of its COLUMNS."""
    r_R, t_T = tl.arange(0, R), tile * T + tl.arange(0, T)
    valid_R, valid_T = is_used(rows_ptr, R), t_T < WIDTH
    out_TR = multiply(
        context_ptr, BLOCK * R, r_R * BLOCK, valid_R, w_ptr, w_ptr, (head * COLUMNS + FIRST + tile * T).to(tl.int64),
        WIDTH - tile * T, D, T, CHUNK,
    )  # fmt: skip
    out_TR *= inverse_rms(squares_ptr, valid_R, eps, D, R, NP)[None, :]
    at_TR = kv_ptr + (head * (TILES * T) + t_T)[:, None] * R + r_R[None, :]
    tl.store(at_TR, out_TR.to(kv_ptr.dtype.element_ty), mask=valid_T[:, None])


@triton.jit
def append_item(
    sequence,
    head,
    rows_ptr,
    kv_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    cache_ptr,
    eps,
    value_scale,
    num_slots,
    G: tl.constexpr,
    H: tl.constexpr,
    V: tl.constexpr,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
    R: tl.constexpr,
    RING: tl.constexpr,
    HP: tl.constexpr,
    VP: tl.constexpr,
):
    """Appends the keys and values of one of all layers' heads (G each) for all rows of one sequence."""
    num_rows = field(rows_ptr, sequence, NUM_ROWS)
    if num_rows > 0:
        first_row = field(rows_ptr, sequence, FIRST_ROW)
        first_position, slot = field(rows_ptr, first_row, POSITION), field(rows_ptr, first_row, SLOT)
        keys_ptr = cache_ptr + (head * num_slots + slot).to(tl.int64) * (RING * (H + V))
        append_rows(
            first_row, first_row + num_rows, first_position - first_row, head * COLUMNS, kv_ptr,
            k_norm_ptr + head // G * H, cos_ptr, sin_ptr, keys_ptr, eps, value_scale, H, V, HALF, R, RING, HP, VP, True,
        )  # fmt: skip
