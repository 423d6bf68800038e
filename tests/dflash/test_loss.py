"""The fused head and loss against plain autograd, and the weights against their formulas."""

import math

import pytest
import torch

from speedstack.dflash.loss import ABSENT, Objective, block_loss, dpace_weights, offset_weights


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 3, 8, generator=generator, requires_grad=True)
    labels = torch.randint(0, 11, (5, 3), generator=generator)
    valid = torch.rand(5, 3, generator=generator) > 0.3
    head = torch.randn(11, 8, generator=generator)
    return hidden, labels, valid, head


def options(is_soft: bool, has_markov: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    given = {}
    if is_soft:
        given["target_hidden_AJD"] = torch.randn(5, 3, 8, generator=generator)
    if has_markov:
        given["markov_AJR"] = torch.randn(5, 3, 4, generator=generator, requires_grad=True)
        given["markov_VR"] = torch.randn(11, 4, generator=generator, requires_grad=True)
    return given


def plain_loss(hidden, labels, valid, head, weighting, objective=Objective(), given=None):  # noqa: B008 (frozen)
    """All logits at once, the definitions of the distances, and autograd."""
    given = given or {}
    logits = hidden @ head.T
    if "markov_AJR" in given:
        logits = logits + given["markov_AJR"] @ given["markov_VR"].T
    log_q = logits.log_softmax(-1)
    present = labels != ABSENT
    nll = -log_q.gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    distance = objective.ce * nll
    if objective.is_soft:
        p = (given["target_hidden_AJD"] @ head.T).softmax(-1)
        distance = distance + objective.kl * (p * (p.log() - log_q)).sum(-1)
        distance = distance + objective.tv * 0.5 * (p - log_q.exp()).abs().sum(-1)
    counted = valid & present
    if weighting == "dpace":
        weight = dpace_weights(nll.masked_fill(~present, torch.inf), counted)
    else:
        weight = offset_weights(3, 4.0)
    weight = weight * counted
    return (weight * distance).sum() / weight.sum()


OBJECTIVES = [
    Objective(),
    Objective(ce=0.0, kl=1.0),
    Objective(ce=0.0, tv=1.0),
    Objective(ce=0.1, tv=0.9),
    Objective(ce=0.3, kl=0.5, tv=2.0),
]


@pytest.mark.parametrize("weighting", ["exponential", "dpace"])
@pytest.mark.parametrize("blocks_a_chunk", [1, 2, 100, None])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("has_markov", [False, True])
def test_loss_and_gradients_equal_plain_autograd(weighting, blocks_a_chunk, objective, has_markov):
    hidden, labels, valid, head = problem()
    labels[1, 0], labels[3, 2] = ABSENT, ABSENT
    valid[1, 0] = True
    given = options(objective.is_soft, has_markov)
    trained = [hidden, *(tensor for tensor in given.values() if tensor.requires_grad)]
    expected = plain_loss(hidden, labels, valid, head, weighting, objective, given)
    expected_gradients = torch.autograd.grad(expected, trained)
    result = block_loss(hidden, labels, valid, head, 4.0, weighting, objective, blocks_a_chunk=blocks_a_chunk, **given)
    gradients = torch.autograd.grad(3.0 * result.loss, trained)
    # Same sums in another order: a few float32 roundings of numbers of order one.
    torch.testing.assert_close(result.loss, expected, rtol=1e-5, atol=1e-6)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, 3.0 * expected_gradient, rtol=1e-4, atol=1e-6)
    logits = hidden @ head.T
    if has_markov:
        logits = logits + given["markov_AJR"] @ given["markov_VR"].T
    assert torch.equal(result.correct_AJ, (logits.argmax(-1) == labels) & valid)


def test_tokens_that_the_draft_vocabulary_lacks_are_wrong_and_weigh_nothing():
    hidden, labels, _, head = problem()
    everything = torch.ones_like(labels, dtype=torch.bool)
    labels[:, 1] = ABSENT
    result = block_loss(hidden, labels, everything, head)
    assert not result.correct_AJ[:, 1].any()
    assert result.nll_AJ[:, 1].isinf().all() and result.nll_AJ[:, [0, 2]].isfinite().all()
    result.loss.backward()
    assert hidden.grad is not None
    assert torch.equal(hidden.grad.abs().sum(-1) > 0, labels != ABSENT)


def test_the_target_itself_has_no_divergence():
    hidden, labels, valid, head = problem()
    for objective in (Objective(ce=0.0, kl=1.0), Objective(ce=0.0, tv=1.0)):
        result = block_loss(hidden, labels, valid, head, objective=objective, target_hidden_AJD=hidden.detach().clone())
        assert abs(result.loss.item()) < 1e-6


def test_what_is_missing_is_named():
    hidden, labels, valid, head = problem()
    with pytest.raises(ValueError, match="final hidden states"):
        block_loss(hidden, labels, valid, head, objective=Objective(kl=1.0))
    with pytest.raises(ValueError, match="two tables"):
        block_loss(hidden, labels, valid, head, markov_AJR=torch.zeros(5, 3, 4))
    for weights in ({"ce": -1.0}, {"ce": 0.0}):
        with pytest.raises(ValueError, match="one above 0"):
            Objective(**weights)


def test_positions_that_do_not_count_have_no_gradient():
    hidden, labels, valid, head = problem()
    block_loss(hidden, labels, valid, head).loss.backward()
    assert hidden.grad is not None
    assert torch.equal(hidden.grad.abs().sum(-1) > 0, valid)


def test_no_valid_position_is_zero_loss_and_zero_gradient():
    hidden, labels, valid, head = problem()
    loss = block_loss(hidden, labels, torch.zeros_like(valid), head).loss
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None and hidden.grad.abs().max().item() == 0.0


def test_exponential_weights():
    assert offset_weights(3, 4.0).tolist() == pytest.approx([1.0, math.exp(-0.25), math.exp(-0.5)])
    with pytest.raises(ValueError, match="gamma must be positive"):
        offset_weights(3, 0.0)


def test_dpace_weights_written_out():
    q = [0.9, 0.2, 0.6]
    smoothed = [0.5 * p + 0.5 for p in q]
    runs = [smoothed[0], smoothed[0] * smoothed[1], smoothed[0] * smoothed[1] * smoothed[2]]
    expected = [sum(runs), sum(runs[1:]), runs[2]]
    everything = torch.ones(1, 3, dtype=torch.bool)
    assert dpace_weights(-torch.tensor([q]).log(), everything)[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("weighting", ["exponential", "dpace"])
def test_labels_that_do_not_count_change_nothing(weighting):
    hidden, labels, _, head = problem()
    valid = torch.tensor([[True, True, False]] * 5)
    other = labels.clone()
    other[:, 2] = (labels[:, 2] + 1) % 11
    first, second = (block_loss(hidden, ids, valid, head, weighting=weighting).loss for ids in (labels, other))
    assert torch.equal(first, second)


def test_unknown_weighting_is_refused():
    hidden, labels, valid, head = problem()
    with pytest.raises(ValueError, match="weighting must be"):
        block_loss(hidden, labels, valid, head, weighting="linear")  # type: ignore[arg-type]
