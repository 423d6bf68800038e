"""`draft`, `sample`, `accept` and the row allocation of `embed` in PyTorch, by the host loop's functions.

Records have the kernels' fields (`plan/record_layout.py`). Buffers, with R rows (the plan's capacity), V vocabulary, T
tiles, L positions:

    rows, sequences  int64 [R, 8]       and `sampling` of rows, `draws` of sequences, which to the plan are part of them
    proposals        int64 [R, R]       per sequence: the number, and the tokens
    chosen           int64 [R]          the token after each row, -1 where a logit is NaN
    outcome          int64 [R, 3]       per sequence: rows in the step, drafts accepted, proposals made
    history          int64 [R, L]       the text in each slot
    logits           float32 [R, V];  best  [R, T, 2] largest logit per tile and its index; with a temperature, of
    logits / temperature + noise
    peaks            float32 [R, T]     the largest logits of rows with a temperature
    bins             int64 [R, 2, N]    masses and token counts of rows with top-k or top-p (`rounds/histogram.py`)

The kernels' `chains` and `notes` are not here: `sample` sorts.
"""

from collections.abc import Callable, Generator, Sequence

import torch

from speedstack.dflash.accept import accept
from speedstack.dflash.ngram import NgramIndex
from speedstack.runtime.plan.ir import Phase, Plan
from speedstack.runtime.plan.record_layout import (
    ANCHOR,
    CAPACITY,
    END,
    FIRST_PROPOSED,
    FIRST_ROW,
    LENGTH,
    NUM_PROPOSED,
    NUM_ROWS,
    OUTCOME,
    OWN_SLOT,
    POSITION,
    RECORD,
    SEED,
    TEMPERATURE,
    TOKEN,
    TOP_K,
    TOP_P,
)
from speedstack.runtime.rounds.histogram import NUM_BINS, bins_of
from speedstack.runtime.rounds.row_allocation import allocate_rows
from speedstack.runtime.rounds.sampling import (
    LEAST_TEMPERATURE,
    SHARE_BITS,
    SamplingParams,
    gumbel_noise,
    masses,
    sample,
)

Steps = Generator[None, None, None]
# Computes an item of a phase in a step. A generator lets other items run at each yield.
ItemSemantics = Callable[[Phase, tuple[int, ...], int], Steps | None]


class MultiStepSemantics:
    """The buffers above and the semantics of their phases."""

    def __init__(self, plan: Plan, vocab_size: int, eos_token_ids: Sequence[int], num_slots: int | None = None) -> None:
        R = plan.rows
        self.plan, self._eos = plan, frozenset(eos_token_ids)
        self._has_proposals = "proposals" in plan.buffer_named
        self.rows_RF, self.sampling_RF, self.sequences_RF, self.draws_RF = torch.zeros(4, R, RECORD, dtype=torch.int64)
        self.rows_RF[:, TOKEN] = -1
        self.proposals_RR = torch.full((R, R), -1)
        self.chosen_R = torch.full((R,), -1)
        self.outcome_RO = torch.full((R, OUTCOME), -1)
        self.history_RL = torch.full((num_slots or R, plan.max_context), -1)
        self.logits_RV = torch.full((R, vocab_size), float("nan"))
        self.best_RT2 = torch.full((R, plan.buffer_named["best"].num_cells, 2), float("nan"))
        self.peaks_RT = torch.full(self.best_RT2.shape[:2], float("nan"))
        self.bins_R2N = torch.full((R, 2, NUM_BINS), -1)

    def set_inbox(self, inbox: torch.Tensor) -> None:
        """Takes the host's `Memory.inbox` for the next step."""
        buffers = (self.rows_RF, self.sampling_RF, self.sequences_RF, self.draws_RF)
        for buffer, records in zip(buffers, inbox, strict=True):
            buffer.copy_(records)

    def is_over(self) -> bool:
        """Whether all sequences decoded without the host are finished, and there were any."""
        records_SF = self.sequences_RF[self.sequences_RF[:, CAPACITY] > 0]
        return len(records_SF) > 0 and bool((records_SF[:, LENGTH] == records_SF[:, END]).all())

    def multi_step_semantics(self) -> dict[str, ItemSemantics]:
        """By op, for `interpret`."""
        return {
            "draft": self._draft,
            "logit_histogram": self._logit_histogram,
            "sample": self._sample,
            "accept": self._accept,
        }

    def is_used(self, row: int) -> bool:
        return bool(self.rows_RF[row, TOKEN] >= 0)

    def _logit_histogram(self, phase: Phase, index: tuple[int, ...], step: int) -> Steps:
        row, number = index
        params = self.params(row)
        if not self.is_used(row) or not self.has_topk_or_topp(params):
            return
        temperature = torch.tensor(params.temperature, dtype=torch.float32)
        scaled_V = self.logits_RV[row, number * phase.tile : (number + 1) * phase.tile] / temperature
        peak = self.peaks_RT[row].max() / temperature
        yield
        if peak.isnan():  # a row without a choice
            return
        bin_V = bins_of(scaled_V, peak)
        if params.top_p_share:
            self.bins_R2N[row, 0].index_add_(0, bin_V, masses(scaled_V, peak))
        if params.top_k:
            self.bins_R2N[row, 1].index_add_(0, bin_V, torch.ones_like(bin_V))

    def _sample(self, phase: Phase, index: tuple[int, ...], step: int) -> Steps:
        (row,) = index
        best_T2, logits_V, is_used = self.best_RT2[row].clone(), self.logits_RV[row].clone(), self.is_used(row)
        params = self.params(row)
        noise_V = self.noise(row) if self.has_topk_or_topp(params) else None
        masses_counted, num_counted = self.bins_R2N[row].sum(-1).tolist()
        yield
        if not is_used:
            return
        if best_T2[:, 0].isnan().any():
            self.chosen_R[row] = -1
        elif noise_V is not None:
            scaled_V = logits_V / torch.tensor(params.temperature, dtype=torch.float32)
            # `sample` sorts instead of reading the bins, but they must still be complete.
            assert not params.top_p_share or masses_counted == int(masses(scaled_V, scaled_V.max()).sum())
            assert not params.top_k or num_counted == len(logits_V)
            self.chosen_R[row] = sample(logits_V, noise_V, params)
        else:
            self.chosen_R[row] = int(best_T2[int(best_T2[:, 0].argmax()), 1])

    def params(self, row: int) -> SamplingParams:
        """The sampling parameters of a row."""
        temperature = float(self.sampling_RF[row, TEMPERATURE].to(torch.int32).view(torch.float32))
        if temperature > 0.0:  # the smallest temperature as float32 is slightly below the limit
            temperature = max(temperature, LEAST_TEMPERATURE)
        top_k, share = self.sampling_RF[row, TOP_K : TOP_P + 1].tolist()
        return SamplingParams(temperature, share / 2**SHARE_BITS if share else 1.0, top_k)

    def has_topk_or_topp(self, params: SamplingParams) -> bool:
        """Whether top-k or top-p may drop tokens."""
        return params.temperature > 0.0 and (0 < params.top_k < self.logits_RV.shape[1] or params.top_p_share > 0)

    def noise(self, row: int) -> torch.Tensor:
        """Float32 [V], for the token after a row."""
        seed, key = self.sampling_RF[row, SEED:TEMPERATURE].to(torch.int32).view(torch.int64).tolist()
        position = int(self.rows_RF[row, POSITION]) + 1
        return gumbel_noise([seed], [key], [position], self.logits_RV.shape[1], self.logits_RV.device)[0]

    def _accept(self, phase: Phase, index: tuple[int, ...], step: int) -> Steps:
        (sequence,) = index
        capacity, _, slot, length, end, _, watches_eos, _ = self.sequences_RF[sequence].tolist()
        first, num_rows = self.rows_RF[sequence, [FIRST_ROW, NUM_ROWS]].tolist()
        if not capacity or not num_rows:
            yield
            self.outcome_RO[sequence] = 0
            return
        own = slice(first, first + num_rows)
        drafts, chosen = self.rows_RF[own, TOKEN].tolist()[1:], self.chosen_R[own].tolist()
        num_proposed = int(self.proposals_RR[sequence, NUM_PROPOSED]) if self._has_proposals else 0
        tokens = accept(drafts, chosen.__getitem__)
        num_accepted = len(tokens) - 1
        for number, token in enumerate(tokens):
            if token < 0 or (watches_eos and token in self._eos):
                tokens, end = tokens[: number + 1], length + number + 1
                break
        new_length = length + len(tokens)
        yield
        self.outcome_RO[sequence] = torch.tensor([num_rows, num_accepted, num_proposed])
        self.sequences_RF[sequence, [ANCHOR, LENGTH, END]] = torch.tensor([tokens[-1], new_length, end])
        if "history" in self.plan.buffer_named:
            self.history_RL[slot, length:new_length] = torch.tensor(tokens)

    def _draft(self, phase: Phase, index: tuple[int, ...], step: int) -> Steps:
        (sequence,) = index
        capacity, _, slot, length, end, ngram, _, _ = self.sequences_RF[sequence].tolist()
        if not capacity or length == end:
            return
        text = self.history_RL[slot, :length].tolist()
        drafts = NgramIndex(ngram).propose(text, min(capacity, end - length) - 1)
        yield
        self.proposals_RR[sequence, NUM_PROPOSED] = len(drafts)
        self.proposals_RR[sequence, FIRST_PROPOSED : FIRST_PROPOSED + len(drafts)] = torch.tensor(drafts)

    def allocate_row(self, row: int) -> Steps:
        """Writes this row's record and the fields of the sequence at its index, unless the host did; clears the row's
        bins.
        """
        self.bins_R2N[row] = 0
        sequences, proposals = self.sequences_RF.tolist(), self.proposals_RR.tolist()
        if not any(record[CAPACITY] for record in sequences):
            return
        wanted = [
            (1 + (own[NUM_PROPOSED] if self._has_proposals else 0)) if record[LENGTH] < record[END] else 0
            for record, own in zip(sequences, proposals, strict=True)
        ]
        allocated = allocate_rows(wanted, self.plan.rows)
        first = [sum(allocated[:sequence]) for sequence in range(self.plan.rows)]
        record, draws = [-1, 0, 0, 0, first[row], allocated[row], 0, 0], torch.zeros(RECORD, dtype=torch.int64)
        owners = [sequence for sequence in range(self.plan.rows) if 0 <= row - first[sequence] < allocated[sequence]]
        if owners:
            (sequence,) = owners
            own, number, draws = sequences[sequence], row - first[sequence], self.draws_RF[sequence].clone()
            token = proposals[sequence][FIRST_PROPOSED + number - 1] if number else own[ANCHOR]
            record[:FIRST_ROW] = [token, own[OWN_SLOT], own[LENGTH] - 1 + number, own[LENGTH] - 1]
        yield
        self.rows_RF[row], self.sampling_RF[row] = torch.tensor(record), draws
