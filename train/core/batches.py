"""Packed windows of a tokenized corpus, in an order that is a function of (seed, example number).

Documents, each closed by a separator, are concatenated and cut into windows of a fixed length, without padding.
Example i belongs to epoch i // windows; (seed, epoch) determines the order and the cut. There is no iterator, so a
checkpoint saves nothing for it and any process can read any example. Attention across a separator is not masked.

Shapes: B examples, T tokens of a window.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import datasets
import numpy as np
import torch


class PackedWindows:
    """Windows of `sequence_length` tokens over the integer column `input_ids`. Raises ValueError if none is full."""

    def __init__(self, documents: datasets.Dataset, sequence_length: int) -> None:
        column = documents.with_format("arrow")[:]["input_ids"] if len(documents) else None
        self.sequence_length = sequence_length
        self._tokens = (
            np.zeros(0, dtype=np.int32) if column is None else column.combine_chunks().flatten().to_numpy(False)
        )
        self._num_windows = len(self._tokens) // sequence_length
        if not self._num_windows:
            raise ValueError(
                f"the text has {len(self._tokens)} tokens, fewer than one window of {sequence_length}: lower "
                "sequence_length or give more text"
            )

    def __len__(self) -> int:
        """Windows in an epoch."""
        return self._num_windows

    @property
    def num_tokens(self) -> int:
        """Tokens of the split, separators included."""
        return len(self._tokens)

    def window(self, index: int) -> torch.Tensor:
        """The window at `index` in document order, for evaluation: int64 [T]."""
        start = index % self._num_windows * self.sequence_length
        return torch.from_numpy(self._tokens[start : start + self.sequence_length].astype(np.int64))

    def examples(self, seed: int, indices: Iterable[int]) -> torch.Tensor:
        """Training examples by number in the endless stream of `seed`: int64 [B, T]."""
        starts = []
        for index in indices:
            epoch, place = divmod(int(index), self._num_windows)
            order, offset = _epoch_order(seed, epoch, self._num_windows, self.sequence_length)
            starts.append(int(order[place]) * self.sequence_length + offset)
        # Every epoch shifts the cut, so the last windows wrap round to the beginning.
        positions_BT = (np.asarray(starts)[:, None] + np.arange(self.sequence_length)) % len(self._tokens)
        return torch.from_numpy(self._tokens[positions_BT].astype(np.int64))


def generator(*keys: int) -> torch.Generator:
    """A CPU random generator that is a pure function of `keys`, e.g. (seed, example number)."""
    state = np.random.SeedSequence(keys).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, num_windows: int, sequence_length: int) -> tuple[np.ndarray, int]:
    """Permutation of one epoch's windows, and the offset of its first cut."""
    rng = np.random.default_rng([seed, epoch])
    return rng.permutation(num_windows), int(rng.integers(sequence_length))
