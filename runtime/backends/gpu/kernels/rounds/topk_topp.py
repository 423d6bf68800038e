"""Top-k and top-p: the logit from which a row keeps its tokens (`speedstack.runtime.rounds.sampling`).

The edge is the largest logit with enough tokens, or enough mass, at or above it. `logit_histogram`'s sums give its bin;
bisection over that bin's tokens gives the edge. Logits are compared as order-preserving integers, and counts and masses
are integers, so any order of addition gives the same edge. Many nearly equal logits share few bins, which takes longer.

Legend: see the package; C tokens at a time. Of a row, notes are int32: VOCAB keys, their masses, and TILES numbers of
tiles.
"""

import triton
import triton.language as tl

from speedstack.runtime.backends.gpu.kernels.rounds.logit_histogram import BINS, mass_of, steps_below
from speedstack.runtime.backends.gpu.kernels.rows import TEMPERATURE, TOP_K, TOP_P, field
from speedstack.runtime.rounds import sampling

_LEAST_KEY = tl.constexpr(-(2**31))
_LARGEST_KEY = tl.constexpr(2**31 - 1)
_SHARE_BITS = tl.constexpr(sampling.SHARE_BITS)
_SHARE_MASK = tl.constexpr((1 << sampling.SHARE_BITS) - 1)


@triton.jit
def key_of(x):
    """An order-preserving int32 for each float32 except NaN; both zeros are equal."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def share_of(total, share):
    """total * share / 2**24, rounded up, without overflow."""
    return (total >> _SHARE_BITS) * share + (((total & _SHARE_MASK) * share + _SHARE_MASK) >> _SHARE_BITS)


@triton.jit
def find_edge(
    row,
    peak,
    sampling_ptr,
    logits_ptr,
    bins_ptr,
    chains_ptr,
    notes_ptr,
    VOCAB: tl.constexpr,
    SLICE: tl.constexpr,
    SLICES: tl.constexpr,
    SP: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """The least key, int32, that a row's top-k and top-p keep; any key if a logit is NaN.

    peak: the row's largest scaled logit. SP: SLICES as a power of two.
    """
    temperature = field(sampling_ptr, row, TEMPERATURE).to(tl.float32, bitcast=True)
    top_k, share = field(sampling_ptr, row, TOP_K), field(sampling_ptr, row, TOP_P)
    is_ranked = (top_k > 0) & (top_k < VOCAB)
    b_B = tl.arange(0, BINS)
    own_bins_ptr, own_chains_ptr = bins_ptr + row * (2 * BINS), chains_ptr + row * (SLICES * (BINS + SLICE))
    last, count = top_k * 0 + BINS, top_k * 0
    edge = (top_k * 0 + _LEAST_KEY).to(tl.int64)
    for cut in range(2):
        is_top_p = cut == 1
        if tl.where(is_top_p, share > 0, is_ranked):
            weight_B = tl.load(own_bins_ptr + tl.where(is_top_p, 0, BINS) + b_B)
            needed = top_k.to(tl.int64)
            if is_top_p:
                # What top-k keeps; it may keep only part of the last bin.
                total = tl.sum(tl.where(b_B < last, weight_B, 0), axis=0)
                total += _amount_from(notes_ptr, count, edge, is_top_p, VOCAB, C)
                needed = share_of(total, share)
            last = tl.minimum(tl.sum((tl.cumsum(weight_B, axis=0) < needed).to(tl.int32), axis=0), BINS - 1)
            needed -= tl.sum(tl.where(b_B < last, weight_B, 0), axis=0)
            # Earlier notes may still be read.
            tl.debug_barrier()
            count, low, high = _note(
                row, last, peak, temperature, logits_ptr, own_chains_ptr, notes_ptr, VOCAB, SLICE, SLICES, SP, R
            )  # fmt: skip
            tl.debug_barrier()
            while low < high:
                middle = (low + high + 1) >> 1
                is_enough = _amount_from(notes_ptr, count, middle, is_top_p, VOCAB, C) >= needed
                low = tl.where(is_enough, middle, low)
                high = tl.where(is_enough, high, middle - 1)
            edge = low
    return edge.to(tl.int32)


@triton.jit
def _note(
    row, number, peak, temperature, logits_ptr, chains_ptr, notes_ptr, VOCAB: tl.constexpr, SLICE: tl.constexpr,
    SLICES: tl.constexpr, SP: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Stores keys and masses of one bin's tokens; returns their number, least and largest key, int64."""
    s_S = tl.arange(0, SP)
    chain_ptr_S = chains_ptr + s_S * (BINS + SLICE)
    i_S = tl.load(chain_ptr_S + number, mask=s_S < SLICES, other=-1)
    low_S, high_S = tl.full((SP,), _LARGEST_KEY, tl.int32), tl.full((SP,), _LEAST_KEY, tl.int32)
    count = number * 0
    while tl.max(i_S, axis=0) >= 0:
        is_token_S = i_S >= 0
        logit_ptr_S = logits_ptr + (s_S * SLICE + i_S).to(tl.int64) * R + row
        x_S = tl.math.div_rn(tl.load(logit_ptr_S, mask=is_token_S, other=0.0), temperature)
        i_S = tl.load(chain_ptr_S + BINS + i_S, mask=is_token_S, other=-1)
        key_S = key_of(x_S)
        note_ptr_S = notes_ptr + count + tl.cumsum(is_token_S.to(tl.int32), axis=0) - 1
        tl.store(note_ptr_S, key_S, mask=is_token_S)
        tl.store(note_ptr_S + VOCAB, mass_of(steps_below(x_S, peak)), mask=is_token_S)
        low_S = tl.where(is_token_S, tl.minimum(low_S, key_S), low_S)
        high_S = tl.where(is_token_S, tl.maximum(high_S, key_S), high_S)
        count += tl.sum(is_token_S.to(tl.int32), axis=0)
    return count, tl.min(low_S, axis=0).to(tl.int64), tl.max(high_S, axis=0).to(tl.int64)


@triton.jit
def _amount_from(notes_ptr, count, edge, is_mass, VOCAB: tl.constexpr, C: tl.constexpr):
    """Mass or number of noted tokens with keys at or above the edge; int64."""
    sum_C = tl.zeros((C,), tl.int64)
    for start in range(0, count, C):
        i_C = start + tl.arange(0, C)
        key_C = tl.load(notes_ptr + i_C, mask=i_C < count, other=0)
        is_in_C = (i_C < count) & (key_C >= edge)
        mass_C = tl.load(notes_ptr + VOCAB + i_C, mask=is_in_C & is_mass, other=1)
        sum_C += tl.where(is_in_C, mass_C, 0)
    return tl.sum(sum_C, axis=0)
