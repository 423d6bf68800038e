"""Of rows that top-k or top-p cuts: how much mass and how many tokens each bin has, and which tokens those are.

All programs take part, each with a slice of a row's tokens; `cut` then finds in one program what the row keeps. Bins
are those of `runtime.rounds.histogram`. What is added to them is integers, so that the sums are the same in whatever
order; the tokens of a slice that share a bin are a chain, whose order has no bearing on anything.

Left out: going without the phase's wait in steps that have no such row. They pay one more synchronization of programs.

See the package for the legend; C tokens at a time. Per row, bins are int64 [2, BINS]: masses, and numbers of tokens.
Per row and slice of so many tokens, chains are int32: the first token of each bin, BINS of them, then what comes after
each of the slice's tokens; tokens are counted from the slice's first, and -1 ends a chain.
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
    """`sampling.steps_below`, as int32; 0 for what is no number."""
    below = tl.where((x == peak) | (x != x), 0.0, tl.minimum(peak - x, _FARTHEST))
    return (below * _STEPS_A_NAT).to(tl.int32)


@triton.jit
def bin_of(steps):
    """`bins.bins_of`."""
    return tl.minimum(steps >> _BIN_SHIFT, BINS - 1)


@triton.jit
def mass_of(steps):
    """`sampling.masses`, as int32."""
    # As a part of 2**32, so that the upper half of a product is what the definition shifts down.
    fraction = steps.to(tl.uint32) << (32 - _OCTAVE_BITS)
    zero = fraction * 0
    mass = zero + _MASS_COEFFICIENTS[_DEGREE - 1]
    for n in tl.static_range(_DEGREE - 1):
        mass = (zero + _MASS_COEFFICIENTS[_DEGREE - 2 - n]) - tl.umulhi(mass, fraction)
    mass = (zero + _WHOLE_MASS) - tl.umulhi(mass, fraction)
    return (mass >> tl.minimum(steps >> _OCTAVE_BITS, 31).to(tl.uint32)).to(tl.int32)


@triton.jit
def peak_of(row, peaks_ptr, temperature, TILES: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """The largest scaled logit of a row that is a number, out of the largest of each tile; C tiles at a time."""
    largest_C = tl.full((C,), float("-inf"), tl.float32)
    for start in range(0, TILES, C):
        tile_C = start + tl.arange(0, C)
        largest_C = tl.maximum(
            largest_C, tl.load(peaks_ptr + tile_C * R + row, mask=tile_C < TILES, other=float("-inf"))
        )
    return tl.math.div_rn(tl.max(largest_C, axis=0), temperature)


@triton.jit
def empty_bins(row, bins_ptr):
    """Makes a row's bins ready for this step's sums."""
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
    """Adds a slice of SLICE tokens, that of this number of SLICES, to its row's bins, and chains them.

    Nothing for a row that keeps all its tokens. A logit that is NaN is in no bin.
    """
    if has_topk_or_topp(rows_ptr, sampling_ptr, row, VOCAB):
        temperature = field(sampling_ptr, row, TEMPERATURE).to(tl.float32, bitcast=True)
        top_k, share = field(sampling_ptr, row, TOP_K), field(sampling_ptr, row, TOP_P)
        chain_ptr, first = chains_ptr + (row * SLICES + number) * (BINS + SLICE), number * SLICE
        tl.store(chain_ptr + tl.arange(0, BINS), tl.full((BINS,), -1, tl.int32))
        peak = peak_of(row, peaks_ptr, temperature, TILES, R, C)
        # All chains are empty before one of them begins.
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
