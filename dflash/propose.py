"""Proposals from a drafted block's hidden states.

Without a Markov head all positions are independent; with one, each depends on the previous token, so tokens are drafted
left to right. Proposals are a chain of most probable tokens. `adjust` makes it sampling: it applies the target's
temperature, filters and noise to the drafter's logits.

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
    """A chain of proposals after an anchor.

    `probabilities[i]`: the drafter's probability of token i given the earlier ones; empty without a drafter.
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
    """The most probable token of each slot, left to right; shorter if logits are NaN.

    `head`: the target's LM head [V, D] or `model.draft_head` of it; `anchor`: the token before the first proposal;
    `adjust`: applied to logits before the argmax and softmax.
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
