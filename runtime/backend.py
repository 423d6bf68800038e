"""What an engine asks of the code that computes: steps of the target, and proposals of the drafter.

A backend owns weights on its device and the static key/value buffers of `num_slots` sequences. It keeps no notion of
length: a row names its slot and position, writes its keys and values there and attends to what lies before it, so that
rejected drafts need no clean-up; they are overwritten before anything reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

# Rows of one sequence that a step may hold: rings of sliding-window layers have this much slack, so that a chunk of a
# prompt, or drafts that are later rejected, never overwrite what an earlier row of the same step still attends to.
MAX_ROWS = 64
POSITIONS_PER_BLOCK = 16


def ring_length(window: int | None, max_length: int) -> int:
    """Positions that a layer's buffer holds: whole blocks, `max_length` or enough for the window and one step."""
    length = max_length if window is None else min(max_length, window + MAX_ROWS)
    return -(-length // POSITIONS_PER_BLOCK) * POSITIONS_PER_BLOCK


@dataclass(frozen=True)
class Rows:
    """Tokens to compute in one step. Rows of a sequence are in ascending, gapless order of position."""

    tokens: Sequence[int]
    slots: Sequence[int]
    positions: Sequence[int]


@dataclass(frozen=True)
class Draft:
    """Proposals for the positions after an anchor, and the drafter's own probability of each."""

    tokens: list[int]
    probabilities: list[float]


class Backend(Protocol):
    """One way of computing a step. All return values may be overwritten by the next call."""

    name: str
    prepare_seconds: float

    def step(self, rows: Rows, logit_rows: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
        """Computes all rows, and the logits of those named in `logit_rows`, which ascend.

        Returns float32 logits [len(logit_rows), vocabulary] and the index of the largest logit in each, ties to the
        lower index; -1 where a logit is not a number. With a drafter its context is written for all rows too.
        """
        ...

    def draft(
        self, anchors: Sequence[int], slots: Sequence[int], positions: Sequence[int], num_drafts: int
    ) -> list[Draft]:
        """The first `num_drafts` proposals after each anchor token, from the context before the anchor's position.

        There are fewer where the drafter's logits are not numbers.

        Fewer than the drafter was trained for make a shorter block, which is cheaper and proposes nearly the same.
        """
        ...

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of weights as this backend holds them, by part of the model."""
        ...

    def cache_bytes(self) -> int:
        """Bytes of all key/value buffers."""
        ...
