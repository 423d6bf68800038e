"""Acceptance of a drafter on text that is there already: what greedy decoding would commit, without decoding.

Greedy text does not depend on the drafter, so the leading runs of right proposals at all anchors of such text give the
rounds of decoding, up to the dtype of the features.

Shape suffixes: N sequences, T positions, B sequences at once, A anchors, J proposals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from speedstack.dflash.accept import leading_run, survival, walk_rounds
from speedstack.dflash.loss import BlockLoss
from speedstack.train.data.packing import Sequences
from speedstack.train.drafter.windows import Windows

_SEQUENCES_AT_ONCE = 4
_ANCHORS_AT_ONCE = 256


@dataclass(frozen=True)
class GreedyText:
    """Sequences the target wrote greedily: padded ids int64 [N, T], and where each prompt and text end."""

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

    def measurable(self) -> GreedyText:
        """Sequences whose answer has a second token; the first comes from the prefill and is never drafted."""
        kept = [
            row
            for row, (start, end) in enumerate(zip(self.prompt_lengths, self.lengths, strict=True))
            if end >= start + 2
        ]
        return GreedyText(
            self.ids_NT[kept], [self.prompt_lengths[row] for row in kept], [self.lengths[row] for row in kept]
        )

    def prompts(self, num_prompts: int) -> list[list[int]]:
        """The first `num_prompts` prompts."""
        pairs = zip(self.ids_NT[:num_prompts].tolist(), self.prompt_lengths, strict=False)
        return [ids[:length] for ids, length in pairs]


@dataclass(frozen=True)
class Simulated:
    """Simulated acceptance: tokens committed in each round of each held-out sequence, and the mean loss."""

    rounds: list[list[int]]
    loss: float

    def acceptance_length(self, num_sequences: int | None = None) -> float:
        """Tokens a round over the first `num_sequences`, or all. Raises ValueError without a round."""
        pooled = [tokens for rounds in self.rounds[:num_sequences] for tokens in rounds]
        if not pooled:
            raise ValueError(f"no held-out answer of the first {num_sequences} has 2 tokens: take more prompts")
        return sum(pooled) / len(pooled)

    def survival(self, num_proposals: int) -> list[float]:
        """See `speedstack.dflash.accept.survival`."""
        return survival(self.rounds, num_proposals)


@torch.no_grad()
def simulate(text: GreedyText, blocks_loss: Callable[[Windows], tuple[BlockLoss, Tensor]]) -> Simulated:
    """The rounds of greedy decoding on `text`, and the loss at all anchors.

    `blocks_loss(windows)` returns the loss of all blocks and which proposals count. Rounds are the engine's, including
    those cut by the end of a sequence. Raises ValueError if no answer has a second token.
    """
    starts_N1, ends_N1 = torch.tensor(text.prompt_lengths)[:, None], torch.tensor(text.lengths)[:, None]
    if not (ends_N1 >= starts_N1 + 2).any():
        raise ValueError("no held-out answer has 2 tokens or more, so that nothing is drafted: use other prompts")
    length, first = text.ids_NT.shape[1], min(text.prompt_lengths)
    is_text_NT = torch.arange(length) < ends_N1
    anchors_A = torch.arange(first, length - 1)
    is_real_NA = (anchors_A >= starts_N1) & (anchors_A < ends_N1 - 1)
    runs_NA = torch.zeros(is_real_NA.shape, dtype=torch.int64)
    total_loss, total_weight = 0.0, 0
    for rows in torch.arange(len(text.ids_NT)).split(_SEQUENCES_AT_ONCE):
        ids_BT, is_text_BT = text.ids_NT[rows], is_text_NT[rows]
        for places in torch.arange(len(anchors_A)).split(_ANCHORS_AT_ONCE):
            real_BA = is_real_NA[rows][:, places]
            if not real_BA.any():
                continue
            anchors_BA = anchors_A[places].expand(len(rows), -1)
            result, _ = blocks_loss(Windows(ids_BT, torch.zeros_like(ids_BT), is_text_BT, anchors_BA, real_BA))
            total_loss += float(result.loss) * int(real_BA.sum())
            total_weight += int(real_BA.sum())
            runs_NA[rows[:, None], places] = leading_run(result.correct_AJ).view(len(rows), -1).cpu()
    rounds = [
        walk_rounds(run[start - first : end - 1 - first])
        for run, start, end in zip(runs_NA.tolist(), text.prompt_lengths, text.lengths, strict=True)
    ]
    return Simulated(rounds, total_loss / total_weight)
