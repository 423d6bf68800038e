"""From a drafted block's hidden states to proposals: the serving side of the drafter's logits.

A drafter without a Markov head gives each position's distribution at once; with one, a position's depends on the token
before it, so that tokens are drafted left to right. Either way the proposals are a chain of most probable tokens.

`adjust` is where sampling comes in: proposals for a target that samples are drawn from the drafter's distribution as
the target will sample from its own, with the same noise.

Legend: K proposal slots, D hidden, U draft vocabulary, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from speedstack.dflash.model import DFlashDraftModel

# (float32 logits [U], proposal slot) -> scores [U]
Adjust = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Draft:
    """Proposals after an anchor, each of which follows the one before it.

    `probabilities[i]` is the drafter's own belief in token i, given that all before it are right; empty where a
    proposer has none.
    """

    tokens: list[int]
    probabilities: list[float] = field(default_factory=list)

    def leading(self, count: int) -> Draft:
        """The first `count` proposals."""
        return Draft(self.tokens[:count], self.probabilities[:count])


@torch.no_grad()
def propose(
    model: DFlashDraftModel, hidden_KD: Tensor, head: Tensor, anchor: int, adjust: Adjust | None = None
) -> Draft:
    """The most probable token of each slot, drafted left to right; fewer where logits are NaN.

    `head`: the target's LM head [V, D], or `model.draft_head` of it; `anchor`: the token before the first proposal;
    `adjust`: what softmax is taken of.
    """
    tokens: list[int] = []
    probabilities: list[float] = []
    for slot, base_logits_U in enumerate(model.base_logits(hidden_KD, head)):
        previous = torch.tensor(tokens[-1] if tokens else anchor, device=base_logits_U.device)
        logits_U = model.corrected(base_logits_U, previous)
        if bool(torch.isnan(logits_U).any()):
            break
        log_probabilities_U = torch.log_softmax(logits_U if adjust is None else adjust(logits_U, slot), dim=-1)
        best = log_probabilities_U.argmax()
        tokens.append(int(model.target_ids(best)))
        probabilities.append(float(log_probabilities_U[best].exp()))
    return Draft(tokens, probabilities)
