"""The trainer that fits a number of processes."""

from __future__ import annotations

from torch import nn

from speedstack.train.config.recipes import JobConfig
from speedstack.train.core.distributed import World
from speedstack.train.core.trainer import PlainTrainer, Trainer


def count_micro_batches(config: JobConfig, world: World) -> int:
    """Forward passes of one process in one optimizer step."""
    share = config.loop.batch_size // world.size
    return share // (config.loop.micro_batch_size or share)


def make_trainer(module: nn.Module, config: JobConfig, world: World) -> Trainer:
    """`PlainTrainer` for one process, `DeepSpeedTrainer` for several."""
    num_micro_batches = count_micro_batches(config, world)
    if world.size == 1:
        return PlainTrainer(module, config, num_micro_batches)
    from speedstack.train.core.deepspeed_trainer import DeepSpeedTrainer

    return DeepSpeedTrainer(module, config, world, num_micro_batches)
