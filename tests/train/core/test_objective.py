"""The losses whose gradient is made in the forward, against PyTorch's own."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from speedstack.train.core import objective
from speedstack.train.core.objective import forward_kl, next_token_cross_entropy

NUM_WINDOWS, NUM_TOKENS, VOCAB_SIZE = 3, 7, 19


@pytest.fixture(params=[1, 4 * VOCAB_SIZE, 10**6], ids=["row by row", "uneven parts", "at once"])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "_MAX_PART_ELEMENTS", {"cpu": request.param})


def make_logits(seed: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(NUM_WINDOWS, NUM_TOKENS, VOCAB_SIZE, generator=generator)).to(dtype)


def make_ids() -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (NUM_WINDOWS, NUM_TOKENS), generator=torch.Generator().manual_seed(2))


def value_and_gradient(
    loss: Callable[[torch.Tensor], torch.Tensor], logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = logits.clone().requires_grad_(True)
    value = loss(logits)
    (value / 4).backward()  # as with micro-batches: the gradient is not that of the loss alone
    assert logits.grad is not None and logits.grad.dtype == logits.dtype
    return value.detach(), logits.grad


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_is_that_of_torch(dtype: torch.dtype) -> None:
    ids = make_ids()

    def reference(logits: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())

    logits = make_logits(0, dtype)
    expected, ours = (
        value_and_gradient(reference, logits),
        value_and_gradient(lambda logits: next_token_cross_entropy(logits, ids), logits),
    )
    torch.testing.assert_close(ours, expected)
    assert ours[0].dtype == torch.float32
    assert not ours[1][:, -1].any(), "the last position of a window predicts nothing"


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_kl_is_that_of_torch(dtype: torch.dtype) -> None:
    teacher = make_logits(1, dtype).requires_grad_(True)

    def reference(student: torch.Tensor) -> torch.Tensor:
        log_p, log_q = (x.float().flatten(0, 1).log_softmax(-1) for x in (teacher.detach(), student))
        return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    student = make_logits(0, dtype)
    expected = value_and_gradient(reference, student)
    torch.testing.assert_close(value_and_gradient(lambda student: forward_kl(teacher, student), student), expected)
    assert teacher.grad is None


@pytest.mark.usefixtures("parts")
def test_no_gradient_is_made_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student, ids = make_logits(0, torch.float32), make_logits(1, torch.float32), make_ids()
    expected = forward_kl(teacher, student), next_token_cross_entropy(student, ids)
    monkeypatch.setattr(torch, "empty_like", None)
    assert (forward_kl(teacher, student), next_token_cross_entropy(student, ids)) == expected
    with pytest.raises(TypeError, match="not callable"):
        forward_kl(teacher, student.requires_grad_(True))
