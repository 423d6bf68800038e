"""Histogram of logits for rows with top-k or top-p: mass, count and tokens of each bin (`rounds/histogram.py`).

All programs take part, each with a slice of a row's tokens; `topk_topp.py` then finds in one program what the row
keeps. Only integers are added, so any order gives the same sums. A slice's tokens in one bin form a chain, whose order
does not matter.

Left out: skipping the phase's wait in steps without such rows, which pay one more synchronization.

Legend: see the package; C tokens at a time. Per row, bins are int64 [2, BINS]: masses, and numbers of tokens. Per row
and slice, chains are int32: the first token of each bin (BINS), then each token's successor; tokens count from the
slice's first, and -1 ends a chain.
"""

import triton
import triton.language as tl

from speedstack.runtime.backends.gpu.kernels.rows import TEMPERATURE, TOP_K, TOP_P, field, has_topk_or_topp
from speedstack.runtime.rounds import histogram, sampling

BINS = tl.constexpr(histogram.NUM_BINS)
_BIN_SHIFT = tl.constexpr(sampling.OCTAVE_BITS - histogram.BIN_BITS)
_OCTAVE_BITS = tl.constexpr(sampling.OCTAVE_BITS)
_FARTHEST = tl.constexpr(sampling.FARTHEST)
_STEPS_A_NAT = tl.constexpr(sampling.STEPS_A_NAT)
_WHOLE_MASS = tl.constexpr(sampling.WHOLE_MASS)
_MASS_COEFFICIENTS = tl.constexpr(sampling.MASS_COEFFICIENTS)
_DEGREE = tl.constexpr(len(sampling.MASS_COEFFICIENTS))


@triton.jit
def steps_below(x, peak):
    """`sampling.steps_below` as int32; 0 for NaN."""
    below = tl.where((x == peak) | (x != x), 0.0, tl.minimum(peak - x, _FARTHEST))
    return (below * _STEPS_A_NAT).to(tl.int32)


@triton.jit
def bin_of(steps):
    """`histogram.bins_of`."""
    return tl.minimum(steps >> _BIN_SHIFT, BINS - 1)


@triton.jit
def mass_of(steps):
    """`sampling.masses` as int32."""
    # As a fraction of 2**32, so that the upper half of a product is the definition's shifted value.
    fraction = steps.to(tl.uint32) << (32 - _OCTAVE_BITS)
    zero = fraction * 0
    mass = zero + _MASS_COEFFICIENTS[_DEGREE - 1]
    for n in tl.static_range(_DEGREE - 1):
        mass = (zero + _MASS_COEFFICIENTS[_DEGREE - 2 - n]) - tl.umulhi(mass, fraction)
    mass = (zero + _WHOLE_MASS) - tl.umulhi(mass, fraction)
    return (mass >> tl.minimum(steps >> _OCTAVE_BITS, 31).to(tl.uint32)).to(tl.int32)


@triton.jit
def peak_of(row, peaks_ptr, temperature, TILES: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """A row's largest scaled logit, NaN ignored, from the tiles' largest; C tiles at a time."""
    largest_C = tl.full((C,), float("-inf"), tl.float32)
    for start in range(0, TILES, C):
        tile_C = start + tl.arange(0, C)
        largest_C = tl.maximum(
            largest_C, tl.load(peaks_ptr + tile_C * R + row, mask=tile_C < TILES, other=float("-inf"))
        )
    return tl.math.div_rn(tl.max(largest_C, axis=0), temperature)


@triton.jit
def empty_bins(row, bins_ptr):
    """Clears a row's bins."""
    b_B = tl.arange(0, 2 * BINS)
    tl.store(bins_ptr + row * (2 * BINS) + b_B, tl.zeros((2 * BINS,), tl.int64))


@triton.jit
def histogram_item(
    row,
    number,
    rows_ptr,
    sampling_ptr,
    logits_ptr,
    peaks_ptr,
    bins_ptr,
    chains_ptr,
    VOCAB: tl.constexpr,
    TILES: tl.constexpr,
    SLICE: tl.constexpr,
    SLICES: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Adds slice `number` (of SLICES slices of SLICE tokens) to its row's bins and chains.

    Skips rows that keep all tokens. NaN logits are in no bin.
    """
    if has_topk_or_topp(rows_ptr, sampling_ptr, row, VOCAB):
        temperature = field(sampling_ptr, row, TEMPERATURE).to(tl.float32, bitcast=True)
        top_k, share = field(sampling_ptr, row, TOP_K), field(sampling_ptr, row, TOP_P)
        chain_ptr, first = chains_ptr + (row * SLICES + number) * (BINS + SLICE), number * SLICE
        tl.store(chain_ptr + tl.arange(0, BINS), tl.full((BINS,), -1, tl.int32))
        peak = peak_of(row, peaks_ptr, temperature, TILES, R, C)
        # All chains must be empty before any begins.
        tl.debug_barrier()
        num_tokens = tl.minimum(VOCAB - first, SLICE)
        for start in range(0, num_tokens, C):
            i_C = start + tl.arange(0, C)
            logit_ptr_C = logits_ptr + (first + i_C).to(tl.int64) * R + row
            x_C = tl.math.div_rn(tl.load(logit_ptr_C, mask=i_C < num_tokens, other=float("nan")), temperature)
            is_number_C = x_C == x_C
            steps_C = steps_below(x_C, peak)
            bin_C = bin_of(steps_C)
            bin_ptr_C = bins_ptr + row * (2 * BINS) + bin_C
            if share > 0:
                tl.atomic_add(bin_ptr_C, mass_of(steps_C).to(tl.int64), mask=is_number_C, sem="relaxed")
            if top_k > 0:
                tl.atomic_add(bin_ptr_C + BINS, tl.full((C,), 1, tl.int64), mask=is_number_C, sem="relaxed")
            following_C = tl.atomic_xchg(chain_ptr + bin_C, i_C, mask=is_number_C, sem="relaxed")
            tl.store(chain_ptr + BINS + i_C, following_C, mask=is_number_C)
