"""Histogram of a row's logits by their distance below the largest, the first stage of top-k and top-p.

A bin is 1 / 2**BIN_BITS of an octave, counted as masses are (`rounds/sampling.py`). Counts and masses per bin are
integers, so any number of programs may add them in any order, and they determine the last bin that top-k or top-p
keeps. Only that bin's tokens need sorting out.
"""

import torch

from speedstack.runtime.rounds.sampling import OCTAVE_BITS, steps_below

BIN_BITS = 5
# Logits below all of these have no mass; they go into the last bin.
NUM_BINS = 32 << BIN_BITS


def bins_of(scaled_V: torch.Tensor, peak: torch.Tensor) -> torch.Tensor:
    """Int64 [V]: the bin of each logit. `peak`: the largest logit; none may be NaN."""
    return (steps_below(scaled_V, peak) >> (OCTAVE_BITS - BIN_BITS)).clamp(max=NUM_BINS - 1)
