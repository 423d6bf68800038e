"""Gumbel noise with the Philox integers and uniform numbers of `runtime.rounds.sampling`.

Logarithms may differ from PyTorch's in the last bits. Legend: see the package.
"""

import triton
import triton.language as tl

from speedstack.runtime.backends.gpu.kernels.rows import POSITION, RECORD, SEED, SEQUENCE, field
from speedstack.runtime.rounds import sampling

_MOST_UNIFORM = tl.constexpr(sampling.MOST_UNIFORM)


@triton.jit
def row_words(block, row, rows_ptr, sampling_ptr):
    """Four uint32 words per block of four tokens, for the token after each row; block and row broadcast."""
    position = (field(rows_ptr, row, POSITION) + 1).to(tl.uint32)  # of the chosen token
    at = sampling_ptr + row * RECORD
    return uniform_words(
        block, position, _word(at + SEQUENCE), _word(at + SEQUENCE + 1), _word(at + SEED), _word(at + SEED + 1)
    )


@triton.jit
def uniform_words(block, position, sequence_low, sequence_high, seed_low, seed_high):
    """Four uint32 words per block of four tokens: Philox4x32-10 of (block, position, sequence), keyed by the seed."""
    c0 = block.to(tl.uint32)
    zero = c0 * 0
    c1, c2, c3 = zero + position, zero + sequence_low, zero + sequence_high
    return tl.philox_impl(c0, c1, c2, c3, zero + seed_low, zero + seed_high)


@triton.jit
def gumbel(word):
    """Standard Gumbel noise of a uint32 word, as `sampling.gumbel`.

    -log(1 - v) is v * log(u) / (u - 1) with u the float32 nearest 1 - v; the rounding of u cancels (Goldberg, "What
    every computer scientist should know about floating-point arithmetic", 1991, theorem 4).
    """
    v = tl.minimum((word.to(tl.float32) + 0.5) * (2.0**-32), _MOST_UNIFORM)
    u = 1.0 - v
    exponential = tl.where(u == 1.0, v, v * (tl.log(u) / tl.where(u == 1.0, -1.0, u - 1.0)))
    return -tl.log(exponential)


@triton.jit
def _word(ptr):
    return tl.load(ptr).to(tl.uint32, bitcast=True)
