"""Scores of texts that share beginnings are those of each text alone, bit for bit, at a fraction of the rows."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from speedstack.runtime import Engine
from speedstack.runtime.backends.base import Rows
from speedstack.runtime.model.kv_ring import MAX_ROWS
from speedstack.runtime.scoring import score_continuations


def load(path: Path, backend: str = "reference", **options: Any) -> Engine:
    return Engine.from_pretrained(path, backend=backend, device="cpu", **options)  # type: ignore[arg-type]


class CountingBackend:
    """Passes steps on and counts their rows, those with logits too."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.num_rows = self.num_logits = self.num_steps = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def step(self, rows: Rows, logit_rows: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
        assert len(rows.tokens) <= MAX_ROWS
        self.num_rows += len(rows.tokens)
        self.num_logits += len(logit_rows)
        self.num_steps += 1
        return self.backend.step(rows, logit_rows)


def random_requests(seed: int, vocab_size: int) -> list[tuple[list[int], list[int]]]:
    """Contexts that share beginnings of all lengths, continuations of 1 to 90 tokens, repeats, and prefixes."""
    rng = random.Random(seed)

    def ids(length: int) -> list[int]:
        return [rng.randrange(3, vocab_size) for _ in range(length)]

    few_shot = ids(70)
    requests = []
    for num_own in (0, 1, 20, 66):
        context = few_shot + ids(num_own)
        requests += [(context, ids(length)) for length in (1, 1, 2, 9)]
    requests.append((few_shot, ids(90)))
    requests.append((few_shot, requests[-1][1][:40]))
    requests.append((few_shot[:3], few_shot[3:30]))
    requests += [(ids(1), ids(3)), (ids(5), ids(100))]
    requests.append(requests[0])
    rng.shuffle(requests)
    return requests


def check_equal_to_scoring_alone(engine: Engine, requests: list[tuple[list[int], list[int]]]) -> None:
    scores = {one.index: one.score for one in score_continuations(engine, requests)}
    assert sorted(scores) == list(range(len(requests)))
    for index, (context, continuation) in enumerate(requests):
        alone = engine.score(context + continuation)
        assert torch.equal(scores[index].logprobs, alone.logprobs[-len(continuation) :])
        assert torch.equal(scores[index].is_greedy, alone.is_greedy[-len(continuation) :])


@pytest.mark.parametrize("max_batch_size", [1, 4])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_scores_are_those_of_each_text_alone(tiny_model_dir: Path, backend: str, max_batch_size: int) -> None:
    engine = load(tiny_model_dir, backend, max_batch_size=max_batch_size)
    check_equal_to_scoring_alone(engine, random_requests(max_batch_size, engine.vocab_size))


def test_a_beginning_is_computed_once(tiny_model_dir: Path) -> None:
    engine = load(tiny_model_dir, max_batch_size=4)
    counter = CountingBackend(engine.backend)
    engine.backend = counter
    context = list(range(3, 103))
    requests = [(context, [5, 6, 7, 8]), (context, [5, 6, 9, 9, 9]), (context, [7]), (context, [8]), (context, [9])]
    list(score_continuations(engine, requests))
    # The context, whose last row has the logits of three texts; then that row again and what two more texts add to it.
    assert counter.num_rows == 100 + (1 + 3) + (1 + 4)
    assert counter.num_logits == 1 + (1 + 3) + (1 + 4)


def test_going_back_further_than_a_ring_starts_over(tiny_model_dir: Path) -> None:
    engine = load(tiny_model_dir, max_batch_size=1)
    windows = [layer.attention.window for layer in engine.spec.layers]
    assert any(window is not None and window + MAX_ROWS < engine.max_length for window in windows)
    counter = CountingBackend(engine.backend)
    engine.backend = counter
    context = list(range(3, 83))
    long, short = [7, *range(100, 220)], [8, 9]
    check_equal_to_scoring_alone(engine, [(context, long), (context, short)])
    counter.num_rows = 0
    list(score_continuations(engine, [(context, long), (context, short)]))
    assert counter.num_rows == (len(context) + len(long) - 1) + (len(context) + len(short) - 1)


def test_short_remainders_fill_a_step_together(tiny_model_dir: Path) -> None:
    engine = load(tiny_model_dir, max_batch_size=8)
    counter = CountingBackend(engine.backend)
    engine.backend = counter
    requests = [([start, start + 1], [9, 9, 9]) for start in range(10, 170, 10)]
    list(score_continuations(engine, requests))
    # 16 texts of 4 rows, 8 at a time.
    assert counter.num_rows == 64 and counter.num_steps == 2


def test_what_cannot_be_scored_is_named(tiny_model_dir: Path) -> None:
    engine = load(tiny_model_dir)
    with pytest.raises(ValueError, match="needs a context of one token or more"):
        list(score_continuations(engine, [([], [1])]))
    with pytest.raises(ValueError, match="and a token to score"):
        list(score_continuations(engine, [([1], [])]))
    with pytest.raises(ValueError, match="outside the vocabulary"):
        list(score_continuations(engine, [([1], [engine.vocab_size])]))
    with pytest.raises(ValueError, match="do not fit the buffers"):
        list(score_continuations(engine, [([3] * engine.max_length, [4, 5])]))
    assert list(score_continuations(engine, [])) == []


def test_the_last_token_needs_no_position(tiny_model_dir: Path) -> None:
    engine = load(tiny_model_dir)
    context = [3 + i % 400 for i in range(engine.max_length)]
    (one,) = score_continuations(engine, [(context, [7])])
    logits_V = engine.logits(context)[-1]
    assert torch.equal(one.score.logprobs, torch.log_softmax(logits_V, -1)[7:8])


def test_logits_that_are_no_numbers_are_named_and_scores_before_them_stand(tiny_model_dir: Path) -> None:
    engine = load(tiny_model_dir, max_batch_size=1)
    broken = 300
    engine.backend.weights.embedding_VD[broken] = float("nan")  # type: ignore[attr-defined]
    scores = score_continuations(engine, [([3], [4, 5]), ([broken], [4, 5])])
    assert next(scores).index == 0
    with pytest.raises(ValueError, match="logits at position 1 are NaN"):
        next(scores)
