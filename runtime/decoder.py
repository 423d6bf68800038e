"""The decode loop's two steps: a prompt's prefill, and a round of proposals, verification and acceptance.

In a round every sequence contributes its newest token (the anchor, whose keys and values the target has not computed
yet) and the proposals after it; the target computes all rows in one step, the token after each row is chosen from its
logits, and proposals are kept as long as they are the tokens chosen.
"""

import time
from collections.abc import Sequence

import torch

from speedstack.dflash.accept import accept
from speedstack.runtime.backend import Backend, Rows
from speedstack.runtime.proposer import Proposer
from speedstack.runtime.ring import MAX_ROWS
from speedstack.runtime.sampling import NoiseTable, sample
from speedstack.runtime.sequence import RunningSequence


class Decoder:
    """Runs sequences on a backend, with a proposer; `has_trees` says whether its drafts branch."""

    def __init__(
        self, backend: Backend, proposer: Proposer, has_trees: bool, vocab_size: int, device: torch.device
    ) -> None:
        self._backend, self._proposer, self._has_trees = backend, proposer, has_trees
        self._vocab_size, self._device = vocab_size, device

    def prefill(self, sequence: RunningSequence) -> None:
        """Computes a prompt, chunk by chunk, and commits the first new token. Raises ValueError as `round`."""
        started = time.perf_counter()
        ids = sequence.tokens
        for start in range(0, len(ids), MAX_ROWS):
            chunk = ids[start : start + MAX_ROWS]
            rows = Rows(chunk, [sequence.slot] * len(chunk), list(range(start, start + len(chunk))))
            is_last = start + len(chunk) == len(ids)
            logits_WV, best = self._backend.step(rows, [len(chunk) - 1] if is_last else [])
        noise = NoiseTable(self._vocab_size, self._device)
        token = _choose(sequence, logits_WV[0], best[0], len(ids), noise)
        sequence.stats.prefill_seconds = time.perf_counter() - started
        sequence.commit([token])

    def round(self, sequences: Sequence[RunningSequence]) -> None:
        """One round of all `sequences`. Raises ValueError when the target's logits are not numbers."""
        started = time.perf_counter()
        noise = NoiseTable(self._vocab_size, self._device)
        drafts = self._proposer.propose(sequences, noise)
        tokens: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        parents: list[int] = []
        anchors: list[int] = []
        noise_keys: list[tuple[int, int, int]] = []
        for sequence, draft in zip(sequences, drafts, strict=True):
            anchor, start, depths = len(tokens), len(sequence.tokens) - 1, draft.depths()
            anchors.append(anchor)
            tokens += [sequence.tokens[-1], *draft.tokens]
            slots += [sequence.slot] * (1 + len(draft.tokens))
            positions += [start, *(start + depth for depth in depths)]
            parents += [-1, *(anchor + 1 + parent for parent in draft.parents)]
            if sequence.params.temperature > 0.0:
                noise_keys += [sequence.noise_key(start + 1 + i) for i in range(max(depths, default=0) + 1)]
        rows = Rows(tokens, slots, positions, parents if self._has_trees else None)
        logits_WV, best = self._backend.step(rows, range(len(tokens)))
        noise.rows(noise_keys)  # drawn together, whatever of it the rounds below come to use
        kept: list[int] = []
        for sequence, draft, anchor in zip(sequences, drafts, anchors, strict=True):

            def target_token(node: int, sequence: RunningSequence = sequence, anchor: int = anchor) -> int:
                row = anchor + 1 + node
                return _choose(sequence, logits_WV[row], best[row], positions[row] + 1, noise)

            accepted, chosen = accept(draft, target_token)
            kept += [anchor, *(anchor + 1 + node for node in accepted)]
            sequence.record_round(draft, len(accepted), sequence.commit(chosen))
        if self._has_trees:
            self._backend.commit(kept)
        seconds = time.perf_counter() - started
        for sequence in sequences:
            sequence.stats.decode_seconds += seconds


def _choose(sequence: RunningSequence, logits_V: torch.Tensor, best: int, position: int, noise: NoiseTable) -> int:
    """The token at `position`, given the logits that predict it and the index of the largest."""
    if best < 0:
        raise ValueError(
            f"the target's logits at position {position} are not numbers; "
            "the checkpoint is broken or its dtype overflows"
        )
    if sequence.params.temperature == 0.0:
        return best
    return sample(logits_V, noise.rows([sequence.noise_key(position)])[0], sequence.params)
