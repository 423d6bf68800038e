from collections.abc import Callable
from pathlib import Path
from threading import Event

import pytest
import torch
from torch import nn

from speedstack.train.config.recipes import PretrainConfig
from speedstack.train.core import trainer as trainer_module
from speedstack.train.core.checkpoint import CheckpointStore
from speedstack.train.core.trainer import PlainTrainer

MakeConfig = Callable[..., PretrainConfig]


class Net(nn.Module):
    """A trained matrix, a frozen one and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("bias", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(self.trained(x)) + self.bias


def make(config: PretrainConfig, seed: int = 0) -> PlainTrainer:
    torch.manual_seed(seed)
    return PlainTrainer(Net(), config, num_micro_batches=1)


def advance(trainer: PlainTrainer) -> None:
    trainer.backward(trainer.model(torch.ones(2, 4)).square().mean())
    trainer.step(1.0)


def state(trainer: PlainTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.module.state_dict().items()}


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_checkpoint_is_the_state_when_it_was_saved(
    make_pretrain_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    config = make_pretrain_config(tmp_path, optim__name=optimizer)
    trainer, release, save_tensors = make(config), Event(), trainer_module.save_tensors

    def late(tensors: dict[str, torch.Tensor], path: Path) -> None:
        assert release.wait(10)
        save_tensors(tensors, path)

    monkeypatch.setattr(trainer_module, "save_tensors", late)
    store = CheckpointStore(tmp_path / "checkpoints", num_kept=1, world_size=1, config_hash="a")
    advance(trainer)
    trainer.module.get_buffer("bias").add_(1.0)
    saved = state(trainer)
    trainer.save(store, 1, {}, {})
    # Training goes on while the files are not written yet.
    advance(trainer)
    trainer.module.get_buffer("bias").add_(1.0)
    expected = state(trainer)
    assert not torch.equal(saved["trained.weight"], expected["trained.weight"])
    release.set()
    store.wait()

    resumed = make(config)
    resumed.load(store.path(1))
    assert all(torch.equal(tensor, saved[name]) for name, tensor in state(resumed).items())
    advance(resumed)
    resumed.module.get_buffer("bias").add_(1.0)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state(resumed).items())


def test_a_gradient_that_is_not_finite_does_not_touch_the_masters(
    make_pretrain_config: MakeConfig, tmp_path: Path
) -> None:
    trainer = make(make_pretrain_config(tmp_path))
    before = state(trainer)
    trainer.backward(trainer.model(torch.full((2, 4), float("inf"))).mean())
    assert not torch.isfinite(torch.tensor(trainer.step(1.0)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(trainer).items())


def test_micro_batches_add_up_to_their_mean(make_pretrain_config: MakeConfig, tmp_path: Path) -> None:
    config = make_pretrain_config(tmp_path)
    whole = make(config)
    torch.manual_seed(0)
    split = PlainTrainer(Net(), config, num_micro_batches=2)
    x = torch.randn(4, 4)
    whole.backward(whole.model(x).square().mean())
    for part in x.split(2):
        split.backward(split.model(part).square().mean())
    gradient, summed = (trainer.module.get_parameter("trained.weight").grad for trainer in (whole, split))
    torch.testing.assert_close(summed, gradient)


def test_a_checkpoint_of_another_model_is_refused(make_pretrain_config: MakeConfig, tmp_path: Path) -> None:
    config = make_pretrain_config(tmp_path)
    store = CheckpointStore(tmp_path / "checkpoints", num_kept=1, world_size=1, config_hash="a")
    make(config).save(store, 1, {}, {})
    store.wait()
    other = PlainTrainer(nn.Linear(3, 3), config, num_micro_batches=1)
    with pytest.raises(ValueError, match="does not hold the tensors of this model"):
        other.load(store.path(1))
