"""How many threads a step gets, and what rounds cost, from times that the tests make up."""

import pytest

from speedstack.runtime.backends.cpu.speed import SMALL_STEP_ROWS, ThreadChoice, round_cost, thread_counts
from speedstack.runtime.rounds.draft_length import RoundCost


def decided(seconds: dict[int, float]) -> ThreadChoice:
    """A choice whose trials took this long by number of threads."""
    choice = ThreadChoice(max(seconds))
    for count in choice.trials():
        choice.record(1, seconds[count])
    return choice


def step(choice: ThreadChoice, seconds: dict[int, float], num_steps: int, num_rows: int = 1) -> list[int]:
    """Steps that take this long by number of threads; returns the numbers."""
    counts = []
    for _ in range(num_steps):
        counts.append(choice.next(num_rows))
        choice.record(num_rows, seconds[counts[-1]] * (1 + choice.row_cost * (num_rows - 1)))
    return counts


def test_powers_of_two_and_all_that_there_are_are_tried() -> None:
    assert [thread_counts(most) for most in (1, 2, 3, 4, 6, 16)] == [
        [1],
        [1, 2],
        [1, 2, 3],
        [1, 2, 4],
        [1, 2, 4, 6],
        [1, 2, 4, 8, 16],
    ]


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({1: 1.0, 2: 0.6}, 2),
        ({1: 1.0, 2: 0.97}, 1),  # hardly faster: not worth a thread
        ({1: 1.0, 2: 5.0}, 1),
        ({1: 1.0, 2: 0.6, 4: 0.35, 8: 0.34, 16: 0.9}, 4),
    ],
)
def test_the_fewest_threads_that_are_about_as_fast_as_any(seconds: dict[int, float], chosen: int) -> None:
    choice = decided(seconds)
    assert step(choice, seconds, 40) == [chosen] * 40


def test_numbers_are_tried_again_when_steps_change_much() -> None:
    idle, busy = {1: 1.0, 2: 0.6}, {1: 1.7, 2: 5.0}
    choice = decided(idle)
    assert set(step(choice, busy, 16)) == {2}
    tried = step(choice, busy, 6)
    assert sorted(tried) == [1, 1, 1, 2, 2, 2] and step(choice, busy, 30) == [1] * 30
    tried = step(choice, idle, 30)
    assert tried[:8] == [1] * 8 and step(choice, idle, 30) == [2] * 30


def test_steps_of_more_rows_are_compared_by_what_rows_cost() -> None:
    seconds = {1: 1.0, 2: 0.6}
    choice = decided(seconds)
    choice.row_cost = 0.3
    assert set(step(choice, seconds, 60, num_rows=SMALL_STEP_ROWS)) == {2}
    assert choice.next(SMALL_STEP_ROWS + 1) == 2


def test_one_thread_is_not_tried() -> None:
    choice = ThreadChoice(1)
    assert list(choice.trials()) == [] and choice.next(1) == 1
    choice.record(1, 1.0)
    assert choice.next(64) == 1


def test_cost_of_a_round_in_steps_of_one_row() -> None:
    found = round_cost(step=(2.0, 2.0 * (1 + 7 * 0.2)), draft=(2.0 * 0.53, 2.0 * (0.45 + 0.08 * 7)), num_drafts=7)
    assert vars(found) == pytest.approx({"draft": 0.45, "draft_token": 0.08, "row": 0.2})
    # A machine that is never twice the same measures no negative costs.
    assert round_cost((2.0, 1.9), (1.0, 0.5), 7) == RoundCost(0.5, 0.0, 0.0)
    assert vars(round_cost((1.0, 2.4), (), 0)) == pytest.approx({"draft": 0.0, "draft_token": 0.0, "row": 0.2})
