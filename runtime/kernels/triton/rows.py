"""The rows of a step as kernels see them: a record of eight int32 a row.

TOKEN           -1 for an idle row
SLOT, POSITION
FIRST_POSITION  where the row's sequence begins in this step
FIRST_ROW       of the sequence with this index: sequences of a step are numbered in order
NUM_ROWS        of the sequence with this index, 0 where there is none
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


@triton.jit
def field(rows_ptr, row, FIELD: tl.constexpr):
    """A field of one row, or of several."""
    return tl.load(rows_ptr + row * RECORD + FIELD)


@triton.jit
def first_visible(position, WINDOW: tl.constexpr):
    """The first position that a row at `position` attends to; WINDOW 0 means all."""
    if WINDOW == 0:
        return position * 0
    return tl.maximum(position - WINDOW + 1, 0)
