"""From a drafted block's hidden states to what it says about every position: the serving side of the drafter's logits.

A drafter without a Markov head gives each position's distribution at once; with one, a position's depends on the token
before it, so that tokens are drafted left to right. `tree.py` turns either into a chain or a tree.

`adjust` is where sampling comes in: proposals for a target that samples are drawn from the drafter's distribution as
the target will sample from its own, with the same noise.

Legend: K proposal slots, D hidden, U draft vocabulary, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from speedstack.dflash.model import DFlashDraftModel

# (float32 logits [U], proposal slot) -> scores [U]
Adjust = Callable[[Tensor, int], Tensor]


class BlockScores:
    """One drafted block's distributions, computed when they are asked for, once each."""

    def __init__(self, model: DFlashDraftModel, hidden_KD: Tensor, head: Tensor, adjust: Adjust | None = None) -> None:
        """`head`: the target's LM head, or `model.draft_head` of it; `adjust`: what softmax is taken of."""
        self._model, self._adjust = model, adjust
        self._logits_KU = model.base_logits(hidden_KD, head)
        self._known: dict[tuple[int, int], Tensor | None] = {}

    def log_probabilities(self, depth: int, previous: int) -> Tensor | None:
        """See `Scores`."""
        # Without a Markov head the token before changes nothing.
        key = depth, previous if self._model.markov_head is not None else -1
        if key not in self._known:
            self._known[key] = self._compute(depth, previous)
        return self._known[key]

    def tokens(self, draft_ids: Sequence[int]) -> list[int]:
        """See `Scores`."""
        if self._model.d2t is None:
            return list(draft_ids)
        return self._model.target_ids(torch.tensor(draft_ids, device=self._model.d2t.device)).tolist()

    def _compute(self, depth: int, previous: int) -> Tensor | None:
        previous_id = torch.tensor(previous, device=self._logits_KU.device)
        logits_U = self._model.corrected(self._logits_KU[depth], previous_id)
        if bool(torch.isnan(logits_U).any()):
            return None
        return torch.log_softmax(logits_U if self._adjust is None else self._adjust(logits_U, depth), dim=-1)
