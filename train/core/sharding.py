"""Models whose parameters ZeRO-3 keeps in parts, one on every process.

The main process reads the whole model into host memory and hands it out tensor by tensor, so a device holds at most one
tensor besides its share, and the values are those a single process reads. transformers can load in parts, but with
another reader, for which some names, ties and dtypes differ.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from speedstack.quant.checkpoint import load_model
from speedstack.train.core.distributed import World


def is_sharded(parameter: torch.Tensor) -> bool:
    """Whether ZeRO-3 shards this parameter; its data then exist only during its module's forward and backward."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """Shape of the whole parameter, sharded or not."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, these parameters can be read whole. All processes must enter together."""
    sharded = [parameter for parameter in parameters if is_sharded(parameter)]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        yield


def whole_weight(linear: nn.Linear) -> torch.Tensor:
    """The whole weight of `linear`, differentiable, for a product outside its forward.

    A sharded weight exists only in its module's forward: it is read as the product with the identity, exact in float32.
    """
    if not is_sharded(linear.weight):
        return linear.weight
    with torch.autocast(linear.weight.device.type, enabled=False):
        product: torch.Tensor = linear(torch.eye(linear.in_features, device=linear.weight.device))
        return product.T


def load_for_stage(path: Path, dtype: torch.dtype, zero_stage: int, world: World) -> PreTrainedModel:
    """`load_model(path, dtype)` in eval mode, sharded under ZeRO-3; every value and dtype is the same.

    Raises ValueError as `load_model`, on all processes.
    """
    if zero_stage < 3:
        return load_model(path, dtype=dtype)
    import deepspeed

    loaded: list[PreTrainedModel] = []

    def load() -> tuple[PreTrainedModel, list[torch.Size]]:
        model = load_model(path, dtype=dtype)
        loaded.append(model)
        empty = {id(p): nn.Parameter(p.new_empty(0), p.requires_grad) for p in model.parameters()}
        return copy.deepcopy(model, empty), [parameter.shape for parameter in model.parameters()]

    model, shapes = world.on_main(load)
    if world.is_main:
        model = loaded[0]
    for parameter, shape in zip(model.parameters(), shapes, strict=True):
        if not world.is_main:
            parameter.data = parameter.new_empty(shape, device=world.device)
        # Broadcasts the main process's tensor and keeps a part. One at a time: each is freed before the next.
        deepspeed.zero.Init(module=nn.ParameterList([parameter]))
    return model


def shard_frozen(model: PreTrainedModel, world: World) -> Any:
    """Make a frozen sharded model gather its parameters as needed; returns DeepSpeed's engine.

    Keep the engine alive but call the model: it uses the caller's autocast, the engine would use its own.
    """
    import deepspeed

    config = {
        "train_batch_size": world.size,
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero_optimization(3),
        "steps_per_print": 2**31,
    }
    engine, *_ = deepspeed.initialize(model=model, config=config, dist_init_required=False)
    return engine


def zero_optimization(stage: int) -> dict[str, Any]:
    """DeepSpeed's section of that name, without leaf modules.

    DeepSpeed makes known Mixture-of-Experts blocks leaves, because processes may choose different experts. Here a
    layer's experts are one module with one grouped product, whatever is chosen. And a hook on a leaf's inputs reduces
    its gradients, before there are any where nothing below the leaf is trained.
    """
    return {"stage": stage, "leaf_module": {"classes": [], "names": [], "name_suffixes": []}}
