"""Acceptance is counted from what the engine did, and agrees with a hand count."""

import pytest

from speedstack.eval.speed.acceptance import acceptance_result, measure_acceptance, summarize
from speedstack.runtime import Engine, Generation, GenerationStats
from speedstack.runtime.rounds.speculation import DraftStrategy


def generation(rounds: list[int], block_size: int = 4) -> Generation:
    """A response whose rounds accepted the given numbers of drafts."""
    positions = range(1, block_size)
    stats = GenerationStats(
        num_rounds=len(rounds),
        num_round_tokens=sum(rounds) + len(rounds),
        num_rows=block_size * len(rounds),
        num_drafted=(block_size - 1) * len(rounds),
        drafted_by_position=[len(rounds) for _ in positions],
        accepted_by_position=[sum(count >= position for count in rounds) for position in positions],
    )
    return Generation(tokens=[], text="", finish_reason="length", stats=stats)


def test_pooled_and_mean_of_responses() -> None:
    found = summarize("set", [generation([3, 3, 0, 0]), generation([1])])
    assert (found.num_prompts, found.num_rounds, found.num_committed) == (2, 5, 12)
    assert found.acceptance_length == 12 / 5
    assert found.mean_of_responses == (10 / 4 + 2) / 2
    assert found.survival == (3 / 5, 2 / 5, 2 / 5)
    assert (found.rows_per_token, found.drafted_per_token) == (5 * 4 / 12, 5 * 3 / 12)
    # What the plot's caption says.
    assert 1 + sum(found.survival) == pytest.approx(found.acceptance_length)


def test_a_response_without_rounds_counts_in_no_rate() -> None:
    assert summarize("set", [generation([]), generation([1])]).mean_of_responses == 2.0
    with pytest.raises(ValueError, match="no decode round ran on set"):
        summarize("set", [generation([])])


def test_a_set_without_rounds_is_left_out_and_said() -> None:
    stats = {"short": [generation([]).stats], "long": [generation([2]).stats, generation([]).stats]}
    with pytest.warns(UserWarning, match="no decode round ran on short"):
        found = acceptance_result(stats, DraftStrategy(), 8)
    assert [entry.name for entry in found.sets] == ["long"] and found.overall.num_prompts == 3
    with pytest.raises(ValueError, match="no decode round ran on all prompts"):
        acceptance_result({"short": stats["short"]}, DraftStrategy(), 8)


def test_counts_of_a_real_drafter(drafting_engine: Engine) -> None:
    prompts: dict[str, list[str | list[int]]] = {"a": ["def f(x):", "import os"], "b": [[5, 6, 7]]}
    result = measure_acceptance(drafting_engine, prompts, max_new_tokens=20)
    assert result.block_size == 8 and len(result.overall.survival) == 7
    assert [entry.num_prompts for entry in result.sets] == [2, 1]
    # The prompt's pass makes the first token of each response, rounds the rest.
    assert result.overall.num_committed == 3 * 19
    assert result.overall.num_rounds == sum(entry.num_rounds for entry in result.sets)
    assert 1.0 <= result.overall.acceptance_length <= 8.0
    assert result == measure_acceptance(drafting_engine, prompts, max_new_tokens=20)


def test_a_strategy_is_measured_and_put_back(drafting_engine: Engine) -> None:
    before = drafting_engine.strategy
    prompts = {"a": [[5, 6, 7], [8, 9, 10, 11]]}
    found = measure_acceptance(drafting_engine, prompts, 10, strategy=DraftStrategy(5))
    assert drafting_engine.strategy == before
    assert found.strategy == {"num_drafts": 5, "noise": "none", "ngram_size": 3}
    assert found.overall.num_committed == 18
    # Every round verifies an anchor and five drafts, fewer where the text is about to end.
    assert found.overall.rows_per_token is not None and 2.0 < found.overall.rows_per_token <= 6.0
    assert found.overall.drafted_per_token == pytest.approx(
        found.overall.rows_per_token - found.overall.num_rounds / 18, abs=0.5
    )
    chain = measure_acceptance(drafting_engine, prompts, 10, strategy=DraftStrategy(2))
    assert len(chain.overall.survival) == 2 and chain.block_size == 3
    with pytest.raises(ValueError, match="the drafter's 7"):
        measure_acceptance(drafting_engine, prompts, 10, strategy=DraftStrategy(9))
    assert drafting_engine.strategy == before


def test_bad_input_is_refused_by_name(engine: Engine, drafting_engine: Engine) -> None:
    with pytest.raises(ValueError, match="acceptance needs a drafter"):
        measure_acceptance(engine, {"a": ["x"]})
    with pytest.raises(ValueError, match="at least one prompt"):
        measure_acceptance(drafting_engine, {"a": []})
    with pytest.raises(ValueError, match="use at least 2"):
        measure_acceptance(drafting_engine, {"a": ["x"]}, max_new_tokens=1)
