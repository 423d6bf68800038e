"""Who gets the rows of a step, as `runtime.rounds.row_allocation` has it, and when there is nobody left to get any.

An item allocates for itself: from how many rows each sequence wants it works out whose row it is, and how many rows the
sequence of its own index has. Tiles have one dimension: those of two take registers of the persistent kernel outside of
this phase too. See the package for the legend; S sequences, as many as rows.
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
    """One past the last sequence that goes on, 0 if none does; and whether any is, or was, decoded without the host."""
    s_S = tl.arange(0, R)
    is_own_S = field(sequences_ptr, s_S, CAPACITY) > 0
    is_live_S = is_own_S & (field(sequences_ptr, s_S, LENGTH) < field(sequences_ptr, s_S, END))
    return tl.max(tl.where(is_live_S, s_S + 1, 0), axis=0), tl.max(is_own_S.to(tl.int32), axis=0) > 0


@triton.jit
def rows_of_sequences(sequences_ptr, proposals_ptr, R: tl.constexpr, HAS_PROPOSALS: tl.constexpr):
    """Of each sequence, [S]: how many rows it has, and those of all up to it and its own."""
    s_S = tl.arange(0, R)
    is_live_S = field(sequences_ptr, s_S, LENGTH) < field(sequences_ptr, s_S, END)
    num_S = is_live_S.to(tl.int32)
    if HAS_PROPOSALS:
        drafts_S = tl.load(proposals_ptr + s_S * R + NUM_PROPOSED, mask=is_live_S, other=0)
        num_free = R - tl.sum(num_S, axis=0)
        # Whole turns: the most drafts that all of them may have alike, if they want them, found bit by bit; then one
        # more for the first.
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
    """The token of a row, -1 if it is idle; writes the row's record and sampling state.

    With it goes what the record says of the sequence whose index is the row's. Where the host decodes all sequences, it
    has written both.
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
    """Writes a row's record but for its token, and what it says of the sequence whose index is the row's.

    num_S, past_S: rows of each sequence, and of all up to it and its own. Returns the row's sequence, R if it is idle,
    its number among that sequence's rows, and the sequence's newest token, -1 for an idle one.
    """
    s_S = tl.arange(0, R)
    # Sequences without a row end where the one before them does.
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
