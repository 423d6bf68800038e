"""Proposals of a drafted block: the most probable chain, by the logits that training sees.

Legend: K proposal slots, D hidden, U draft vocabulary, V vocabulary.
"""

from dataclasses import replace

import pytest
import torch

from speedstack.dflash.config import DFlashConfig
from speedstack.dflash.model import DFlashDraftModel
from speedstack.dflash.propose import Draft, propose


@pytest.fixture
def hidden_KD() -> torch.Tensor:
    return torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def head_VD() -> torch.Tensor:
    return torch.randn(128, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def markov_drafter(draft_config: DFlashConfig) -> DFlashDraftModel:
    """With a Markov head that has a say, and every third token of the vocabulary."""
    model = DFlashDraftModel(replace(draft_config, markov_rank=6, draft_vocab_size=40)).eval().requires_grad_(False)
    model.init_weights(seed=0)
    assert model.markov_head is not None
    generator = torch.Generator().manual_seed(3)
    for matrix in (model.markov_head.markov_w1, model.markov_head.markov_w2):
        matrix.weight.normal_(0.0, 2.0, generator=generator)
    model.set_draft_vocab(torch.arange(0, 120, 3))
    return model


def test_proposals_are_the_most_probable_tokens(
    drafter: DFlashDraftModel, hidden_KD: torch.Tensor, head_VD: torch.Tensor
) -> None:
    expected_KV = drafter.logits(hidden_KD, None, head_VD).softmax(-1)
    draft = propose(drafter, hidden_KD, head_VD, anchor=9)
    assert draft.tokens == expected_KV.argmax(-1).tolist()
    # float32: the exponential of a logarithm
    assert draft.probabilities == pytest.approx(expected_KV.amax(-1).tolist(), rel=1e-5)


def test_with_a_markov_head_each_token_follows_the_one_before(
    markov_drafter: DFlashDraftModel, hidden_KD: torch.Tensor, head_VD: torch.Tensor
) -> None:
    hidden_KD, chains = hidden_KD / 10, []  # so that the token before matters more
    for anchor in (5, 77):
        draft = propose(markov_drafter, hidden_KD, markov_drafter.draft_head(head_VD), anchor)
        assert all(token % 3 == 0 for token in draft.tokens) and len(draft.tokens) == 3
        # Teacher-forced on its own tokens, the training logits propose the very chain that was drafted left to right.
        previous_K = torch.tensor([anchor, *draft.tokens[:-1]])
        expected_KU = markov_drafter.logits(hidden_KD, previous_K, head_VD).softmax(-1)
        assert markov_drafter.target_ids(expected_KU.argmax(-1)).tolist() == draft.tokens
        # float32: one row of a product sums in another order than three rows do
        assert draft.probabilities == pytest.approx(expected_KU.amax(-1).tolist(), rel=1e-5)
        chains.append(draft.tokens)
    assert chains[0] != chains[1]


def test_proposals_are_taken_from_what_adjust_makes_of_logits(
    drafter: DFlashDraftModel, hidden_KD: torch.Tensor, head_VD: torch.Tensor
) -> None:
    def only(logits_U: torch.Tensor, slot: int) -> torch.Tensor:
        """Of each slot two tokens, which differ from slot to slot."""
        return torch.full_like(logits_U, -float("inf")).index_copy(0, torch.tensor([slot, 90 + slot]), torch.zeros(2))

    draft = propose(drafter, hidden_KD, head_VD, 9, only)
    assert draft.tokens == [0, 1, 2] and draft.probabilities == pytest.approx([0.5] * 3, rel=1e-6)


@pytest.mark.parametrize("num_right", [0, 1, 2])
def test_logits_that_are_nan_end_the_proposals(
    num_right: int, drafter: DFlashDraftModel, hidden_KD: torch.Tensor, head_VD: torch.Tensor
) -> None:
    whole = propose(drafter, hidden_KD, head_VD, 9)
    hidden_KD[num_right, 7] = float("nan")
    assert propose(drafter, hidden_KD, head_VD, 9) == whole.leading(num_right)


def test_leading_proposals() -> None:
    draft = Draft([4, 5, 6], [0.9, 0.8, 0.7])
    assert draft.leading(0) == Draft([]) and draft.leading(3) == draft == draft.leading(9)
    assert draft.leading(2) == Draft([4, 5], [0.9, 0.8])
    assert Draft([4, 5, 6]).leading(1) == Draft([4])
