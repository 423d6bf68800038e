"""The nearest known names to a mistyped one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# difflib's default. Names that share only a prefix, such as those of GPUs, need a lower one.
CUTOFF = 0.6


def nearest(name: str, known: Iterable[str], num_names: int = 1, cutoff: float = CUTOFF) -> list[str]:
    """At most `num_names` of `known`, the most similar first, with a similarity (0 to 1) of at least `cutoff`."""
    return difflib.get_close_matches(name, list(known), n=num_names, cutoff=cutoff)


def did_you_mean(name: str, known: Iterable[str], cutoff: float = CUTOFF) -> str:
    """An addition to a message about an unknown name: "; did you mean 'x'?", or nothing."""
    return "".join(f"; did you mean '{near}'?" for near in nearest(name, known, cutoff=cutoff))
