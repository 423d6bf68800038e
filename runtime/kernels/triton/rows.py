"""The rows of a step as kernels see them: a record of eight int32 a row, and one a sequence.

TOKEN           -1 for an idle row
SLOT, POSITION
FIRST_POSITION  where the row's sequence begins in this step
FIRST_ROW       of the sequence with this index: sequences of a step are numbered in order
NUM_ROWS        of the sequence with this index, 0 where there is none

A sequence that is decoded without the host owns rows OWN_ROW to OWN_ROW + CAPACITY, in use or not, and has a record
with the same index in the buffer `sequences`; the records of all others are zeros.

CAPACITY        rows that it owns: the anchor's, and one for each draft of a round at most
OWN_ROW, OWN_SLOT
LENGTH, END     tokens that are committed, and how many may be; it is over when they are equal
NGRAM           the longest run of tokens that a look-up looks for
WATCHES_EOS     whether an end-of-sequence token ends it
"""

import triton
import triton.language as tl

RECORD = tl.constexpr(8)
TOKEN = tl.constexpr(0)
SLOT = tl.constexpr(1)
POSITION = tl.constexpr(2)
FIRST_POSITION = tl.constexpr(3)
FIRST_ROW = tl.constexpr(4)
NUM_ROWS = tl.constexpr(5)
# Of a sequence's record.
CAPACITY = tl.constexpr(0)
OWN_ROW = tl.constexpr(1)
OWN_SLOT = tl.constexpr(2)
LENGTH = tl.constexpr(3)
END = tl.constexpr(4)
NGRAM = tl.constexpr(5)
WATCHES_EOS = tl.constexpr(6)


@triton.jit
def field(rows_ptr, row, FIELD: tl.constexpr):
    """A field of one row, or of several; or of a sequence."""
    return tl.load(rows_ptr + row * RECORD + FIELD)


@triton.jit
def write_rows(sequence, rows_ptr, own_row, capacity, slot, position, token_R, num_rows, R: tl.constexpr):
    """A sequence's rows of the next step: token_R[i] at position + i in its row i < num_rows, its other rows idle.

    Touches nothing but the `capacity` rows from own_row on, and the fields of the sequence with this index.
    """
    i_R = tl.arange(0, R)
    is_own_R = i_R < capacity
    at_R = rows_ptr + (own_row + i_R) * RECORD
    tl.store(at_R + TOKEN, tl.where(i_R < num_rows, token_R, -1), mask=is_own_R)
    tl.store(at_R + SLOT, slot + i_R * 0, mask=is_own_R)
    tl.store(at_R + POSITION, position + i_R, mask=is_own_R)
    tl.store(at_R + FIRST_POSITION, position + i_R * 0, mask=is_own_R)
    tl.store(rows_ptr + sequence * RECORD + FIRST_ROW, own_row)
    tl.store(rows_ptr + sequence * RECORD + NUM_ROWS, num_rows)


@triton.jit
def first_visible(position, WINDOW: tl.constexpr):
    """The first position that a row at `position` attends to; WINDOW 0 means all."""
    if WINDOW == 0:
        return position * 0
    return tl.maximum(position - WINDOW + 1, 0)
