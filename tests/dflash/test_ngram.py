"""Prompt lookup against a search of the whole text."""

import random

import pytest

from speedstack.dflash.ngram import NgramIndex


def searched(tokens: list[int], max_size: int, count: int) -> list[int]:
    """The definition: the longest suffix that occurred before, its latest occurrence, what followed, copied round."""
    for size in range(min(max_size, len(tokens) - 1), 0, -1):
        for start in range(len(tokens) - size - 1, -1, -1):
            if tokens[start : start + size] == tokens[-size:]:
                text = list(tokens)
                for i in range(count):
                    text.append(text[start + size + i])
                return text[len(tokens) :]
    return []


@pytest.mark.parametrize("max_size", [1, 2, 4])
def test_a_growing_index_finds_what_a_search_finds(max_size: int) -> None:
    generator = random.Random(max_size)
    for _ in range(20):
        tokens = [generator.randrange(5) for _ in range(generator.randrange(1, 12))]
        index = NgramIndex(max_size)
        for _ in range(15):
            assert index.propose(tokens, 6) == searched(tokens, max_size, 6)
            tokens += [generator.randrange(5) for _ in range(generator.randrange(1, 4))]


def test_a_period_is_continued() -> None:
    assert NgramIndex(2).propose([9, 1, 2, 3, 1, 2, 3], 7) == [1, 2, 3, 1, 2, 3, 1]


def test_nothing_to_find() -> None:
    assert NgramIndex(3).propose([1], 4) == [] == NgramIndex(3).propose([1, 2, 3], 4)
    with pytest.raises(ValueError, match="at least 1"):
        NgramIndex(0)
