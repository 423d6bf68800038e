"""Acceptance of a drafter on text that is there already: what greedy decoding would commit, without decoding.

Greedy text does not depend on the drafter. So the leading runs of right proposals at all anchors of a text that the
target wrote greedily give the very rounds that decoding would make, up to the dtype of the features.

Shape suffixes: N sequences, T positions, B sequences at once, A anchors, J proposals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from speedstack.dflash.accept import leading_run, walk_rounds
from speedstack.dflash.loss import BlockLoss
from speedstack.train.drafter_windows import Windows
from speedstack.train.packing import Sequences

_SEQUENCES_AT_ONCE = 4
_ANCHORS_AT_ONCE = 256


@dataclass(frozen=True)
class GreedyText:
    """Sequences that the target wrote greedily: padded tokens int64 [N, T], and where each's prompt and text end."""

    ids_NT: Tensor
    prompt_lengths: Sequence[int]
    lengths: Sequence[int]

    @classmethod
    def of_windows(cls, ids_NT: Tensor, prompt_length: int) -> GreedyText:
        """Equally long prompts and windows without padding."""
        return cls(ids_NT, [prompt_length] * len(ids_NT), [ids_NT.shape[1]] * len(ids_NT))

    @classmethod
    def of_sequences(cls, sequences: Sequences) -> GreedyText:
        """Prompts and answers of any lengths."""
        ids_NT = torch.nn.utils.rnn.pad_sequence(list(sequences.ids), batch_first=True)
        return cls(ids_NT, list(sequences.prompt_lengths), [len(ids) for ids in sequences.ids])

    def prompts(self, num_prompts: int) -> list[list[int]]:
        """The first `num_prompts` prompts."""
        pairs = zip(self.ids_NT[:num_prompts].tolist(), self.prompt_lengths, strict=False)
        return [ids[:length] for ids, length in pairs]


@dataclass(frozen=True)
class Simulated:
    """Acceptance of each held-out sequence, walked over its text: tokens committed in each round, and the mean loss."""

    rounds: list[list[int]]
    loss: float

    def acceptance_length(self, num_sequences: int | None = None) -> float:
        """Tokens a round over the first `num_sequences`, None for all."""
        pooled = [tokens for rounds in self.rounds[:num_sequences] for tokens in rounds]
        return sum(pooled) / len(pooled)

    def survival(self, num_proposals: int) -> list[float]:
        """Share of rounds in which proposals 1 .. j were all accepted, for j = 1 .. num_proposals."""
        pooled = [tokens for rounds in self.rounds for tokens in rounds]
        return [sum(tokens > j + 1 for tokens in pooled) / len(pooled) for j in range(num_proposals)]


@torch.no_grad()
def simulate(
    text: GreedyText, num_proposals: int, blocks_loss: Callable[[Windows], tuple[BlockLoss, Tensor]]
) -> Simulated:
    """The rounds of greedy decoding on `text`, and the loss at all anchors.

    `blocks_loss(windows)` is a recipe's loss of all blocks of `windows`, and which of their proposals count. Rounds
    that the end of a sequence would cut short are left out. Raises ValueError where that leaves none.
    """
    if not any(end - num_proposals > start for start, end in zip(text.prompt_lengths, text.lengths, strict=True)):
        raise ValueError(f"no held-out answer is longer than {num_proposals} tokens, a block: use other prompts")
    first = min(text.prompt_lengths)
    anchors = torch.arange(first, text.ids_NT.shape[1] - num_proposals)
    starts_N1 = torch.tensor(text.prompt_lengths)[:, None]
    ends_N1 = torch.tensor(text.lengths)[:, None] - num_proposals
    total_loss, total_weight, runs = 0.0, 0, []
    for rows in torch.arange(len(text.ids_NT)).split(_SEQUENCES_AT_ONCE):
        ids_BT = text.ids_NT[rows]
        everything = torch.ones_like(ids_BT, dtype=torch.bool)
        parts = []
        for part in anchors.split(_ANCHORS_AT_ONCE):
            anchors_BA = part.expand(len(ids_BT), -1)
            real_BA = (anchors_BA >= starts_N1[rows]) & (anchors_BA < ends_N1[rows])
            result, _ = blocks_loss(Windows(ids_BT, torch.zeros_like(ids_BT), everything, anchors_BA, real_BA))
            total_loss += float(result.loss) * int(real_BA.sum())
            total_weight += int(real_BA.sum())
            parts.append(leading_run(result.correct_AJ).view(len(ids_BT), -1))
        runs += torch.cat(parts, dim=1).tolist()
    rounds = [
        walk_rounds(run[prompt_length - first : length - num_proposals - first])
        for run, prompt_length, length in zip(runs, text.prompt_lengths, text.lengths, strict=True)
    ]
    return Simulated(rounds, total_loss / total_weight)
