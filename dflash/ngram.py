"""Prompt lookup: proposes what followed an earlier occurrence of the text's last tokens. Needs no drafter.

It looks up the longest run of last tokens, at most `max_size`, that occurred before. On repetitive code this alone
saves steps, so a drafter must beat it.

Source: prompt-lookup decoding (A. Saxena, 2023), as in transformers and vLLM, which take the earliest occurrence; this
takes the latest, nearest to the current text.
"""

from __future__ import annotations

from collections.abc import Sequence


class NgramIndex:
    """The latest position after every short run of tokens, for one growing sequence."""

    def __init__(self, max_size: int) -> None:
        """`max_size`: longest run to look up. Raises ValueError below 1."""
        if max_size < 1:
            raise ValueError(f"an n-gram needs a size of at least 1, got {max_size}")
        self._max_size = max_size
        self._follower: dict[tuple[int, ...], int] = {}
        self._num_indexed = 1

    def propose(self, tokens: Sequence[int], count: int) -> list[int]:
        """Up to `count` tokens to follow `tokens`, which must extend the tokens of earlier calls.

        A match that reaches the end of the text repeats: periodic text continues with its period.
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
