"""Allocation of a step's rows, as in `runtime.rounds.row_allocation`.

Each item allocates for itself: from the rows each sequence wants, it derives its row's sequence and the rows of the
sequence at its own index. Tiles are one-dimensional: two-dimensional ones cost the persistent kernel registers in other
phases too. Legend: see the package; S sequences, as many as rows.
"""

import triton
import triton.language as tl

from speedstack.runtime.backends.gpu.kernels.rows import (
    ANCHOR,
    CAPACITY,
    END,
    FIRST_POSITION,
    FIRST_PROPOSED,
    FIRST_ROW,
    LENGTH,
    NUM_PROPOSED,
    NUM_ROWS,
    OWN_SLOT,
    POSITION,
    RECORD,
    SLOT,
    TOKEN,
    field,
)


@triton.jit
def end_of_live(sequences_ptr, R: tl.constexpr):
    """One past the last unfinished sequence, 0 without one; and whether any was decoded without the host."""
    s_S = tl.arange(0, R)
    is_own_S = field(sequences_ptr, s_S, CAPACITY) > 0
    is_live_S = is_own_S & (field(sequences_ptr, s_S, LENGTH) < field(sequences_ptr, s_S, END))
    return tl.max(tl.where(is_live_S, s_S + 1, 0), axis=0), tl.max(is_own_S.to(tl.int32), axis=0) > 0


@triton.jit
def rows_of_sequences(sequences_ptr, proposals_ptr, R: tl.constexpr, HAS_PROPOSALS: tl.constexpr):
    """Rows of each sequence, [S], and their inclusive prefix sums."""
    s_S = tl.arange(0, R)
    is_live_S = field(sequences_ptr, s_S, LENGTH) < field(sequences_ptr, s_S, END)
    num_S = is_live_S.to(tl.int32)
    if HAS_PROPOSALS:
        drafts_S = tl.load(proposals_ptr + s_S * R + NUM_PROPOSED, mask=is_live_S, other=0)
        num_free = R - tl.sum(num_S, axis=0)
        # Full turns: the most drafts that all can get alike, found bit by bit; then one more for the first sequences.
        num_turns = num_free * 0
        bit = num_turns + R // 2
        while bit > 0:
            num_taken = tl.sum(tl.minimum(drafts_S, num_turns + bit), axis=0)
            num_turns += tl.where(num_taken <= num_free, bit, 0)
            bit = bit // 2
        num_left = num_free - tl.sum(tl.minimum(drafts_S, num_turns), axis=0)
        wants_more_S = (drafts_S > num_turns).to(tl.int32)
        num_S += tl.minimum(drafts_S, num_turns)
        num_S += wants_more_S * (tl.cumsum(wants_more_S, axis=0) <= num_left).to(tl.int32)
    return num_S, tl.cumsum(num_S, axis=0)


@triton.jit
def allocate_row(
    row,
    sequences_ptr,
    draws_ptr,
    proposals_ptr,
    rows_ptr,
    sampling_ptr,
    R: tl.constexpr,
    HAS_PROPOSALS: tl.constexpr,
):
    """A row's token, -1 if idle; writes its record, its sampling state and that of the sequence at its index.

    If the host decodes all sequences, it has written both.
    """
    token = field(rows_ptr, row, TOKEN)
    _, is_allocated = end_of_live(sequences_ptr, R)
    if is_allocated:
        num_S, past_S = rows_of_sequences(sequences_ptr, proposals_ptr, R, HAS_PROPOSALS)
        sequence, number, token = write_record(row, sequences_ptr, rows_ptr, num_S, past_S, R)
        is_used = sequence < R
        if HAS_PROPOSALS:
            is_draft = is_used & (number > 0)
            draft_ptr = proposals_ptr + sequence * R + (FIRST_PROPOSED - 1) + number
            token = tl.where(is_draft, tl.load(draft_ptr, mask=is_draft, other=-1), token)
        tl.store(rows_ptr + row * RECORD + TOKEN, token)
        f_F = tl.arange(0, RECORD)
        draw_F = tl.load(draws_ptr + sequence * RECORD + f_F, mask=f_F < tl.where(is_used, RECORD, 0), other=0)
        tl.store(sampling_ptr + row * RECORD + f_F, draw_F)
    return token


@triton.jit
def write_record(row, sequences_ptr, rows_ptr, num_S, past_S, R: tl.constexpr):
    """Writes a row's record except its token, and that of the sequence at its index.

    num_S, past_S: rows per sequence and their inclusive prefix sums. Returns the row's sequence (R if idle), its number
    within it, and the sequence's newest token (-1 if idle).
    """
    s_S = tl.arange(0, R)
    # A sequence without rows ends where the previous one does.
    sequence = tl.sum((past_S <= row).to(tl.int32), axis=0)
    is_used = sequence < R
    number = row - tl.sum(tl.where(s_S == sequence, past_S - num_S, 0), axis=0)
    own_ptr, row_ptr = sequences_ptr + sequence * RECORD, rows_ptr + row * RECORD
    position = tl.load(own_ptr + LENGTH, mask=is_used, other=1) - 1
    tl.store(row_ptr + SLOT, tl.load(own_ptr + OWN_SLOT, mask=is_used, other=0))
    tl.store(row_ptr + POSITION, tl.where(is_used, position + number, 0))
    tl.store(row_ptr + FIRST_POSITION, position)
    tl.store(row_ptr + NUM_ROWS, tl.sum(tl.where(s_S == row, num_S, 0), axis=0))
    tl.store(row_ptr + FIRST_ROW, tl.sum(tl.where(s_S == row, past_S - num_S, 0), axis=0))
    return sequence, number, tl.load(own_ptr + ANCHOR, mask=is_used, other=-1)
