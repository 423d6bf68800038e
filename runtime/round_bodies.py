"""What `draft`, `sample` and `accept` compute, in PyTorch, on the plan's buffers: by the functions of the host's loop.

The records of rows, sampling and sequences are those of the kernels, field by field (`records`). Buffers, with R rows
(the plan's capacity), V vocabulary, T tiles, L positions:

    rows, sequences  int64 [R, 8]       and `sampling`, which the plan counts as part of the rows
    chosen           int64 [R]          the token after each row, -1 where a logit is not a number
    outcome          int64 [R, 2]       of each sequence: its rows in the step, and how many of its drafts stand
    history          int64 [R, L]       the text in each slot
    logits           float32 [R, V];  best  [R, T, 2] the largest logit of each tile and its index
"""

from collections.abc import Generator, Sequence

import torch

from speedstack.dflash.accept import accept
from speedstack.dflash.ngram import NgramIndex
from speedstack.dflash.tree import Draft
from speedstack.runtime.interpret import Body
from speedstack.runtime.plan import Phase, Plan
from speedstack.runtime.records import (
    CAPACITY,
    END,
    FIRST_ROW,
    LENGTH,
    NUM_ROWS,
    OWN_ROW,
    OWN_SLOT,
    POSITION,
    RECORD,
    SEED,
    TEMPERATURE,
    TOKEN,
)
from speedstack.runtime.sampling import SamplingParams, gumbel_noise, sample

Steps = Generator[None, None, None]


class RoundBodies:
    """The buffers that are named above, and the bodies of their phases."""

    def __init__(self, plan: Plan, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        R = plan.rows
        self.plan, self._eos = plan, frozenset(eos_token_ids)
        self.rows_RF, self.sampling_RF, self.sequences_RF = torch.zeros(3, R, RECORD, dtype=torch.int64)
        self.rows_RF[:, TOKEN] = -1
        self.chosen_R = torch.full((R,), -1)
        self.outcome_R2 = torch.full((R, 2), -1)
        self.history_RL = torch.full((R, plan.max_context), -1)
        self.logits_RV = torch.full((R, vocab_size), float("nan"))
        self.best_RT2 = torch.full((R, plan.buffer_named["best"].num_cells, 2), float("nan"))

    def set_inbox(self, inbox: torch.Tensor) -> None:
        """The host's part, as `Memory.inbox` takes it: what the next step computes."""
        for buffer, records in zip((self.rows_RF, self.sampling_RF, self.sequences_RF), inbox, strict=True):
            buffer.copy_(records)

    def round_bodies(self) -> dict[str, Body]:
        """By op, for `interpret`."""
        return {"draft": self._draft, "sample": self._sample, "accept": self._accept}

    def is_used(self, row: int) -> bool:
        return bool(self.rows_RF[row, TOKEN] >= 0)

    def _sample(self, phase: Phase, index: tuple[int, ...], step: int) -> Steps:
        (row,) = index
        best_T2, logits_V, is_used = self.best_RT2[row].clone(), self.logits_RV[row].clone(), self.is_used(row)
        seed, key = self.sampling_RF[row, SEED:TEMPERATURE].to(torch.int32).view(torch.int64).tolist()
        temperature = float(self.sampling_RF[row, TEMPERATURE].to(torch.int32).view(torch.float32))
        position = int(self.rows_RF[row, POSITION]) + 1
        yield
        if not is_used:
            return
        if best_T2[:, 0].isnan().any():
            self.chosen_R[row] = -1
        elif temperature > 0.0:
            noise_RV = gumbel_noise([seed], [key], [position], len(logits_V), logits_V.device)
            self.chosen_R[row] = sample(logits_V, noise_RV[0], SamplingParams(temperature))
        else:
            self.chosen_R[row] = int(best_T2[int(best_T2[:, 0].argmax()), 1])

    def _accept(self, phase: Phase, index: tuple[int, ...], step: int) -> Steps:
        (sequence,) = index
        capacity, own_row, slot, length, end, _, watches_eos, _ = self.sequences_RF[sequence].tolist()
        num_rows = int(self.rows_RF[sequence, NUM_ROWS]) if capacity else 0
        if not num_rows:
            yield
            self.outcome_R2[sequence] = 0
            return
        own = slice(own_row, own_row + num_rows)
        drafts, chosen = self.rows_RF[own, TOKEN].tolist()[1:], self.chosen_R[own].tolist()
        accepted, tokens = accept(Draft.chain(drafts), lambda node: chosen[node + 1])
        for number, token in enumerate(tokens):
            if token < 0 or (watches_eos and token in self._eos):
                tokens, end = tokens[: number + 1], length + number + 1
                break
        new_length = length + len(tokens)
        yield
        self.outcome_R2[sequence] = torch.tensor([num_rows, len(accepted)])
        self.sequences_RF[sequence, LENGTH], self.sequences_RF[sequence, END] = new_length, end
        if "history" in self.plan.buffer_named:
            self.history_RL[slot, length:new_length] = torch.tensor(tokens)
        else:
            self._write_rows(sequence, tokens[-1:] if new_length < end else [], new_length - 1)

    def _draft(self, phase: Phase, index: tuple[int, ...], step: int) -> Steps:
        (sequence,) = index
        capacity, _, slot, length, end, ngram, _, _ = self.sequences_RF[sequence].tolist()
        if not capacity:
            return
        text, num_left = self.history_RL[slot, :length].tolist(), end - length
        drafts = NgramIndex(ngram).propose(text, min(capacity, num_left) - 1)
        yield
        self._write_rows(sequence, [text[-1], *drafts] if num_left else [], length - 1)

    def _write_rows(self, sequence: int, tokens: list[int], position: int) -> None:
        """A sequence's rows of the next step; the others that it owns are idle."""
        capacity, own_row, slot = self.sequences_RF[sequence, [CAPACITY, OWN_ROW, OWN_SLOT]].tolist()
        for number in range(capacity):
            token = tokens[number] if number < len(tokens) else -1
            record = [token, slot, position + number, position]
            self.rows_RF[own_row + number, : len(record)] = torch.tensor(record)
        self.rows_RF[sequence, FIRST_ROW], self.rows_RF[sequence, NUM_ROWS] = own_row, len(tokens)
