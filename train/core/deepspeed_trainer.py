"""The trainer of several processes: DeepSpeed with ZeRO stage 0 to 3, under the same loop as a single process.

DeepSpeed gets float32 parameters, our optimizer and torch autocast, so a stage changes where tensors live and not what
is computed. Its checkpoints are pickles: they are read only from the run's own directory, after every file's SHA-256
has been checked, and only by as many processes as wrote them. Saving does not overlap with training.

Left out: parameter offload, tensor and expert parallelism. A recipe that loads its model without `sharding.py` holds
it whole on every process before ZeRO shards it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn

from speedstack.train.config.recipes import JobConfig
from speedstack.train.core.checkpoint import CheckpointStore
from speedstack.train.core.distributed import World
from speedstack.train.core.optim import build_optimizer, set_learning_rate
from speedstack.train.core.precision import resolve_precision
from speedstack.train.core.sharding import gathered, zero_optimization
from speedstack.train.core.trainer import save_recipe_tensors

_TAG = "deepspeed"


class DeepSpeedTrainer:
    """The trainer of one process among several; `Trainer` documents its methods."""

    def __init__(self, module: nn.Module, config: JobConfig, world: World, num_micro_batches: int) -> None:
        self.module = module
        self._world = world
        self._stage = config.distributed.zero_stage
        self._base_optimizer = build_optimizer(module, config.optim)
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=self._base_optimizer,
            config=engine_config(config, world, num_micro_batches),
            dist_init_required=False,
        )
        self.model: nn.Module = self._engine

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss)
        # DeepSpeed counts micro-batches by calls of step; `step` below makes the last call, the update.
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def step(self, learning_rate_factor: float) -> float:
        set_learning_rate(self._base_optimizer, learning_rate_factor)
        # Without ZeRO, DeepSpeed clips by the norm but does not keep it. Gradients are already means over processes.
        grad_norm = None
        if self._stage == 0:
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            grad_norm = nn.utils.get_total_norm(gradients)
        self._engine.step()
        if grad_norm is None:
            grad_norm = self._engine.get_global_grad_norm()
        assert grad_norm is not None
        return float(grad_norm)

    def save(self, store: CheckpointStore, step: int, state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        path = self._world.on_main(lambda: store.prepare(step))
        self._engine.save_checkpoint(str(path), tag=_TAG, save_latest=False)
        self._world.on_main(lambda: save_recipe_tensors(tensors, path))
        self._world.barrier()
        self._world.on_main(lambda: store.complete(step, state))

    def load(self, path: Path) -> None:
        loaded, _ = self._engine.load_checkpoint(str(path), tag=_TAG)
        if loaded is None:
            raise ValueError(f"{path} holds no DeepSpeed checkpoint")

    @contextmanager
    def whole_parameters(self) -> Iterator[None]:
        if self._stage < 3:
            yield
            return
        # One at a time, and into host memory: a device that needs ZeRO-3 cannot hold them all.
        whole = {}
        for parameter in self.module.parameters():
            with gathered([parameter]):
                if self._world.is_main:
                    whole[parameter] = parameter.detach().to("cpu", copy=True)
        for parameter, tensor in whole.items():
            parameter.data = tensor
        yield

    def close(self) -> None:
        self._world.barrier()
        self._engine.destroy()


def engine_config(config: JobConfig, world: World, num_micro_batches: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a job."""
    return {
        "train_batch_size": config.loop.batch_size,
        "train_micro_batch_size_per_gpu": config.loop.batch_size // (world.size * num_micro_batches),
        "gradient_accumulation_steps": num_micro_batches,
        "gradient_clipping": config.optim.grad_clip,
        "zero_optimization": zero_optimization(config.distributed.zero_stage),
        # DeepSpeed calls every optimizer but its own untested, torch.optim.AdamW included.
        "zero_allow_untested_optimizer": True,
        # An empty list of modules keeps the exchange of gradients in float32.
        "torch_autocast": {
            "enabled": resolve_precision(config.run.precision, world.device) == torch.bfloat16,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "steps_per_print": 2**31,
    }
