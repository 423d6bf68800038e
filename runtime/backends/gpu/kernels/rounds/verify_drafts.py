"""Acceptance of drafts without the host, by the rule of `speedstack.dflash.accept`.

Legend: see the package; L end-of-sequence tokens.
"""

import triton
import triton.language as tl

from speedstack.runtime.backends.gpu.kernels.rows import (
    ANCHOR,
    CAPACITY,
    END,
    FIRST_ROW,
    LENGTH,
    NUM_PROPOSED,
    NUM_ROWS,
    OUTCOME,
    OWN_SLOT,
    RECORD,
    TOKEN,
    WATCHES_EOS,
    field,
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
    proposals_ptr,
    R: tl.constexpr,
    LP: tl.constexpr,
    STRIDE: tl.constexpr,
    HAS_HISTORY: tl.constexpr,
    HAS_PROPOSALS: tl.constexpr,
):
    """Commits the tokens of one sequence's rows; nothing for a sequence that the host decodes.

    outcome[sequence]: its rows in this step (0 if finished), drafts accepted, and drafts proposed. A sequence ends
    after an end-of-sequence token, its last token, or NaN logits, where it commits -1. HAS_HISTORY: committed tokens
    are appended to the text, whose slots lie STRIDE tokens apart. LP: tokens at eos_ptr, a power of two.
    """
    record_ptr = sequences_ptr + sequence * RECORD
    capacity = tl.load(record_ptr + CAPACITY)
    num_rows = tl.where(capacity > 0, field(rows_ptr, sequence, NUM_ROWS), 0)
    num_accepted, num_proposed = num_rows * 0, num_rows * 0
    if num_rows > 0:
        own_row, slot = field(rows_ptr, sequence, FIRST_ROW), tl.load(record_ptr + OWN_SLOT)
        if HAS_PROPOSALS:
            num_proposed = tl.load(proposals_ptr + sequence * R + NUM_PROPOSED)
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
        # All warps must have read these records before one changes them.
        tl.debug_barrier()
        is_committed_R = i_R <= last
        new_length = length + last + 1
        end = tl.where(is_ended, new_length, end)
        tl.store(record_ptr + ANCHOR, tl.max(tl.where(i_R == last, chosen_R, -1), axis=0))
        tl.store(record_ptr + LENGTH, new_length)
        tl.store(record_ptr + END, end)
        if HAS_HISTORY:
            text_ptr = history_ptr + slot.to(tl.int64) * STRIDE
            tl.store(text_ptr + length + i_R, chosen_R, mask=is_committed_R)
    outcome_ptr += OUTCOME * sequence
    tl.store(outcome_ptr, num_rows)
    tl.store(outcome_ptr + 1, num_accepted)
    tl.store(outcome_ptr + 2, num_proposed)
