"""The decode loop: prefill of prompts, and rounds of proposals, verification and acceptance.

In a round, each sequence contributes its anchor (the newest token, whose keys and values are not computed yet) and the
proposals after it. The target computes all rows in one step and chooses a token after each; proposals are accepted
while they equal the chosen tokens. Some backends run several rounds without the host.
"""

import time
from collections.abc import Iterator, Sequence
from functools import cached_property

import torch

from speedstack.dflash.accept import accept
from speedstack.dflash.propose import Draft
from speedstack.runtime.backends.base import Backend, Draw, Rounds, RoundsRequest, Rows
from speedstack.runtime.backends.cpu.sampling import NOT_WANTED, CompiledSampler, SampledRows, load_sampler
from speedstack.runtime.decoding.proposers import Proposer
from speedstack.runtime.decoding.sequence import RunningSequence, nan_logits
from speedstack.runtime.model.kv_ring import MAX_ROWS
from speedstack.runtime.rounds.row_allocation import allocate_rows, contiguous_groups
from speedstack.runtime.rounds.sampling import NoiseTable, sample


class Decoder:
    """Runs sequences on a backend, with a proposer.

    `rounds`: set if the backend makes the proposer's drafts itself; every round then runs there.
    """

    def __init__(
        self,
        backend: Backend,
        proposer: Proposer,
        vocab_size: int,
        device: torch.device,
        rounds: Rounds | None = None,
    ) -> None:
        self._backend, self._proposer = backend, proposer
        self._vocab_size, self._device, self._rounds = vocab_size, device, rounds

    def prefill(self, sequences: Sequence[RunningSequence]) -> Iterator[None]:
        """Computes prompts, as many rows per step as fit, and commits each one's first new token.

        Yields after every step that completes a prompt. Raises ValueError as `round`.
        """
        if any(self._host_draw(sequence) is not None for sequence in sequences):
            _ = self._sampler  # compile it before the clock starts
        started = time.perf_counter()
        waiting = [(sequence, position) for sequence in sequences for position in range(len(sequence.tokens))]
        for first in range(0, len(waiting), MAX_ROWS):
            step = waiting[first : first + MAX_ROWS]
            # Only a prompt's last row needs a next token.
            ends = [row for row, (sequence, position) in enumerate(step) if position == len(sequence.tokens) - 1]
            finished = [step[row][0] for row in ends]
            draws: list[Draw | None] = [None] * len(step)
            for row, sequence in zip(ends, finished, strict=True):
                if self._is_drawn_there(sequence):
                    draws[row] = sequence.draw()
            tokens, positions = [sequence.tokens[position] for sequence, position in step], [at for _, at in step]
            rows = Rows(tokens, [sequence.slot for sequence, _ in step], positions, draws if any(draws) else None)
            logits_WV, best = self._backend.step(rows, ends)
            if not ends:
                continue
            sampled = [
                SampledRows(draw, index, 1)
                for index, sequence in enumerate(finished)
                if (draw := self._host_draw(sequence)) is not None
            ]
            noise = NoiseTable(self._vocab_size, self._device)
            drawn = self._draw(
                logits_WV, sampled, [tokens[row] for row in ends], [positions[row] for row in ends], noise
            )
            for index, sequence in enumerate(finished):
                position = len(sequence.tokens)
                token = self._choose(sequence, logits_WV[index], best[index], drawn[index], position, noise)
                sequence.stats.prefill_seconds = time.perf_counter() - started
                sequence.commit([token])
            yield

    def round(self, sequences: Sequence[RunningSequence]) -> None:
        """Runs one round of all `sequences`, or several. Raises ValueError for NaN logits."""
        started = time.perf_counter()
        requests = [sequence.rounds_request() for sequence in sequences]
        if self._rounds is None or not self._rounds.takes(requests):
            self._one_round(sequences)
        else:
            self._several_rounds(self._rounds, sequences, requests)
        seconds = time.perf_counter() - started
        for sequence in sequences:
            sequence.stats.decode_seconds += seconds

    def _several_rounds(
        self, rounds: Rounds, sequences: Sequence[RunningSequence], requests: Sequence[RoundsRequest]
    ) -> None:
        num_rounds = min(rounds.max_rounds, max(sequence.num_left for sequence in sequences))
        made = rounds.run(requests, num_rounds)
        for sequence, its_rounds in zip(sequences, made, strict=True):
            sequence.take_rounds(its_rounds)

    def _one_round(self, sequences: Sequence[RunningSequence]) -> None:
        noise = NoiseTable(self._vocab_size, self._device)
        drafts = self._allocated(self._proposer.propose(sequences, noise))
        tokens: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        anchors: list[int] = []
        draws: list[Draw | None] = []
        sampled: list[SampledRows] = []
        for sequence, draft in zip(sequences, drafts, strict=True):
            anchor, start, num_rows = len(tokens), len(sequence.tokens) - 1, 1 + len(draft.tokens)
            anchors.append(anchor)
            tokens += [sequence.tokens[-1], *draft.tokens]
            slots += [sequence.slot] * num_rows
            positions += range(start, start + num_rows)
            is_drawn_there = self._is_drawn_there(sequence)
            draws += [sequence.draw() if is_drawn_there else None] * num_rows
            draw = self._host_draw(sequence)
            if draw is not None:
                sampled.append(SampledRows(draw, anchor, num_rows))
        rows = Rows(tokens, slots, positions, draws if any(draws) else None)
        logits_WV, best = self._backend.step(rows, range(len(tokens)))
        drawn = self._draw(logits_WV, sampled, tokens, positions, noise)
        for sequence, draft, anchor in zip(sequences, drafts, anchors, strict=True):

            def target_token(count: int, sequence: RunningSequence = sequence, anchor: int = anchor) -> int:
                row = anchor + count
                return self._choose(sequence, logits_WV[row], best[row], drawn[row], positions[row] + 1, noise)

            chosen = accept(draft.tokens, target_token)
            sequence.record_round(len(draft.tokens), len(chosen) - 1, sequence.commit(chosen))

    def _allocated(self, drafts: list[Draft]) -> list[Draft]:
        """The part of each draft that is verified if steps have a fixed number of rows (see `allocate_rows`)."""
        num_rows = self._backend.rows_a_step
        if num_rows is None:
            return drafts
        wanted = [1 + len(draft.tokens) for draft in drafts]
        groups = contiguous_groups(len(drafts), num_rows)
        allocated = [rows for group in groups for rows in allocate_rows([wanted[index] for index in group], num_rows)]
        return [draft.leading(rows - 1) for draft, rows in zip(drafts, allocated, strict=True)]

    def _is_drawn_there(self, sequence: RunningSequence) -> bool:
        """Whether the backend samples this sequence. It never changes, so that a text has one sampler."""
        return self._backend.rounds is not None and sequence.draw() is not None

    def _host_draw(self, sequence: RunningSequence) -> Draw | None:
        """How the host samples the sequence; None if it is greedy or the backend samples."""
        return None if self._is_drawn_there(sequence) else sequence.draw()

    @cached_property
    def _sampler(self) -> CompiledSampler | None:
        return load_sampler() if self._device.type == "cpu" else None

    def _draw(
        self,
        logits_WV: torch.Tensor,
        sampled: Sequence[SampledRows],
        tokens: Sequence[int],
        positions: Sequence[int],
        noise: NoiseTable,
    ) -> list[int]:
        """Tokens that compiled code draws after each row (`CompiledSampler.choose`); empty without it."""
        if sampled and self._sampler is not None:
            return self._sampler.choose(logits_WV, sampled, tokens, positions)
        # Noise is drawn for all rows at once, although some may not use it.
        of_rows = ((draw, positions[first : first + num_rows]) for draw, first, num_rows in sampled)
        noise.rows([(draw.seed, draw.sequence, position + 1) for draw, its in of_rows for position in its])
        return [NOT_WANTED] * len(tokens)

    def _choose(
        self,
        sequence: RunningSequence,
        logits_V: torch.Tensor,
        best: int,
        drawn: int,
        position: int,
        noise: NoiseTable,
    ) -> int:
        """The token at `position`, from its logits, the backend's argmax and the result of `_draw`."""
        if best < 0:
            raise nan_logits(position)
        if sequence.params.temperature == 0.0 or self._is_drawn_there(sequence):
            return best
        if drawn >= 0:
            return drawn
        return sample(logits_V, noise.rows([sequence.noise_key(position)])[0], sequence.params)
