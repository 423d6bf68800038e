"""What a mistyped name may have been meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# difflib's own. Names that share little but their beginning, such as those of GPUs, want a lower one.
CUTOFF = 0.6


def nearest(name: str, known: Iterable[str], num_names: int = 1, cutoff: float = CUTOFF) -> list[str]:
    """At most `num_names` of `known`, the most similar first, of a similarity (0 to 1) of at least `cutoff`."""
    return difflib.get_close_matches(name, list(known), n=num_names, cutoff=cutoff)


def did_you_mean(name: str, known: Iterable[str], cutoff: float = CUTOFF) -> str:
    """What to add to a message about an unknown name: "; did you mean 'x'?", or nothing where no name is near."""
    return "".join(f"; did you mean '{near}'?" for near in nearest(name, known, cutoff=cutoff))
