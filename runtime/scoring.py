"""Log-probabilities of many texts with common prefixes, computing each shared prefix once per slot.

Sequences are visited in token order, where neighbours share the longest prefixes, so a cache slot computes only the
rows in which the next sequence differs. Stale rows are overwritten or never read, like rejected drafts. Row invariance
keeps every score's bits. Several slots walk disjoint parts of the order, so that short remainders share a step.

Left out: sharing between slots.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from speedstack.runtime.backends.base import Rows
from speedstack.runtime.decoding.results import Score
from speedstack.runtime.engine import Engine
from speedstack.runtime.model.kv_ring import MAX_ROWS, ring_length

# A cut makes the second slot recompute the shared prefix. Up to this many tokens (a prefix token, "Question:") that
# costs less than the steps saved by walking in parallel.
MAX_SHARED_AT_A_CUT = 8


@dataclass(frozen=True)
class ContinuationScore:
    """Score of the request `index`; its tokens are the continuation only."""

    index: int
    score: Score


@dataclass
class _Pass:
    """One input sequence and its requests, which differ in the last token or the context length.

    `first_scored`: the first row whose logits any request needs.
    """

    inputs: list[int]
    first_scored: int
    members: list[int]


class _Lane:
    """One cache slot and its remaining passes, in order."""

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
        """Moves to the next pass and keeps the slot's rows that it shares."""
        self.logprobs, self.is_greedy = [], []
        if not self._waiting:
            self.current = None
            return
        self.current = self._waiting.pop()
        # The first scored row is recomputed: its logits were not kept.
        keep = min(_common_length(self._held, self.current.inputs), self.current.first_scored)
        if self._high_water - keep > self._slack:
            # The rings of sliding-window layers no longer hold keys that these rows attend to.
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
    """Scores each (context ids, continuation ids), in order of completion.

    Bit-identical to `engine.score(context + continuation)` cut to the continuation.

    Raises:
        ValueError: an empty context or continuation, ids outside the vocabulary, more than `engine.max_length` tokens
            before the last one, or NaN logits. Scores already yielded stay valid.
    """
    sequences = []
    for context, continuation in requests:
        if not context or not continuation:
            raise ValueError("scoring a continuation needs a context of one token or more, and a token to score")
        # The last token is only looked up in the logits before it and needs no position.
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
    """One target step over all lanes that fit, and the scores it completes."""
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
        # Every request of a pass has the same next token after each row but the last.
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
    """The distinct input sequences in token order, each without its last token."""
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
    """At most `max_parts` parts of about equal work, cut only where neighbours share almost nothing."""
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
    """How far behind its last written row a slot may resume with every ring still holding its window."""
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
