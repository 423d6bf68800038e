"""Prompt lookup: proposals copied from where the text has said the same before. A baseline that needs no drafter.

The longest run of last tokens, up to `max_size` of them, that occurred earlier is looked up, and what followed it then
is proposed. Code repeats itself, so this alone saves steps; a drafter that saves fewer is not worth its weights.

Source: prompt-lookup decoding (A. Saxena, 2023), as in transformers and vLLM. Both take the earliest occurrence; this
takes the latest, which is nearest to what is being written.
"""

from __future__ import annotations

from collections.abc import Sequence


class NgramIndex:
    """Where every short run of tokens was last followed by something, for one growing sequence."""

    def __init__(self, max_size: int) -> None:
        """`max_size`: longest run that is looked up; raises ValueError below 1."""
        if max_size < 1:
            raise ValueError(f"an n-gram needs a size of at least 1, got {max_size}")
        self._max_size = max_size
        self._follower: dict[tuple[int, ...], int] = {}
        self._num_indexed = 1

    def propose(self, tokens: Sequence[int], count: int) -> list[int]:
        """Up to `count` tokens to follow `tokens`, which must begin with what was given before.

        A match that reaches the end of the text is copied round: a text that repeats with some period is continued
        with that period.
        """
        for at in range(self._num_indexed, len(tokens)):
            for size in range(1, min(self._max_size, at) + 1):
                self._follower[tuple(tokens[at - size : at])] = at
        self._num_indexed = max(self._num_indexed, len(tokens))
        for size in range(min(self._max_size, len(tokens) - 1), 0, -1):
            start = self._follower.get(tuple(tokens[-size:]))
            if start is not None:
                period = len(tokens) - start
                return [tokens[start + i % period] for i in range(count)]
        return []
