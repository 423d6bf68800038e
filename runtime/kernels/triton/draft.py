"""Drafts without the host: prompt look-up in a sequence's own text, which lies in GPU memory.

The rule is `speedstack.dflash.ngram`: the longest run of last tokens that occurred before, its latest occurrence, and
what followed it, copied round. The whole text is scanned every round by the one program that drafts for the sequence,
which takes longer the longer the text is; no index is kept. See the package for the legend.
"""

import triton
import triton.language as tl

from speedstack.runtime.kernels.triton.rows import (
    CAPACITY,
    END,
    LENGTH,
    NGRAM,
    OWN_ROW,
    OWN_SLOT,
    RECORD,
    write_rows,
)


@triton.jit
def draft_item(
    sequence, rows_ptr, sequences_ptr, history_ptr, R: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr
):
    """One sequence's rows of this step: its anchor, and what a look-up proposes; none if it is over.

    There are never more proposals than could be committed with the target's own token behind them. Rows of a sequence
    that the host decodes stay as they are.
    """
    record_ptr = sequences_ptr + sequence * RECORD
    capacity = tl.load(record_ptr + CAPACITY)
    if capacity > 0:
        own_row, slot = tl.load(record_ptr + OWN_ROW), tl.load(record_ptr + OWN_SLOT)
        length, ngram = tl.load(record_ptr + LENGTH), tl.load(record_ptr + NGRAM)
        num_left = tl.load(record_ptr + END) - length
        text_ptr = history_ptr + slot * STRIDE
        num_drafts = tl.minimum(capacity, num_left) - 1
        follower = length
        if num_drafts > 0:
            follower = latest_follower(text_ptr, length, ngram, BLOCK)
        period = length - follower
        num_drafts = tl.where(period > 0, num_drafts, 0)
        num_rows = tl.where(num_left > 0, num_drafts + 1, 0)
        i_R = tl.arange(0, R)
        place_R = tl.where(i_R > 0, follower + (i_R - 1) % tl.maximum(period, 1), length - 1)
        token_R = tl.load(text_ptr + place_R, mask=i_R < num_rows, other=-1)
        write_rows(sequence, rows_ptr, own_row, capacity, slot, length - 1, token_R, num_rows, R)


@triton.jit
def latest_follower(text_ptr, length, ngram, BLOCK: tl.constexpr):
    """The place behind the latest occurrence of the longest run of last tokens, up to `ngram` of them; else `length`.

    BLOCK places are compared at a time.
    """
    longest, found = length * 0, length
    for start in range(0, length, BLOCK):
        place_B = start + tl.arange(0, BLOCK)
        size_B = tl.zeros((BLOCK,), tl.int32)
        is_same_B = place_B < length
        for size in range(1, tl.minimum(ngram, length - 1) + 1):
            is_same_B = is_same_B & (place_B >= size)
            token_B = tl.load(text_ptr + place_B - size, mask=is_same_B, other=-1)
            is_same_B = is_same_B & (token_B == tl.load(text_ptr + length - size))
            size_B += is_same_B.to(tl.int32)
        largest = tl.max(size_B, axis=0)
        latest = tl.max(tl.where(size_B == largest, place_B, 0), axis=0)
        is_better = (largest > 0) & (largest >= longest)
        found = tl.where(is_better, latest, found)
        longest = tl.maximum(longest, largest)
    return found
