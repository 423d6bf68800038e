"""Several rounds per launch on the resident kernel: it drafts, verifies, samples and accepts without the host.

The host writes a record per sequence, and its text if prompt lookup needs it, and reads a report of every step after
the launch. Texts stay on the GPU and are sent again only after the host computed rows of their slot. All sequences
share the steps if each anchor has a row; drafts get the other rows (`allocate_rows`), anew each round. More sequences
than rows take several launches. Texts do not depend on this.

A finished sequence frees its rows; the launch ends when all are finished. The host's loop allocates by the same rule,
so both run the same rounds until the host admits a new sequence, which here waits for the end of the launch.

With 1 ms steps, `ROUNDS_A_LAUNCH` makes stream pieces 8 ms apart; host work (two copies and the commits) is spread over
as many rounds.

A DFlash drafter runs in the launch (`plan/ops/drafter.py`) if all sequences' blocks fit a step's rows: two sequences
for blocks of eight and 16 rows. Otherwise the host drafts with the module on the same contexts, so the two may
alternate.

Left out, so that the host runs every round: what `drafter_spec.why_not_planned` names, shared draft noise, and adaptive
draft lengths. The host finds stop strings after the launch and drops later tokens.
"""

from collections.abc import Sequence
from typing import Literal, Protocol

import torch

from speedstack.dflash.model import DFlashDraftModel
from speedstack.runtime.backends.base import Backend, Round, Rounds, RoundsRequest
from speedstack.runtime.backends.gpu.buffers import Memory, sampling_records
from speedstack.runtime.backends.torch_drafter import ModuleDrafter
from speedstack.runtime.model.drafter_spec import DrafterSpec
from speedstack.runtime.plan.record_layout import CAPACITY, OUTCOME, RECORD, TOKEN, WATCHES_EOS
from speedstack.runtime.rounds.row_allocation import contiguous_groups
from speedstack.runtime.rounds.speculation import NGRAM, DraftStrategy

ROUNDS_A_LAUNCH = 8  # a guess, not measured: fewer cost launches, more keep a stream waiting


class Launcher(Protocol):
    """The resident backend, as `ResidentRounds` uses it."""

    memory: Memory
    max_length: int
    drafter: ModuleDrafter | None

    @property
    def planned_drafter(self) -> DrafterSpec | None:
        """The plan's drafter, None if the host drafts."""
        ...

    def set_prompt_lookup(self, is_wanted: bool) -> None:
        """See `Rounds.set_prompt_lookup`."""
        ...

    def launch(self, num_steps: int) -> list[list[int]]:
        """Reports of up to `num_steps` steps of `memory.inbox`. Raises RuntimeError as `Backend.step`."""
        ...


class ResidentRounds(Rounds):
    """`Rounds` on the resident backend."""

    max_rounds = ROUNDS_A_LAUNCH

    def __init__(self, backend: Launcher, num_rows: int) -> None:
        self.num_rows = num_rows
        self._backend = backend
        self._num_known: dict[int, int] = {}  # by slot: tokens of its text on the GPU

    def set_prompt_lookup(self, is_wanted: bool) -> None:
        self._num_known.clear()
        self._backend.set_prompt_lookup(is_wanted)

    def forget(self, slots: Sequence[int]) -> None:
        """The host computes rows of these slots, so their texts on the GPU are stale."""
        for slot in slots:
            self._num_known.pop(slot, None)

    @property
    def has_drafter(self) -> bool:
        return self._drafter is not None

    @property
    def _drafter(self) -> DrafterSpec | None:
        return self._backend.planned_drafter

    def takes(self, requests: Sequence[RoundsRequest]) -> bool:
        if self._drafter is None:
            return True
        wanted = [request.num_drafts + self._drafter.first_slot for request in requests if request.num_drafts]
        return len(requests) <= self.num_rows and sum(wanted) <= self.num_rows

    def run(self, requests: Sequence[RoundsRequest], num_rounds: int) -> list[list[Round]]:
        assert self._drafter is not None or self._backend.drafter is None, "a drafter's context would miss these rows"
        assert self.takes(requests)
        groups = [[requests[index] for index in group] for group in contiguous_groups(len(requests), self.num_rows)]
        return [rounds for group in groups for rounds in self._run(group, num_rounds)]

    def _run(self, requests: Sequence[RoundsRequest], num_rounds: int) -> list[list[Round]]:
        memory, R = self._backend.memory, self.num_rows
        memory.inbox.copy_(rounds_inbox(requests, R))
        history = memory.buffers.get("history")
        for request in requests:
            length = len(request.tokens)
            assert history is not None or self.has_drafter or request.num_drafts == 0, "nobody drafts"
            assert length < request.end <= self._backend.max_length and request.num_drafts < R
            if history is not None and self._num_known.get(request.slot) != length:
                history[request.slot, :length] = torch.tensor(request.tokens, dtype=torch.int32)
        self.forget([request.slot for request in requests])
        longest = max(request.end - len(request.tokens) for request in requests)
        results = [list[Round]() for _ in requests]
        for report in self._backend.launch(min(num_rounds, longest)):
            row = 0
            for rounds, at in zip(results, range(R, len(report), OUTCOME), strict=False):
                num_rows, num_accepted, num_proposed = report[at : at + OUTCOME]
                if num_rows:
                    tokens = report[row : row + num_accepted + 1]
                    rounds.append(Round(num_proposed, num_rows - 1, num_accepted, tokens))
                row += num_rows
        for request, rounds in zip(requests, results, strict=True):
            self._num_known[request.slot] = len(request.tokens) + sum(len(one.tokens) for one in rounds)
        return results


def rounds_for(
    backend: Backend, drafter: DFlashDraftModel | Literal["ngram"] | None, strategy: DraftStrategy
) -> Rounds | None:
    """The backend's rounds for this way of drafting; None if every round needs the host."""
    rounds = backend.rounds
    if rounds is None:
        return None
    fits = not strategy.is_adaptive and strategy.num_per_round(drafter) < rounds.num_rows
    rounds.set_prompt_lookup(drafter == NGRAM and fits)
    if isinstance(drafter, DFlashDraftModel):
        fits = fits and rounds.has_drafter and strategy.noise == "none"
    return rounds if drafter is None or fits else None


def rounds_inbox(requests: Sequence[RoundsRequest], capacity: int) -> torch.Tensor:
    """`Memory.inbox` for sequences decoded without the host; int32 [4, capacity, RECORD] on the CPU.

    Fields: `plan/record_layout.py`. No row is allocated yet.
    """
    assert len(requests) <= capacity, "every anchor of a group has a row"
    assert len({request.slot for request in requests}) == len(requests), "every sequence has a slot of its own"
    rows, sequences = torch.zeros(2, capacity, RECORD, dtype=torch.int32)
    rows[:, TOKEN] = -1
    for index, request in enumerate(requests):
        sequences[index, CAPACITY : WATCHES_EOS + 1] = torch.tensor([
            1 + request.num_drafts, request.tokens[-1], request.slot, len(request.tokens), request.end,
            request.ngram_size, int(request.watches_eos),
        ])  # fmt: skip
    draws = sampling_records([request.draw for request in requests], capacity)
    return torch.stack([rows, torch.zeros_like(draws), sequences, draws])
