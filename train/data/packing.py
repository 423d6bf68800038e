"""Conversations as training windows: several short ones in one window, each a document of its own.

Best fit, longest first. The packing is a function of the lengths alone and the same in every epoch, so a window's
features can be kept. Padding at a window's end belongs to no document: nothing sees or predicts it.

Shapes: N windows or sequences, T tokens of a window.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PADDING = -1  # document number of padding


@dataclass(frozen=True)
class Sequences:
    """Prompts with the target's answers: one int64 tensor of ids a sequence, and its number of prompt tokens."""

    ids: Sequence[Tensor]
    prompt_lengths: Sequence[int]


@dataclass(frozen=True)
class WrittenText:
    """Windows of the target's text: tokens and documents int64 [N, T], and bool [N, T] where the target wrote."""

    ids_NT: Tensor
    documents_NT: Tensor
    predictable_NT: Tensor

    def __len__(self) -> int:
        return len(self.ids_NT)

    @classmethod
    def of_continuations(cls, sequences: Sequences, length: int) -> WrittenText:
        """One document a window, end-of-text or not, as in serving; every sequence fills a window."""
        ids_NT = torch.stack(list(sequences.ids))
        assert ids_NT.shape[1] == length, f"continuations of {ids_NT.shape[1]} tokens for windows of {length}"
        prompt_lengths_N1 = torch.tensor(sequences.prompt_lengths)[:, None]
        return cls(ids_NT, torch.zeros_like(ids_NT), torch.arange(ids_NT.shape[1]) >= prompt_lengths_N1)

    @classmethod
    def packed(cls, sequences: Sequences, length: int) -> WrittenText:
        """Windows of `length` tokens; longer sequences are cut."""
        lengths = [min(len(ids), length) for ids in sequences.ids]
        windows = best_fit(lengths, length)
        ids_NT = torch.zeros(len(windows), length, dtype=torch.int64)
        documents_NT = torch.full_like(ids_NT, PADDING)
        predictable_NT = torch.zeros_like(ids_NT, dtype=torch.bool)
        for row, members in enumerate(windows):
            start = 0
            for document, member in enumerate(members):
                end = start + lengths[member]
                ids_NT[row, start:end] = sequences.ids[member][: lengths[member]]
                documents_NT[row, start:end] = document
                predictable_NT[row, start + sequences.prompt_lengths[member] : end] = True
                start = end
        return cls(ids_NT, documents_NT, predictable_NT)


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Members of each window, at most `capacity` in total; no length may exceed it."""
    assert all(0 < length <= capacity for length in lengths), "a sequence is empty or longer than a window"
    windows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, window), ascending
    for member in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect.bisect_left(room, (lengths[member], -1))
        if place < len(room):
            free, window = room.pop(place)
        else:
            free, window = capacity, len(windows)
            windows.append([])
        windows[window].append(member)
        bisect.insort(room, (free - lengths[member], window))
    return windows
