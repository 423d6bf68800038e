"""Bins of a row's tokens by how far their logits lie below the largest: what top-k and top-p are first decided by.

A bin is an octave's `1 << BIN_BITS`-th part, counted as masses are (`runtime.rounds.sampling`): equal logits share
one, and a larger logit is never in a later one. So the last bin that top-k or top-p keeps anything of follows from how
many tokens, or how much mass, each bin has; both are integers, and any number of programs may add them up in any order.
Only that bin's tokens have to be told apart.
"""

import torch

from speedstack.runtime.rounds.sampling import OCTAVE_BITS, steps_below

BIN_BITS = 5
# What lies further below the peak than all of these has no mass; it is in the last one.
NUM_BINS = 32 << BIN_BITS


def bins_of(scaled_V: torch.Tensor, peak: torch.Tensor) -> torch.Tensor:
    """Int64 [V]: the bin of each logit; `peak` is the largest of all, and none is NaN."""
    return (steps_below(scaled_V, peak) >> (OCTAVE_BITS - BIN_BITS)).clamp(max=NUM_BINS - 1)
