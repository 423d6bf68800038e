"""Token divergences against their definitions, and their precision where it matters: near zero."""

import math

import torch

from speedstack.eval.quality.divergence import token_kl, token_nll, top1_matches


def test_divergence_equals_its_definition() -> None:
    teacher = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]).log()
    student = torch.tensor([[0.25, 0.25, 0.5], [0.1, 0.8, 0.1]]).log() + 3.0  # logits need not be normalized
    expected = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    kl = token_kl(teacher, student)
    assert math.isclose(kl[0].item(), expected, rel_tol=1e-6)  # float32 inputs
    assert kl[1].item() < 1e-15  # float64 rounding of the normalization
    # Not symmetric: it is the teacher that weighs.
    sharp = torch.tensor([[0.5, 0.5, 1e-6]]).log()
    flat = torch.zeros(1, 3)
    assert math.isclose(token_kl(sharp, flat).item(), math.log(3 / 2), rel_tol=1e-4)
    assert token_kl(flat, sharp).item() > 3.0
    assert torch.allclose(token_nll(student, torch.tensor([2, 0])), -torch.tensor([0.5, 0.1]).double().log())
    assert top1_matches(teacher, student).tolist() == [False, True]


def test_small_divergences_keep_their_digits() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(64, 4096, generator=generator)
    noise = 1e-3 * torch.randn(64, 4096, generator=generator)
    student = teacher + noise
    probabilities = torch.softmax(teacher.double(), -1)
    # Second-order expansion: half the variance of the logit difference under the teacher.
    difference = (student - teacher).double()
    mean = (probabilities * difference).sum(-1, keepdim=True)
    expected = 0.5 * (probabilities * (difference - mean).square()).sum(-1)
    # The third-order term is of relative size 1e-3; float32 would be off by more than the whole value.
    assert torch.allclose(token_kl(teacher, student), expected, rtol=5e-3)
    assert (token_kl(teacher, teacher) == 0).all()
