"""The race: order, medians, identity of outputs, and contestants that fail; with clocks made up."""

import itertools
import logging
from collections.abc import Callable

import numpy as np
import pytest

from speedstack.eval.timing import Contestant, Sample, race, spread

Run = Callable[[list[int], int], Sample]


def runner(log: list[str], name: str, seconds: float, tokens: Callable[[list[int], int], list[int]]) -> Run:
    def run(prompt: list[int], num_new_tokens: int) -> Sample:
        log.append(f"{name}{prompt[0]}")
        return Sample(tokens(prompt, num_new_tokens), 0.5, 0.5 + seconds, num_rounds=4)

    return run


def counting(prompt: list[int], num_new_tokens: int) -> list[int]:
    return [prompt[0] + i for i in range(num_new_tokens)]


def test_repeats_are_interleaved_in_orders_drawn_from_the_seed() -> None:
    def order(seed: int) -> list[str]:
        log: list[str] = []
        contestants = [Contestant(name, name, runner(log, name, 1.0, counting)) for name in "abc"]
        race(contestants, [[1], [2]], num_new_tokens=3, num_repeats=8, progress=False, seed=seed)
        return log

    log = order(0)
    assert log[:3] == ["a1", "b1", "c1"]  # warm-ups
    heats = [log[start : start + 3] for start in range(3, len(log), 3)]
    assert [sorted(heat) for heat in heats] == 8 * [["a1", "b1", "c1"], ["a2", "b2", "c2"]]
    # Everyone runs behind everyone else, and everyone comes first.
    behind = {(first[0], second[0]) for heat in heats for first, second in itertools.pairwise(heat)}
    assert len(behind) == 6
    assert {heat[0][0] for heat in heats} == {"a", "b", "c"}
    assert order(0) == log and order(1) != log


def test_rates_are_by_definition() -> None:
    contestant = Contestant("a", "how", runner([], "a", 2.0, counting), prepare_seconds=1.5)
    (found,), _ = race([contestant], [[1], [2]], num_new_tokens=9, num_repeats=3, progress=False)
    assert found.decode_tokens_per_second.median == 8 / 2.0
    assert found.tokens_per_second.median == 9 / 2.5
    assert found.first_token_seconds.median == 0.5
    assert (found.prepare_seconds, found.warmup_seconds) == (1.5, 2.5)
    assert found.acceptance_length == 8 / 4
    assert found.decode_tokens_per_second.num_repeats == 3
    assert found.identity is None


def test_spread_is_numpys() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 9.0, 7.0]
    found = spread(values)
    assert [found.q1, found.median, found.q3] == pytest.approx(np.percentile(values, [25, 50, 75]))
    assert (found.minimum, found.maximum, found.num_repeats) == (1.0, 9.0, 6)
    assert spread([3.0]).q1 == spread([3.0]).q3 == 3.0


@pytest.mark.parametrize("promised", [True, False])
def test_different_tokens_are_told_and_a_broken_promise_is_an_error(
    promised: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def differs_on_second(prompt: list[int], num_new_tokens: int) -> list[int]:
        tokens = counting(prompt, num_new_tokens)
        return [*tokens[:2], 99, *tokens[3:]] if prompt == [2] else tokens

    contestants = [
        Contestant("a", "a", runner([], "a", 1.0, counting)),
        Contestant("b", "b", runner([], "b", 1.0, differs_on_second), identical_to="a", identity_promised=promised),
        Contestant("c", "c", runner([], "c", 1.0, counting), identical_to="a", identity_promised=True),
    ]
    with caplog.at_level(logging.ERROR):
        (_, b, c), _ = race(contestants, [[1], [2]], num_new_tokens=4, num_repeats=2, progress=False)
    assert b.identity is not None and c.identity is not None
    assert (b.identity.num_identical, b.identity.num_prompts) == (1, 2)
    assert b.identity.first_difference == "prompt 2 differs from token 3 on"
    assert b.identity.is_broken is promised and not c.identity.is_broken
    assert ("b promised the tokens of a" in caplog.text) is promised


def test_a_contestant_that_fails_is_reported_with_its_reason_and_the_others_go_on() -> None:
    calls = 0

    def fails_at_third_call(prompt: list[int], num_new_tokens: int) -> Sample:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("out of something\nand a stack")
        return Sample(counting(prompt, num_new_tokens), 0.5, 1.0)

    def raises(prompt: list[int], num_new_tokens: int) -> Sample:
        raise NotImplementedError("not this model")

    contestants = [
        Contestant("early", "", raises),
        Contestant("late", "", fails_at_third_call),
        Contestant("short", "", runner([], "s", 1.0, lambda prompt, n: [1])),
        Contestant("good", "", runner([], "g", 1.0, counting), identical_to="late"),
    ]
    found, unavailable = race(contestants, [[1], [2]], num_new_tokens=4, num_repeats=2, progress=False)
    assert [entry.name for entry in found] == ["good"]
    assert len(found[0].model_dump()) and found[0].decode_tokens_per_second.num_repeats == 2
    assert found[0].identity is None  # there is nothing left to compare with
    assert {entry.name: entry.reason for entry in unavailable} == {
        "early": "NotImplementedError: not this model",
        "late": "RuntimeError: out of something",
        "short": "made 1 tokens of 4",
    }


def test_bad_input_is_named() -> None:
    for prompts, num_new_tokens, num_repeats in (([], 4, 1), ([[1]], 1, 1), ([[1]], 4, 0)):
        with pytest.raises(ValueError, match="a race needs a prompt, 2 new tokens and 1 repeat"):
            race([], prompts, num_new_tokens, num_repeats, progress=False)
