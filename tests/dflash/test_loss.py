"""The fused head and loss against plain autograd, and the weights against their formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

from speedstack.dflash.loss import block_loss, dpace_weights, offset_weights


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 3, 8, generator=generator, requires_grad=True)
    labels = torch.randint(0, 11, (5, 3), generator=generator)
    valid = torch.rand(5, 3, generator=generator) > 0.3
    head = torch.randn(11, 8, generator=generator)
    return hidden, labels, valid, head


def plain_loss(hidden, labels, valid, head, weight):
    nll = F.cross_entropy((hidden @ head.T).flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    weight = (weight(nll, valid) if callable(weight) else weight) * valid
    return (weight * nll).sum() / weight.sum()


@pytest.mark.parametrize("weighting", ["exponential", "dpace"])
@pytest.mark.parametrize("blocks_a_chunk", [1, 2, 5, 100])
def test_loss_and_gradient_equal_plain_autograd(weighting, blocks_a_chunk):
    hidden, labels, valid, head = problem()
    weight = offset_weights(3, 4.0) if weighting == "exponential" else dpace_weights
    expected = plain_loss(hidden, labels, valid, head, weight)
    (expected_gradient,) = torch.autograd.grad(expected, hidden)
    result = block_loss(hidden, labels, valid, head, 4.0, weighting, blocks_a_chunk)
    (gradient,) = torch.autograd.grad(3.0 * result.loss, hidden)
    # Same sums in another order: a few float32 roundings of numbers of order one.
    torch.testing.assert_close(result.loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, 3.0 * expected_gradient, rtol=1e-5, atol=1e-6)
    assert torch.equal(result.correct_AJ, ((hidden @ head.T).argmax(-1) == labels) & valid)


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
