"""A step's rows in kernels: `speedstack.runtime.plan.record_layout` as compile-time constants."""

import triton
import triton.language as tl

from speedstack.runtime.plan import record_layout

# No token: larger than any index.
NO_TOKEN = tl.constexpr(2**31 - 1)
RECORD = tl.constexpr(record_layout.RECORD)
TOKEN = tl.constexpr(record_layout.TOKEN)
SLOT = tl.constexpr(record_layout.SLOT)
POSITION = tl.constexpr(record_layout.POSITION)
FIRST_POSITION = tl.constexpr(record_layout.FIRST_POSITION)
FIRST_ROW = tl.constexpr(record_layout.FIRST_ROW)
NUM_ROWS = tl.constexpr(record_layout.NUM_ROWS)
# Row sampling state.
SEED = tl.constexpr(record_layout.SEED)
SEQUENCE = tl.constexpr(record_layout.SEQUENCE)
TEMPERATURE = tl.constexpr(record_layout.TEMPERATURE)
TOP_K = tl.constexpr(record_layout.TOP_K)
TOP_P = tl.constexpr(record_layout.TOP_P)
# Sequence record.
CAPACITY = tl.constexpr(record_layout.CAPACITY)
ANCHOR = tl.constexpr(record_layout.ANCHOR)
OWN_SLOT = tl.constexpr(record_layout.OWN_SLOT)
LENGTH = tl.constexpr(record_layout.LENGTH)
END = tl.constexpr(record_layout.END)
NGRAM = tl.constexpr(record_layout.NGRAM)
WATCHES_EOS = tl.constexpr(record_layout.WATCHES_EOS)
# A sequence's proposals, and the words of its outcome.
NUM_PROPOSED = tl.constexpr(record_layout.NUM_PROPOSED)
FIRST_PROPOSED = tl.constexpr(record_layout.FIRST_PROPOSED)
# An active expert's record, after the rows' words.
EXPERT = tl.constexpr(record_layout.EXPERT)
NUM_ACTIVE = tl.constexpr(record_layout.NUM_ACTIVE)
OUTCOME = tl.constexpr(record_layout.OUTCOME)


@triton.jit
def field(rows_ptr, row, FIELD: tl.constexpr):
    """A field of one or several rows or sequences."""
    return tl.load(rows_ptr + row * RECORD + FIELD)


@triton.jit
def is_used(rows_ptr, R: tl.constexpr):
    """Which rows of the step are in use, [R]."""
    return field(rows_ptr, tl.arange(0, R), TOKEN) >= 0


@triton.jit
def has_rows(rows_ptr, R: tl.constexpr):
    """Whether the step has any rows."""
    return tl.max(is_used(rows_ptr, R).to(tl.int32), axis=0) > 0


@triton.jit
def last_position_of(row, rows_ptr, R: tl.constexpr):
    """The last position in the step of this row's sequence."""
    r_R = tl.arange(0, R)
    is_same_R = is_used(rows_ptr, R) & (field(rows_ptr, r_R, SLOT) == field(rows_ptr, row, SLOT))
    return tl.max(tl.where(is_same_R, field(rows_ptr, r_R, POSITION), 0), axis=0)


@triton.jit
def is_drawn(sampling_ptr, row):
    """Whether noise is added after these rows: their temperature is not zero."""
    return field(sampling_ptr, row, TEMPERATURE) > 0  # bits of a nonnegative float


@triton.jit
def has_topk_or_topp(rows_ptr, sampling_ptr, row, VOCAB: tl.constexpr):
    """Whether top-k or top-p may drop tokens of these rows."""
    top_k = field(sampling_ptr, row, TOP_K)
    is_part = ((top_k > 0) & (top_k < VOCAB)) | (field(sampling_ptr, row, TOP_P) > 0)
    return (field(rows_ptr, row, TOKEN) >= 0) & is_drawn(sampling_ptr, row) & is_part


@triton.jit
def first_visible(position, WINDOW: tl.constexpr):
    """The first position that a row at `position` attends to; WINDOW 0 means all."""
    if WINDOW == 0:
        return position * 0
    return tl.maximum(position - WINDOW + 1, 0)
