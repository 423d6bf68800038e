"""The rows of a step as kernels see them: `speedstack.runtime.records` as compile-time constants."""

import triton
import triton.language as tl

from speedstack.runtime import records

RECORD = tl.constexpr(records.RECORD)
TOKEN = tl.constexpr(records.TOKEN)
SLOT = tl.constexpr(records.SLOT)
POSITION = tl.constexpr(records.POSITION)
FIRST_POSITION = tl.constexpr(records.FIRST_POSITION)
FIRST_ROW = tl.constexpr(records.FIRST_ROW)
NUM_ROWS = tl.constexpr(records.NUM_ROWS)
# Of a row's sampling state.
SEED = tl.constexpr(records.SEED)
SEQUENCE = tl.constexpr(records.SEQUENCE)
TEMPERATURE = tl.constexpr(records.TEMPERATURE)
# Of a sequence's record.
CAPACITY = tl.constexpr(records.CAPACITY)
OWN_ROW = tl.constexpr(records.OWN_ROW)
OWN_SLOT = tl.constexpr(records.OWN_SLOT)
LENGTH = tl.constexpr(records.LENGTH)
END = tl.constexpr(records.END)
NGRAM = tl.constexpr(records.NGRAM)
WATCHES_EOS = tl.constexpr(records.WATCHES_EOS)


@triton.jit
def field(rows_ptr, row, FIELD: tl.constexpr):
    """A field of one row, or of several; or of a sequence."""
    return tl.load(rows_ptr + row * RECORD + FIELD)


@triton.jit
def is_used(rows_ptr, R: tl.constexpr):
    """Which rows the step has, [R]."""
    return field(rows_ptr, tl.arange(0, R), TOKEN) >= 0


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
