"""What a training loop does to a model: backward, step, save, load. On one device, in plain PyTorch.

`deepspeed_trainer.DeepSpeedTrainer` does the same over several processes; `loop.py` sees only the protocol. A
checkpoint holds trained parameters, buffers and optimizer state as safetensors; recipes rebuild frozen parameters.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from speedstack.train.config.recipes import JobConfig
from speedstack.train.core.checkpoint import CheckpointStore
from speedstack.train.core.optim import build_optimizer, set_learning_rate

MODEL_FILE, OPTIMIZER_FILE, RECIPE_FILE = "model.safetensors", "optimizer.safetensors", "recipe.safetensors"


class Trainer(Protocol):
    """`model` is called for a loss; `module` is the recipe's module itself."""

    model: nn.Module
    module: nn.Module

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradient of one micro-batch's mean loss, a scalar."""

    def step(self, learning_rate_factor: float) -> float:
        """Clip, update and clear the gradients; returns the gradient norm before clipping."""

    def save(self, store: CheckpointStore, step: int, state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Start saving a checkpoint; it is complete after `store.wait()`. Raises OSError.

        `state` is JSON; `tensors` must not change any more, and `load_recipe_tensors` reads them back.
        """

    def load(self, path: Path) -> None:
        """Restore the complete checkpoint at `path`. Raises ValueError if it does not fit the model."""

    @contextmanager
    def whole_parameters(self) -> Iterator[None]:
        """Inside, `module` is whole on the main process. Training is over afterwards."""

    def close(self) -> None:
        """Free what the processes share."""


class PlainTrainer:
    """The trainer of a single process."""

    def __init__(self, module: nn.Module, config: JobConfig, num_micro_batches: int) -> None:
        self.module = module
        self.model: nn.Module = module
        self.optimizer = build_optimizer(module, config.optim)
        self._trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._grad_clip = config.optim.grad_clip
        self._num_micro_batches = num_micro_batches

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self._num_micro_batches).backward()

    def step(self, learning_rate_factor: float) -> float:
        parameters = self._trained.values()
        limit = self._grad_clip or float("inf")
        grad_norm = nn.utils.clip_grad_norm_(parameters, limit, error_if_nonfinite=False).item()
        # A gradient that is not finite would destroy the masters; the loop raises on the norm instead.
        if grad_norm < float("inf"):
            set_learning_rate(self.optimizer, learning_rate_factor)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm

    def save(self, store: CheckpointStore, step: int, state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        store.wait()
        _check_disk(store.directory, 4 * sum(p.numel() for p in self._trained.values()))
        # Copies, because training overwrites the originals during the write.
        model = {name: _copy(tensor) for name, tensor in self._saved_tensors().items()}
        optimizer = {
            f"{name}.{key}": _copy(value)
            for name, parameter in self._trained.items()
            for key, value in self.optimizer.state[parameter].items()
        }

        def write(directory: Path) -> None:
            save_tensors(model, directory / MODEL_FILE)
            save_tensors(optimizer, directory / OPTIMIZER_FILE)
            save_recipe_tensors(tensors, directory)

        store.save(step, state, write)

    def load(self, path: Path) -> None:
        tensors = load_file(path / MODEL_FILE)
        expected = self._saved_tensors()
        if tensors.keys() != expected.keys() or any(tensors[name].shape != expected[name].shape for name in tensors):
            raise ValueError(f"{path / MODEL_FILE} does not hold the tensors of this model")
        self.module.load_state_dict(tensors, strict=False)
        for name, value in load_file(path / OPTIMIZER_FILE).items():
            parameter_name, _, key = name.rpartition(".")
            parameter = self._trained[parameter_name]
            self.optimizer.state[parameter][key] = value.to(parameter.device)

    @contextmanager
    def whole_parameters(self) -> Iterator[None]:
        yield

    def close(self) -> None:
        return None

    def _saved_tensors(self) -> dict[str, torch.Tensor]:
        frozen = {name for name, p in self.module.named_parameters(remove_duplicate=False) if not p.requires_grad}
        return {name: tensor for name, tensor in self.module.state_dict().items() if name not in frozen}


def save_recipe_tensors(tensors: dict[str, torch.Tensor], directory: Path) -> None:
    """Write the recipe's `state`, if there is any. Raises OSError."""
    if tensors:
        save_tensors(tensors, directory / RECIPE_FILE)


def load_recipe_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Tensors that `save_recipe_tensors` wrote, or {}."""
    return load_file(directory / RECIPE_FILE) if (directory / RECIPE_FILE).is_file() else {}


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file. Raises OSError, also for safetensors' own error."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _check_disk(directory: Path, num_bytes: int) -> None:
    """Raise OSError if `directory`, or its nearest existing parent, has less than `num_bytes` free."""
    place = next(parent for parent in (directory, *directory.parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise OSError(
            f"cannot save a checkpoint below {directory}: it needs over {num_bytes / 2**20:.0f} MiB and "
            f"{free / 2**20:.0f} MiB are free; make room, then run the same command again to resume"
        )
