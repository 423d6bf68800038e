"""Log-probabilities of many texts that begin alike, computing what they share once.

Multiple choice asks for several continuations of one context, few-shot tasks for many contexts with one beginning. In
the order of their tokens, neighbours share the longest beginnings; a cache slot that holds one sequence then needs only
the rows in which the next one differs. Rows of the sequence before, past the shared part, are overwritten or never
read, exactly as rejected drafts are. A row's bits depend on its own sequence and position alone, so sharing changes no
bit of any score.

Several slots walk through disjoint parts of the order side by side, so that short remainders fill a step together.

Left out: slots that share with each other; a beginning shared by everything is computed once a slot in use.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from speedstack.runtime.backends.base import Rows
from speedstack.runtime.decoding.results import Score
from speedstack.runtime.engine import Engine
from speedstack.runtime.model.kv_ring import MAX_ROWS, ring_length

# Cutting the order between two sequences makes a second slot compute what they share. Up to this many tokens (a prefix
# token, "Question:") that costs less than the steps which walking side by side saves.
MAX_SHARED_AT_A_CUT = 8


@dataclass(frozen=True)
class ContinuationScore:
    """Score of the request `index`, whose tokens are all of its continuation."""

    index: int
    score: Score


@dataclass
class _Pass:
    """One input sequence, and the requests that differ from each other in their last token or their context's length.

    `first_scored` is the first row whose logits any of them needs.
    """

    inputs: list[int]
    first_scored: int
    members: list[int]


class _Lane:
    """One cache slot and the passes it has still to compute, in order."""

    def __init__(self, slot: int, passes: list[_Pass], slack: int) -> None:
        self.slot, self._slack = slot, slack
        self._waiting = passes[::-1]
        self._held: list[int] = []
        self._high_water = 0
        self.current: _Pass | None = None
        self.position = 0
        self.logprobs: list[torch.Tensor] = []
        self.is_greedy: list[bool] = []
        self.advance()

    def advance(self) -> None:
        """Turn to the next pass, keeping the rows of the slot that are also its own."""
        self.logprobs, self.is_greedy = [], []
        if not self._waiting:
            self.current = None
            return
        self.current = self._waiting.pop()
        # The first scored row is computed again: its logits were not kept.
        keep = min(_common_length(self._held, self.current.inputs), self.current.first_scored)
        if self._high_water - keep > self._slack:
            # Rings of sliding-window layers have lost keys that these rows would attend to.
            keep, self._high_water = 0, 0
        self._held = self.current.inputs
        self._high_water = max(self._high_water, len(self.current.inputs))
        self.position = keep

    @property
    def num_left(self) -> int:
        return len(self.current.inputs) - self.position if self.current is not None else 0


def score_continuations(
    engine: Engine, requests: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> Iterator[ContinuationScore]:
    """Scores each (context ids, continuation ids), in whichever order they are finished.

    The score of a request is that of `engine.score(context + continuation)`, cut to the continuation, bit for bit.

    Raises:
        ValueError: an empty context or continuation, ids outside the vocabulary, more than `engine.max_length` tokens
            before the last one, or logits that are NaN. Scores yielded before that stand.
    """
    sequences = []
    for context, continuation in requests:
        if not context or not continuation:
            raise ValueError("scoring a continuation needs a context of one token or more, and a token to score")
        # The last token is looked up in the logits before it and needs no position of its own.
        sequences.append([*engine.encode([*context, *continuation][:-1]), *engine.encode([continuation[-1]])])
    passes = _passes(sequences, [len(context) for context, _ in requests])
    if not passes:
        return
    with engine._alone():
        lanes = [_Lane(slot, part, _slack(engine)) for slot, part in enumerate(_cut(passes, engine.max_batch_size))]
        while any(lane.current is not None for lane in lanes):
            yield from _step(engine, lanes, sequences, requests)


def _step(
    engine: Engine,
    lanes: Sequence[_Lane],
    sequences: Sequence[list[int]],
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
) -> Iterator[ContinuationScore]:
    """One step of the target over all lanes that fit, and the scores it completes."""
    tokens: list[int] = []
    slots: list[int] = []
    positions: list[int] = []
    wanted: list[int] = []
    taken: list[tuple[_Lane, int]] = []
    # Longest remainder first, so that lanes end together.
    for lane in sorted(lanes, key=lambda lane: -lane.num_left):
        num_rows = min(lane.num_left, MAX_ROWS - len(tokens))
        if lane.current is None or num_rows == 0:
            continue
        first, last = lane.position, lane.position + num_rows
        wanted += range(len(tokens) + max(0, lane.current.first_scored - first), len(tokens) + num_rows)
        taken.append((lane, max(0, last - max(first, lane.current.first_scored))))
        tokens += lane.current.inputs[first:last]
        slots += [lane.slot] * num_rows
        positions += range(first, last)
        lane.position = last
    logits_WV, best = engine.backend.step(Rows(tokens, slots, positions), wanted)
    if min(best, default=0) < 0:
        position = positions[wanted[best.index(-1)]] + 1
        raise ValueError(
            f"the target's logits at position {position} are NaN; the checkpoint is broken or its dtype overflows"
        )
    logprobs_WV = torch.log_softmax(logits_WV, -1)
    row = 0
    for lane, num_logits in taken:
        one = lane.current
        assert one is not None
        rows_WV, row_best = logprobs_WV[row : row + num_logits], best[row : row + num_logits]
        row += num_logits
        # Each row but a pass's last is followed by one token, whoever asks.
        followers = one.inputs[lane.position - num_logits + 1 : lane.position + 1]
        lane.logprobs.append(rows_WV[range(len(followers)), followers].cpu())
        lane.is_greedy += [a == b for a, b in zip(row_best, followers, strict=False)]
        if lane.num_left:
            continue
        for index in one.members:
            num_before, token = len(requests[index][1]) - 1, sequences[index][-1]
            before = torch.cat(lane.logprobs)
            logprobs = torch.cat([before[len(before) - num_before :], rows_WV[-1, token][None].cpu()])
            is_greedy = [*lane.is_greedy[len(lane.is_greedy) - num_before :], row_best[-1] == token]
            yield ContinuationScore(index, Score(logprobs, torch.tensor(is_greedy)))
        lane.advance()


def _passes(sequences: Sequence[list[int]], context_lengths: Sequence[int]) -> list[_Pass]:
    """The distinct input sequences in the order of their tokens; a sequence's last token is no input."""
    passes: list[_Pass] = []
    for index in sorted(range(len(sequences)), key=lambda index: sequences[index][:-1]):
        inputs = sequences[index][:-1]
        first_scored = context_lengths[index] - 1
        if passes and passes[-1].inputs == inputs:
            passes[-1].members.append(index)
            passes[-1].first_scored = min(passes[-1].first_scored, first_scored)
        else:
            passes.append(_Pass(inputs, first_scored, [index]))
    return passes


def _cut(passes: list[_Pass], max_parts: int) -> list[list[_Pass]]:
    """At most `max_parts` stretches of about equal work, cut only where neighbours share next to nothing."""
    shared = [0, *(_common_length(a.inputs, b.inputs) for a, b in itertools.pairwise(passes))]
    rows = [max(1, len(p.inputs) - common) for p, common in zip(passes, shared, strict=True)]
    even_share = sum(rows) / max_parts
    parts: list[list[_Pass]] = [[]]
    num_rows = 0
    for one, common, count in zip(passes, shared, rows, strict=True):
        if parts[-1] and num_rows >= even_share and common <= MAX_SHARED_AT_A_CUT and len(parts) < max_parts:
            parts.append([])
            num_rows = 0
        parts[-1].append(one)
        num_rows += count
    return parts


def _slack(engine: Engine) -> int:
    """How far behind the last row written a slot may go on: as far as every ring still holds the keys of its window."""
    slacks = [engine.max_length]
    for layer in engine.spec.layers:
        window = layer.attention.window
        length = ring_length(window, engine.max_length)
        if window is not None and length < engine.max_length:
            slacks.append(length - window + 1)
    return min(slacks)


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    limit = min(len(a), len(b))
    return next((i for i in range(limit) if a[i] != b[i]), limit)
