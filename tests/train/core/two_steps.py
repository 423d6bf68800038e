"""The first two optimizer steps of jobs, in one process or, as a script under torchrun, in several.

Starting processes is slow, so that one start serves many jobs. The second step sees what the first one did to the
weights. A job that saves after every step takes the second one in another trainer, from the checkpoint of the first.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any, cast

import torch

from speedstack.support.config import read_config
from speedstack.train.config.recipes import DrafterConfig, JobConfig, QatConfig
from speedstack.train.core.checkpoint import CheckpointStore
from speedstack.train.core.distributed import World, join_world
from speedstack.train.core.loop import Recipe, train_step
from speedstack.train.core.make_trainer import make_trainer
from speedstack.train.core.trainer import Trainer
from speedstack.train.drafter.job import make_recipe
from speedstack.train.qat.recipe import QatRecipe


def two_steps(config: JobConfig, world: World) -> list[dict[str, float]] | str:
    """Loss and gradient norm of each step; or the line with which a model is refused."""
    try:
        recipe, trainer = _started(config, world)
    except ValueError as error:
        return str(error)
    lines = [train_step(recipe, config, world, trainer, 0)]
    if config.loop.save_every == 1:
        store = CheckpointStore(config.run_directory, num_kept=1, world_size=world.size, config_hash="")
        trainer.save(store, 1, {}, {})
        store.wait()
        trainer.close()
        recipe, trainer = _started(config, world)
        trainer.load(store.path(1))
    lines.append(train_step(recipe, config, world, trainer, 1))
    trainer.close()
    return lines


def _started(config: JobConfig, world: World) -> tuple[Recipe, Trainer]:
    recipe: Any = (
        QatRecipe(config)
        if isinstance(config, QatConfig)
        else make_recipe(cast(DrafterConfig, config), show_progress=False)
    )
    torch.manual_seed(config.run.seed)
    module = recipe.build(world)
    recipe.set_training(module)
    return recipe, make_trainer(module, config, world)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for path in map(Path, sys.argv[1:]):
        config = read_config(QatConfig if path.name.startswith("qat") else DrafterConfig, path)
        with join_world(config) as world:
            lines = two_steps(config, world)
            path.with_suffix(f".{world.rank}.json").write_text(json.dumps(lines))
    sys.stderr.flush()
    # ZeRO-3 on CPUs can abort while the interpreter shuts down, after everything is done and on disk.
    os._exit(0)
