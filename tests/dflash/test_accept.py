"""The acceptance rule by table, and its tensor form against it."""

import pytest
import torch

from speedstack.dflash.accept import accept, leading_run, survival, walk_rounds


@pytest.mark.parametrize(
    ("drafts", "sampled", "accepted"),
    [
        pytest.param([4, 5, 6], [4, 5, 6, 7], 3, id="perfect, bonus token after the last draft"),
        pytest.param([4, 5, 6], [9, 5, 6, 7], 0, id="first differs, later agreements do not count"),
        pytest.param([4, 5, 6], [4, 9, 6, 7], 1, id="second differs"),
        pytest.param([4, 5, 6], [4, 5, 9, 7], 2, id="last differs"),
        pytest.param([], [7], 0, id="nothing drafted"),
    ],
)
def test_acceptance_table(drafts: list[int], sampled: list[int], accepted: int) -> None:
    asked: list[int] = []

    def sample(count: int) -> int:
        asked.append(count)
        return sampled[count]

    assert accept(drafts, sample) == sampled[: accepted + 1]
    # Nothing behind the first disagreement is sampled.
    assert asked == list(range(accepted + 1))


def test_leading_run_is_what_accept_accepts() -> None:
    correct = torch.rand(64, 5, generator=torch.Generator().manual_seed(0)) > 0.3
    counted = [len(accept([1] * 5, [*row, 0].__getitem__)) - 1 for row in correct.long().tolist()]
    assert leading_run(correct).tolist() == counted


@pytest.mark.parametrize(
    ("runs", "rounds"),
    [
        pytest.param([0, 0, 0], [1, 1, 1], id="nothing accepted"),
        pytest.param([2, 9, 9, 1, 9, 0], [3, 2, 1], id="anchors inside an accepted run are skipped"),
        pytest.param([2, 9, 9, 7, 9, 0], [3, 3], id="the end of the text ends a round"),
        pytest.param([], [], id="no anchor"),
    ],
)
def test_walk_rounds(runs, rounds):
    assert walk_rounds(runs) == rounds


def test_survival_is_of_all_rounds_and_adds_up():
    # With 3 proposals a round: the text ends in the second, after its second token.
    assert survival([[4, 2], [3, 1, 1]], 3) == [3 / 5, 2 / 5, 1 / 5]
    assert survival([[1, 1], []], 3) == [0.0, 0.0, 0.0]
    assert survival([], 2) == [0.0, 0.0]
    rounds = [walk_rounds([5, 0, 2, 1, 3, 3, 0, 4][: 3 + i]) for i in range(6)]
    committed = [tokens for sequence in rounds for tokens in sequence]
    assert 1 + sum(survival(rounds, 5)) == pytest.approx(sum(committed) / len(committed))
