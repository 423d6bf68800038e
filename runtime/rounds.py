"""Rounds without the host on the resident kernel: it drafts, verifies, samples and accepts, several rounds a launch.

The host writes a record of each sequence, and its text where look-up drafts from it, launches, and reads a report of
every step when all are done. A text stays on the GPU: it is sent again only when the host has computed rows of its slot
since. Sequences share a step as long as their rows fit, drafts included; more of them take several launches, which for
many sequences that find little to look up are more steps than the host's rounds would be. Texts do not depend on that,
nor on how many rounds a launch makes.

A sequence that is over leaves its rows idle until the launch ends; when all are, the steps that are left compute
nothing that is kept.

Left out: DFlash drafters, top-k and top-p, and adaptive numbers of drafts, with which the host makes every round; stop
strings, which it finds after the launch, dropping what came behind them.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import torch

from speedstack.dflash.model import DFlashDraftModel
from speedstack.runtime.backend import Backend, Draw, Round, Rounds, RoundsRequest
from speedstack.runtime.memory import sampling_records
from speedstack.runtime.records import CAPACITY, FIRST_POSITION, FIRST_ROW, NUM_ROWS, RECORD, TOKEN, WATCHES_EOS
from speedstack.runtime.strategy import NGRAM, DraftStrategy

if TYPE_CHECKING:
    from speedstack.runtime.resident import ResidentBackend

ROUNDS_A_LAUNCH = 8  # a guess, not measured: fewer cost launches, more keep a stream waiting


class ResidentRounds(Rounds):
    """See the module, and `Rounds`."""

    max_rounds = ROUNDS_A_LAUNCH

    def __init__(self, backend: "ResidentBackend", num_rows: int) -> None:
        self.num_rows = num_rows
        self._backend = backend
        self._num_known: dict[int, int] = {}  # by slot: tokens of its text that lie on the GPU

    def set_look_up(self, is_wanted: bool) -> None:
        self._num_known.clear()
        self._backend.set_look_up(is_wanted)

    def forget(self, slots: Sequence[int]) -> None:
        """The host computes rows of these slots: they may hold other texts now."""
        for slot in slots:
            self._num_known.pop(slot, None)

    def run(self, requests: Sequence[RoundsRequest], num_rounds: int) -> list[list[Round]]:
        assert self._backend.drafter is None, "a drafter's context would miss these rows"
        return [rounds for group in self._groups(requests) for rounds in self._run(group, num_rounds)]

    def _groups(self, requests: Sequence[RoundsRequest]) -> Iterator[list[RoundsRequest]]:
        """Neighbours whose rows fit one step."""
        group, num_rows = list[RoundsRequest](), 0
        for request in requests:
            if num_rows + 1 + request.num_drafts > self.num_rows:
                yield group
                group, num_rows = [], 0
            group.append(request)
            num_rows += 1 + request.num_drafts
        yield group

    def _run(self, requests: Sequence[RoundsRequest], num_rounds: int) -> list[list[Round]]:
        memory, R = self._backend.memory, self.num_rows
        memory.inbox.copy_(rounds_inbox(requests, R))
        history = memory.buffers.get("history")
        for request in requests:
            length = len(request.tokens)
            assert history is not None or request.num_drafts == 0, "nothing looks up"
            assert length < request.end <= self._backend.max_length and request.num_drafts < R
            if history is not None and self._num_known.get(request.slot) != length:
                history[request.slot, :length] = torch.tensor(request.tokens, dtype=torch.int32)
        self.forget([request.slot for request in requests])
        reports = self._backend.launch(num_rounds)
        results, row = [], 0
        for sequence, request in enumerate(requests):
            rounds = list[Round]()
            for report in reports:
                num_rows, num_accepted = report[R + 2 * sequence : R + 2 * sequence + 2]
                if num_rows:
                    rounds.append(Round(num_rows - 1, num_accepted, report[row : row + num_accepted + 1]))
            row += 1 + request.num_drafts
            results.append(rounds)
            self._num_known[request.slot] = len(request.tokens) + sum(len(one.tokens) for one in rounds)
        return results


def rounds_for(
    backend: Backend, drafter: DFlashDraftModel | Literal["ngram"] | None, strategy: DraftStrategy
) -> Rounds | None:
    """The backend's rounds, ready for this way of drafting; None where every round needs the host (see the module)."""
    rounds = backend.rounds
    if rounds is None:
        return None
    fits = not strategy.is_adaptive and strategy.num_per_round(drafter) < rounds.num_rows
    rounds.set_look_up(drafter == NGRAM and fits)
    return rounds if drafter is None or (drafter == NGRAM and fits) else None


def rounds_inbox(requests: Sequence[RoundsRequest], capacity: int) -> torch.Tensor:
    """What `Memory.inbox` holds when sequences begin to go on by themselves; int32 [3, capacity, RECORD] on the CPU.

    Fields as in `records`.
    """
    rows = [[-1] + [0] * (RECORD - 1) for _ in range(capacity)]
    sequences = [[0] * RECORD for _ in range(capacity)]
    draws = list[Draw | None]()
    first = 0
    for index, request in enumerate(requests):
        num_own, length = 1 + request.num_drafts, len(request.tokens)
        assert first + num_own <= capacity, "the rows of a group fit a step"
        rows[first][TOKEN : FIRST_POSITION + 1] = [request.tokens[-1], request.slot, length - 1, length - 1]
        rows[index][FIRST_ROW : NUM_ROWS + 1] = [first, 1]
        sequences[index][CAPACITY : WATCHES_EOS + 1] = [
            num_own, first, request.slot, length, request.end, request.ngram_size, int(request.watches_eos)
        ]  # fmt: skip
        draws += [request.draw] * num_own
        first += num_own
    sampling = sampling_records(draws, capacity)
    return torch.stack([torch.tensor(rows, dtype=torch.int32), sampling, torch.tensor(sequences, dtype=torch.int32)])
