"""Acceptance without the host: which drafts stand, what that commits, and what the sequence does next.

The rule is `speedstack.dflash.accept` for drafts in a chain: a draft stands when it is the token that the target chose
after the row before it, and all before it stood. See the package for the legend; L end-of-sequence tokens.
"""

import triton
import triton.language as tl

from speedstack.runtime.kernels.triton.rows import (
    CAPACITY,
    END,
    LENGTH,
    NUM_ROWS,
    OWN_ROW,
    OWN_SLOT,
    RECORD,
    TOKEN,
    WATCHES_EOS,
    field,
    write_rows,
)


@triton.jit
def accept_item(
    sequence,
    rows_ptr,
    sequences_ptr,
    chosen_ptr,
    outcome_ptr,
    eos_ptr,
    history_ptr,
    R: tl.constexpr,
    LP: tl.constexpr,
    STRIDE: tl.constexpr,
    HAS_HISTORY: tl.constexpr,
):
    """Commits what one sequence's rows of this step have earned; nothing for one that the host decodes.

    outcome[sequence]: its rows in this step, 0 if it is over, and how many of its drafts stand. A sequence is over
    after an end-of-sequence token, after its last token, and after a logit that is not a number, where it commits -1.
    HAS_HISTORY: committed tokens are appended to the sequence's text, STRIDE tokens from a slot's to the next one's,
    where `draft` reads them and writes the rows of the next step; else those are written here, one a sequence. LP:
    tokens at eos_ptr, a power of two.
    """
    record_ptr = sequences_ptr + sequence * RECORD
    capacity = tl.load(record_ptr + CAPACITY)
    num_rows = tl.where(capacity > 0, field(rows_ptr, sequence, NUM_ROWS), 0)
    num_accepted = num_rows * 0
    if num_rows > 0:
        own_row, slot = tl.load(record_ptr + OWN_ROW), tl.load(record_ptr + OWN_SLOT)
        length, end = tl.load(record_ptr + LENGTH), tl.load(record_ptr + END)
        watches_eos = tl.load(record_ptr + WATCHES_EOS)
        i_R = tl.arange(0, R)
        chosen_R = tl.load(chosen_ptr + own_row + i_R, mask=i_R < num_rows, other=-1)
        has_draft_R = i_R + 1 < num_rows
        draft_R = tl.load(rows_ptr + (own_row + i_R + 1) * RECORD + TOKEN, mask=has_draft_R, other=-1)
        num_accepted = tl.min(tl.where(has_draft_R & (draft_R == chosen_R), R, i_R), axis=0)
        eos_L = tl.load(eos_ptr + tl.arange(0, LP))
        is_eos_R = tl.max((chosen_R[:, None] == eos_L[None, :]).to(tl.int32), axis=1) > 0
        ends_R = (chosen_R < 0) | (is_eos_R & (watches_eos > 0))
        last = tl.minimum(num_accepted, tl.min(tl.where(ends_R, i_R, R), axis=0))
        is_ended = tl.max((ends_R & (i_R == last)).to(tl.int32), axis=0) > 0
        # Every warp has read these records before one of them changes them.
        tl.debug_barrier()
        is_committed_R = i_R <= last
        new_length = length + last + 1
        end = tl.where(is_ended, new_length, end)
        tl.store(record_ptr + LENGTH, new_length)
        tl.store(record_ptr + END, end)
        if HAS_HISTORY:
            tl.store(history_ptr + slot * STRIDE + length + i_R, chosen_R, mask=is_committed_R)
        else:
            anchor = tl.max(tl.where(i_R == last, chosen_R, -1), axis=0)
            goes_on = (new_length < end).to(tl.int32)
            write_rows(sequence, rows_ptr, own_row, capacity, slot, new_length - 1, anchor + i_R * 0, goes_on, R)
    tl.store(outcome_ptr + 2 * sequence, num_rows)
    tl.store(outcome_ptr + 2 * sequence + 1, num_accepted)
