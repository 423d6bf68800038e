"""The acceptance rule by table, and its tensor form against it."""

import pytest
import torch

from speedstack.dflash.accept import count_accepted, leading_run, walk_rounds


@pytest.mark.parametrize(
    ("drafts", "sampled", "accepted"),
    [
        pytest.param([4, 5, 6], [4, 5, 6, 7], 3, id="perfect, bonus token after the last draft"),
        pytest.param([4, 5, 6], [9, 5, 6, 7], 0, id="first differs, later agreements do not count"),
        pytest.param([4, 5, 6], [4, 9, 6, 7], 1, id="second differs"),
        pytest.param([4, 5, 6], [4, 5, 9, 7], 2, id="last differs"),
        pytest.param([4, 5, 6], [4, 9], 1, id="sampling stopped at the difference"),
        pytest.param([], [7], 0, id="nothing drafted"),
    ],
)
def test_acceptance_table(drafts, sampled, accepted):
    assert count_accepted(drafts, sampled) == accepted


@pytest.mark.parametrize(
    ("drafts", "sampled"),
    [
        pytest.param([4], [4], id="bonus token missing"),
        pytest.param([4, 5], [4], id="stops while they agree"),
        pytest.param([4], [], id="nothing sampled"),
        pytest.param([], [], id="no draft, nothing sampled"),
        pytest.param([4], [4, 5, 6], id="one too many"),
    ],
)
def test_a_round_without_its_last_token_is_refused(drafts, sampled):
    with pytest.raises(ValueError, match=r"missing|at most"):
        count_accepted(drafts, sampled)


def test_leading_run_is_count_accepted():
    correct = torch.rand(64, 5, generator=torch.Generator().manual_seed(0)) > 0.3
    counted = [count_accepted([1] * 5, [*(int(c) for c in row), 1]) for row in correct.tolist()]
    assert leading_run(correct).tolist() == counted


@pytest.mark.parametrize(
    ("runs", "start", "rounds"),
    [
        pytest.param([0, 0, 0], 0, [1, 1, 1], id="nothing accepted"),
        pytest.param([2, 9, 9, 1, 9, 0], 0, [3, 2, 1], id="anchors inside an accepted run are skipped"),
        pytest.param([2, 9, 9, 1, 9, 0], 3, [2, 1], id="later start"),
        pytest.param([], 0, [], id="no anchor"),
    ],
)
def test_walk_rounds(runs, start, rounds):
    assert walk_rounds(runs, start) == rounds
