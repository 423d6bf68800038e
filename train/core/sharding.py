"""Models whose parameters ZeRO-3 keeps in parts, one on every process.

A model that is trained, or that teaches, under ZeRO-3 is read by the main process alone, into host memory, and handed
out tensor by tensor. So a device never holds more than one tensor besides its share, and the model is what one process
would have read: transformers has a way to load in parts too, with another reader, for which some names, ties and dtypes
come out different.

Left out: reading in parts. The main process has the whole model in host memory for the time of the loading.
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
    """Whether ZeRO-3 holds this parameter: its own data is then there during its module's forward and backward only."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """Shape of the whole parameter, sharded or not."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, these parameters are whole, to be read. All processes have to come here together."""
    sharded = [parameter for parameter in parameters if is_sharded(parameter)]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        yield


def whole_weight(linear: nn.Linear) -> torch.Tensor:
    """The weight of `linear` for a product outside of its forward, to be differentiated; whole if it is sharded.

    A sharded weight is there in its module's own forward alone: it comes out of that as the product with the identity,
    which is exact in float32.
    """
    if not is_sharded(linear.weight):
        return linear.weight
    with torch.autocast(linear.weight.device.type, enabled=False):
        product: torch.Tensor = linear(torch.eye(linear.in_features, device=linear.weight.device))
        return product.T


def load_for_stage(path: Path, dtype: torch.dtype, zero_stage: int, world: World) -> PreTrainedModel:
    """`load_model(path, dtype)`, under ZeRO-3 in parts: every parameter and buffer has the same value and dtype.

    In eval mode. Raises ValueError as `load_model`, on all processes.
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
        # Sends out what the main process has and keeps a part of it. One at a time: each is freed before the next.
        deepspeed.zero.Init(module=nn.ParameterList([parameter]))
    return model


def shard_frozen(model: PreTrainedModel, world: World) -> Any:
    """Have a sharded model that is not trained gather its parameters as its modules need them.

    Returns DeepSpeed's engine, which has to live as long as the model is called. The model itself is what to call: it
    computes under the caller's autocast, the engine would under its own.
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
    """DeepSpeed's section of that name.

    No module is a leaf. DeepSpeed makes the Mixture-of-Experts blocks of the families it knows leaves, so that
    processes whose tokens choose other experts gather the same parameters. Here the experts of a layer are one module
    with one grouped product, whatever is chosen; and the gradients of a leaf are reduced by a hook on its inputs, which
    runs before there are any where nothing below the leaf is trained.
    """
    return {"stage": stage, "leaf_module": {"classes": [], "names": [], "name_suffixes": []}}
