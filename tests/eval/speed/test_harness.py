"""The race: order, medians, times of tokens, identity of outputs, contestants that fail; with clocks made up."""

import itertools
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from speedstack.eval.results.report import Report
from speedstack.eval.results.speed import SetTiming
from speedstack.eval.speed.contestant import Contestant, Sample
from speedstack.eval.speed.harness import Standings, race, spread
from speedstack.runtime import GenerationStats

Run = Callable[[list[int], int], Sample]
Tokens = Callable[[list[int], int], list[int]]
PROMPTS = {"a set": [[1], [2]]}


def counting(prompt: list[int], num_new_tokens: int) -> list[int]:
    return [prompt[0] + i for i in range(num_new_tokens)]


def runner(log: list[str], name: str, seconds: float, tokens: Tokens = counting) -> Run:
    """The first token after half a second, the others evenly over `seconds`."""

    def run(prompt: list[int], num_new_tokens: int) -> Sample:
        log.append(f"{name}{prompt[0]}")
        arrivals = [(0.5 + i * seconds / (num_new_tokens - 1), 1) for i in range(num_new_tokens)]
        return Sample(tokens(prompt, num_new_tokens), arrivals, 0.5 + seconds)

    return run


def run_race(contestants: list[Contestant], prompt_sets: Any = PROMPTS, **options: Any) -> Standings:
    return race(contestants, prompt_sets, progress=False, **({"num_new_tokens": 4, "num_repeats": 2} | options))


class MadeUpMeter:
    """Each reading is a joule after the one before."""

    def __init__(self) -> None:
        self.count = 0

    def joules(self) -> float:
        self.count += 1
        return float(self.count)


def test_repeats_are_interleaved_in_orders_drawn_from_the_seed() -> None:
    def order(seed: int) -> list[str]:
        log: list[str] = []
        contestants = [Contestant(name, name, runner(log, name, 1.0)) for name in "abc"]
        run_race(contestants, num_repeats=8, seed=seed)
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


def test_every_set_is_warmed_up_and_repeated_in_turn() -> None:
    log: list[str] = []
    sets = {"short": [[1], [2]], "long": [[3, 3, 3]]}
    run_race([Contestant("a", "a", runner(log, "a", 1.0))], sets, num_warmups=2)
    # The longest first: buffers sized by it are not sized again.
    assert log == ["a3", "a3", "a1", "a1", *(2 * ["a1", "a2", "a3"])]


def test_rates_are_by_definition() -> None:
    contestant = Contestant("a", "how", runner([], "a", 2.0), prepare_seconds=1.5)
    (found,) = run_race([contestant], num_new_tokens=9, num_repeats=3, gpu_hour_usd=7.2).overall
    assert found.decode_tokens_per_second.median == 8 / 2.0
    assert found.tokens_per_second.median == 9 / 2.5
    assert found.first_token_seconds.median == 0.5
    assert (found.prepare_seconds, found.warmup_seconds) == (1.5, 2.5)
    assert found.decode_tokens_per_second.num_repeats == 3
    assert found.token_ms is not None and found.token_ms.p50.median == pytest.approx(250.0)
    # 7.2 dollars an hour are 0.002 a second, in which 3.6 tokens are made.
    assert found.usd_per_million_tokens == pytest.approx(0.002 / 3.6 * 1e6)
    assert found.identity is None and found.acceptance_length is None and found.survival == ()
    assert found.joules_per_token is None


def test_tokens_that_come_together_share_their_wait() -> None:
    sample = Sample([1] * 9, [(1.0, 2), (1.4, 4), (1.5, 1), (2.5, 2)], 2.6)
    assert sample.first_token_seconds == 1.0
    # Nothing for the two of the first arrival; the mean over tokens is the inverse of the rate up to the last arrival.
    assert sample.token_seconds() == pytest.approx([0.1] * 4 + [0.1] + [0.5] * 2)
    assert sum(sample.token_seconds()) == pytest.approx(2.5 - 1.0)
    assert sample.wait_seconds() == pytest.approx([0.4, 0.1, 1.0])

    def run(prompt: list[int], num_new_tokens: int) -> Sample:
        return sample

    (found,) = run_race([Contestant("a", "a", run)], num_new_tokens=9, num_repeats=3).overall
    assert found.token_ms is not None and found.wait_ms is not None
    times, waits = 1e3 * np.array(sample.token_seconds() * 2), 1e3 * np.array(sample.wait_seconds() * 2)
    for level in (50, 95, 99):
        assert getattr(found.token_ms, f"p{level}").median == pytest.approx(np.percentile(times, level))
        assert getattr(found.wait_ms, f"p{level}").median == pytest.approx(np.percentile(waits, level))
    assert found.decode_tokens_per_second.median == pytest.approx(7 / 1.6)
    assert found.token_ms.p50.num_repeats == 3


def test_sequences_decoded_at_once_are_one_call() -> None:
    asked: list[list[list[int]]] = []

    def run_batch(prompts: list[list[int]], num_new_tokens: int) -> list[Sample]:
        """Prompts are read one after another; the first sequence decodes a token meanwhile."""
        asked.append(prompts)
        arrivals = ([(1.0, 1), (1.5, 1), (3.0, 2)], [(2.0, 1), (2.5, 1), (3.0, 2)])
        return [Sample(counting(prompt, 4), one, 4.0) for prompt, one in zip(prompts, arrivals, strict=True)]

    prompts = [[1], [2, 2, 2], [3], [4, 4, 4]]
    contestants = [
        Contestant("a", "", runner([], "a", 1.0), run_batch),
        Contestant("b", "", runner([], "b", 1.0), run_batch, identical_to="a", identity_promised=True),
        Contestant("alone", "", runner([], "alone", 1.0)),
    ]
    sets = {"one": prompts, "two": prompts}
    standings = run_race(contestants, sets, num_repeats=1, batch_sizes={"two": 2}, gpu_hour_usd=7.2)
    assert [(entry.name, entry.reason) for entry in standings.unavailable] == [
        ("alone", "two: ValueError: it decodes one sequence at a time")
    ]
    assert sorted(asked) == sorted(2 * (2 * [prompts[:2]] + [prompts[2:]]))  # warm-ups, and the race
    a, b = standings.sets["two"]
    # In every call all have their first token after 2 s, by when three are there; then five in 2 s.
    assert a.first_token_seconds.median == 2.0 and a.decode_tokens_per_second.median == 5 / 2
    assert a.prompt_tokens_per_second is not None and a.prompt_tokens_per_second.median == 4 / 2
    assert a.tokens_per_second.median == 8 / 4 and a.usd_per_million_tokens == pytest.approx(0.002 / 2 * 1e6)
    assert a.token_ms is not None and a.token_ms.p99.median == pytest.approx(750.0)
    assert b.identity is not None and (b.identity.num_identical, b.identity.num_prompts) == (4, 4)
    # Rates of batches are another matter: over all sets are those of single sequences alone.
    assert [entry.decode_tokens_per_second.median for entry in standings.overall] == 3 * [3.0]
    assert standings.overall[0].prompt_tokens_per_second is not None
    assert standings.overall[0].prompt_tokens_per_second.median == 8 / (4 * 0.5)


def test_prompts_have_to_fill_batches() -> None:
    with pytest.raises(ValueError, match="a set has 2 prompts, which do not fill batches of 4: ask for a multiple"):
        run_race([], batch_sizes={"a set": 4})


def test_text_that_arrives_at_once_has_no_times_of_tokens() -> None:
    (found,) = run_race([Contestant("a", "a", lambda p, n: Sample([1] * n, [(1.0, n)], 1.0))]).overall
    assert found.token_ms is None and found.wait_ms is None
    assert found.decode_tokens_per_second.median == 0.0 and found.tokens_per_second.median == 4.0


def test_rounds_are_counted_once_a_prompt() -> None:
    def run(prompt: list[int], num_new_tokens: int) -> Sample:
        stats = GenerationStats(
            num_rounds=2 * prompt[0],
            num_round_tokens=6,
            drafted_by_position=[2, 2],
            accepted_by_position=[1, 0],
        )
        return Sample(counting(prompt, num_new_tokens), [(0.1, 1), (0.2, num_new_tokens - 1)], 0.2, rounds=stats)

    standings = run_race([Contestant("a", "a", run), Contestant("b", "b", runner([], "b", 1.0))])
    found, without = standings.overall
    assert found.acceptance_length == 12 / 6 and found.survival == (2 / 6, 0.0)
    assert without.acceptance_length is None
    assert {name: list(sets) for name, sets in standings.rounds.items()} == {"a": ["a set"]}
    assert len(standings.rounds["a"]["a set"]) == 2


def test_joules_are_those_between_two_readings() -> None:
    meter: Any = MadeUpMeter()
    (found,) = run_race([Contestant("a", "a", runner([], "a", 1.0))], energy=meter).overall
    assert found.joules_per_token is not None and found.joules_per_token.median == 2 / 8


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
        Contestant("a", "a", runner([], "a", 1.0)),
        Contestant("b", "b", runner([], "b", 1.0, differs_on_second), identical_to="a", identity_promised=promised),
        Contestant("c", "c", runner([], "c", 1.0), identical_to="a", identity_promised=True),
    ]
    with caplog.at_level(logging.ERROR):
        _, b, c = run_race(contestants).overall
    assert b.identity is not None and c.identity is not None
    assert (b.identity.num_identical, b.identity.num_prompts) == (1, 2)
    assert b.identity.first_difference == "prompt 2 differs from token 3 on"
    assert b.identity.is_broken is promised and not c.identity.is_broken
    assert ("b promised the tokens of a" in caplog.text) is promised
    _, b, _ = run_race(contestants, {"x": [[1]], "y": [[1], [2]]}).overall
    assert b.identity is not None and b.identity.first_difference == "y prompt 2 differs from token 3 on"
    assert (b.identity.num_identical, b.identity.num_prompts) == (2, 3)


def test_a_contestant_that_fails_is_reported_with_its_reason_and_the_others_go_on() -> None:
    calls = 0

    def fails_at_third_call(prompt: list[int], num_new_tokens: int) -> Sample:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("out of something\nand a stack")
        return runner([], "", 1.0)(prompt, num_new_tokens)

    def raises(prompt: list[int], num_new_tokens: int) -> Sample:
        raise NotImplementedError("not this model")

    contestants = [
        Contestant("early", "", raises),
        Contestant("late", "", fails_at_third_call),
        Contestant("short", "", runner([], "s", 1.0, lambda prompt, n: [1])),
        Contestant("good", "", runner([], "g", 1.0), identical_to="late"),
    ]
    standings = run_race(contestants)
    assert [entry.name for entry in standings.overall] == ["good"]
    assert standings.overall[0].decode_tokens_per_second.num_repeats == 2
    assert standings.overall[0].identity is None  # there is nothing left to compare with
    assert {entry.name: entry.reason for entry in standings.unavailable} == {
        "early": "NotImplementedError: not this model",
        "late": "RuntimeError: out of something",
        "short": "made 1 tokens of 4",
    }


def test_who_fails_on_one_set_keeps_the_others_and_its_finished_repeats() -> None:
    calls = 0

    def fails_late_on_long(prompt: list[int], num_new_tokens: int) -> Sample:
        nonlocal calls
        calls += len(prompt) > 1
        if len(prompt) > 1 and calls == 3:  # a warm-up, a repeat, and no more
            raise RuntimeError("out of memory")
        return runner([], "", 1.0)(prompt, num_new_tokens)

    contestants = [Contestant("a", "", fails_late_on_long), Contestant("b", "", runner([], "b", 1.0))]
    standings = run_race(contestants, {"short": [[1]], "long": [[2, 2]]}, num_repeats=3)
    repeats = {
        name: {entry.name: entry.tokens_per_second.num_repeats for entry in entries}
        for name, entries in standings.sets.items()
    }
    assert repeats == {"short": {"a": 3, "b": 3}, "long": {"a": 1, "b": 3}}
    assert {entry.name: entry.tokens_per_second.num_repeats for entry in standings.overall} == {"a": 1, "b": 3}
    assert [(entry.name, entry.reason) for entry in standings.unavailable] == [
        ("a", "long: RuntimeError: out of memory")
    ]


def test_who_wants_to_know_is_told_the_set_before_every_call() -> None:
    log: list[str] = []

    def enter_set(name: str) -> None:
        log.append(name)
        if name == "long":
            raise RuntimeError("no room for its cache")

    contestants = [Contestant("a", "", runner(log, "a", 1.0), enter_set=enter_set)]
    standings = run_race(contestants, {"short": [[1], [2]], "long": [[3, 3]]}, num_repeats=1)
    assert log == ["long", "short", "a1", "short", "a1", "short", "a2"]
    assert [one.reason for one in standings.unavailable] == ["long: RuntimeError: no room for its cache"]
    assert [len(entries) for entries in standings.sets.values()] == [1, 0]


def test_standings_are_handed_out_after_every_set_of_every_repeat() -> None:
    seen: list[Standings] = []
    contestants = [Contestant("a", "", runner([], "a", 1.0))]
    final = run_race(contestants, {"x": [[1]], "y": [[2]]}, on_standings=seen.append)
    assert [{name: len(entries) for name, entries in one.sets.items()} for one in seen] == [
        {"x": 1, "y": 0},
        *(3 * [{"x": 1, "y": 1}]),
    ]
    # Over all sets only what every set has: until then nothing, then as many repeats as are whole.
    assert [[entry.tokens_per_second.num_repeats for entry in one.overall] for one in seen] == [[], [1], [1], [2]]
    assert seen[-1] == final


def test_bad_input_is_refused_by_name() -> None:
    for sets, num_new_tokens, num_repeats, num_warmups in (
        ({}, 4, 1, 1),
        ({"a": []}, 4, 1, 1),
        (PROMPTS, 1, 1, 1),
        (PROMPTS, 4, 0, 1),
        (PROMPTS, 4, 1, 0),
    ):
        with pytest.raises(ValueError, match="a race needs a prompt in every set, 2 new tokens, 1 repeat"):
            race([], sets, num_new_tokens, num_repeats, num_warmups, progress=False)


def test_table_of_a_result(made_up_report: Report) -> None:
    timing = made_up_report.timing
    assert timing is not None
    rows = timing.rows()
    assert [row["contestant"] for row in rows] == ["engine", "engine + drafter", "transformers"]
    assert rows[0]["tokens/s"] == "400 (392-404)" and rows[1]["same text"] == "4 of 4"
    assert "J/token" not in rows[0] and "tau" not in rows[0]  # nobody has any
    text = timing.table()
    assert text.startswith("| contestant | tokens/s |") and text.count("| engine |") == 1
    assert "transformers + drafter: did not run: ValueError: made up" in text


def test_table_of_several_sets(made_up_report: Report) -> None:
    timing = made_up_report.timing
    assert timing is not None
    one = timing.contestants[0].model_copy(update={"joules_per_token": timing.contestants[0].first_token_seconds})
    sets = tuple(
        SetTiming(name=name, source="a file", num_prompt_tokens=(64,), contestants=(one,)) for name in ("mbpp", "long")
    )
    timing = timing.model_copy(update={"sets": sets, "energy": "counted by hand", "notes": ("long: shorter",)})
    assert timing.rows("mbpp")[0]["J/token"] == "0.012"
    text = timing.table()
    assert text.count("| engine |") == 3 and "mbpp:\n\n|" in text
    assert "energy: counted by hand" in text and "long: shorter" in text
    with pytest.raises(ValueError, match="no set 'x'; there are mbpp, long"):
        timing.rows("x")
