"""Prompt lookup in a sequence's own text, in GPU memory. The rule is `speedstack.dflash.ngram`'s.

One program scans the whole text every round, without an index. No load depends on another, so many are in flight:
tokens at BLOCK places for GRAMS run sizes. Legend: see the package.

Left out: sharing a text among programs, which would need one more wait to combine results.
"""

import triton
import triton.language as tl

from speedstack.runtime.backends.gpu.kernels.rows import (
    CAPACITY,
    END,
    FIRST_PROPOSED,
    LENGTH,
    NGRAM,
    NUM_PROPOSED,
    OWN_SLOT,
    RECORD,
)

GRAMS = tl.constexpr(4)  # run sizes compared at a time


@triton.jit
def draft_item(
    sequence, sequences_ptr, history_ptr, proposals_ptr, R: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr
):
    """Writes one sequence's prompt-lookup proposals: their number and tokens, no more than could be committed."""
    record_ptr = sequences_ptr + sequence * RECORD
    length = tl.load(record_ptr + LENGTH)
    num_left = tl.load(record_ptr + END) - length
    if num_left > 0:
        text_ptr = history_ptr + tl.load(record_ptr + OWN_SLOT).to(tl.int64) * STRIDE
        num_drafts = tl.minimum(tl.load(record_ptr + CAPACITY), num_left) - 1
        follower = length
        if num_drafts > 0:
            follower = latest_follower(text_ptr, length, tl.load(record_ptr + NGRAM), BLOCK)
        period = length - follower
        num_drafts = tl.where(period > 0, num_drafts, 0)
        i_R = tl.arange(0, R)
        is_draft_R = i_R < num_drafts
        token_R = tl.load(text_ptr + follower + i_R % tl.maximum(period, 1), mask=is_draft_R, other=-1)
        proposals_ptr += sequence * R
        tl.store(proposals_ptr + NUM_PROPOSED, num_drafts)
        tl.store(proposals_ptr + FIRST_PROPOSED + i_R, token_R, mask=is_draft_R)


@triton.jit
def latest_follower(text_ptr, length, ngram, BLOCK: tl.constexpr):
    """The place after the latest occurrence of the longest run of last tokens, at most `ngram`; else `length`.

    Compares BLOCK places at a time.
    """
    longest, found = length * 0, length
    for start in range(0, length, BLOCK):
        place_B = start + tl.arange(0, BLOCK)
        size_B = tl.zeros((BLOCK,), tl.int32)
        for base in range(0, ngram, GRAMS):
            for n in tl.static_range(GRAMS):
                size = base + n + 1
                is_there_B = (place_B >= size) & (place_B < tl.where(size <= ngram, length, 0))
                token_B = tl.load(text_ptr + place_B - size, mask=is_there_B, other=-1)
                last = tl.load(text_ptr + tl.maximum(length - size, 0))
                # A run of this size ends here if the one shorter by one does.
                size_B += (is_there_B & (size_B == size - 1) & (token_B == last)).to(tl.int32)
        largest = tl.max(size_B, axis=0)
        latest = tl.max(tl.where(size_B == largest, place_B, 0), axis=0)
        is_better = (largest > 0) & (largest >= longest)
        found = tl.where(is_better, latest, found)
        longest = tl.maximum(longest, largest)
    return found
