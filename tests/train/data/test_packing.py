"""Conversations in windows: every token once, in one window, labelled where the target wrote."""

import random

import pytest
import torch

from speedstack.train.data.packing import PADDING, Sequences, WrittenText, best_fit


@pytest.mark.parametrize("seed", range(3))
def test_windows_hold_everything_once_and_no_more_than_fits(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 40) for _ in range(200)]
    windows = best_fit(lengths, 64)
    assert sorted(member for members in windows for member in members) == list(range(200))
    used = [sum(lengths[member] for member in members) for members in windows]
    assert max(used) <= 64
    assert len(windows) <= 1.1 * sum(lengths) / 64 + 1
    assert windows == best_fit(lengths, 64)


def test_documents_and_labels_of_a_packed_window():
    sequences = Sequences([torch.tensor([1, 2, 3]), torch.arange(10, 19), torch.tensor([4, 5])], [1, 4, 1])
    text = WrittenText.packed(sequences, 6)
    assert text.ids_NT.tolist() == [[10, 11, 12, 13, 14, 15], [1, 2, 3, 4, 5, 0]]  # the long one is cut
    assert text.documents_NT.tolist() == [[0] * 6, [0, 0, 0, 1, 1, PADDING]]
    assert text.predictable_NT.int().tolist() == [[0, 0, 0, 0, 1, 1], [0, 1, 1, 0, 1, 0]]
