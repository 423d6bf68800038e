"""Proposers of draft tokens: none, prompt lookup, or the backend's drafter."""

from collections.abc import Sequence
from typing import Protocol

from speedstack.dflash.propose import Draft
from speedstack.runtime.backends.base import Backend, DraftRequest
from speedstack.runtime.decoding.sequence import RunningSequence
from speedstack.runtime.rounds.sampling import NoiseTable
from speedstack.runtime.rounds.speculation import DraftStrategy


class Proposer(Protocol):
    """One draft per sequence; empty if the sequence wants none or none is found."""

    def propose(self, sequences: Sequence[RunningSequence], noise: NoiseTable) -> list[Draft]:
        """`noise`: the round's, with which the target will sample."""
        ...


class NoProposer:
    """Decodes one token per round."""

    def propose(self, sequences: Sequence[RunningSequence], noise: NoiseTable) -> list[Draft]:
        """See `Proposer`."""
        return [Draft([]) for _ in sequences]


class NgramProposer:
    """Prompt lookup; every sequence keeps its own index."""

    def propose(self, sequences: Sequence[RunningSequence], noise: NoiseTable) -> list[Draft]:
        """See `Proposer`."""
        return [s.worth_verifying(Draft(s.look_up(s.num_to_draft()))) for s in sequences]


class DrafterProposer:
    """The backend's drafter, run once for all sequences that want proposals."""

    def __init__(self, backend: Backend, strategy: DraftStrategy) -> None:
        self._backend, self._strategy = backend, strategy

    def propose(self, sequences: Sequence[RunningSequence], noise: NoiseTable) -> list[Draft]:
        """See `Proposer`."""
        wanted = [sequence.num_to_draft() for sequence in sequences]
        depth = max(wanted)
        if depth < 1:
            return [Draft([]) for _ in sequences]
        requests = [self._request(s, depth, noise) for s, count in zip(sequences, wanted, strict=True) if count > 0]
        drafts = iter(self._backend.draft(requests, depth))
        return [
            s.worth_verifying(next(drafts)) if count > 0 else Draft([])
            for s, count in zip(sequences, wanted, strict=True)
        ]

    def _request(self, sequence: RunningSequence, depth: int, noise: NoiseTable) -> DraftRequest:
        position = len(sequence.tokens) - 1
        request = DraftRequest(sequence.tokens[-1], sequence.slot, position)
        if sequence.params.temperature == 0.0:
            return request
        shared = None
        if self._strategy.noise == "shared":
            shared = noise.rows([sequence.noise_key(position + 1 + i) for i in range(depth)])
        return DraftRequest(request.anchor, request.slot, position, sequence.params, shared)
