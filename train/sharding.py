"""Models whose parameters ZeRO-3 keeps in parts, one on every process.

A model that is trained, or that teaches, under ZeRO-3 is sharded from the moment its parameters exist: transformers
builds it under DeepSpeed's `zero.Init`, and the main process alone reads the weights and hands them out. So no process
ever holds more than one tensor besides its share, the main process the files' tensors in host memory besides.

Left out: sharding packed checkpoints, which transformers cannot load that way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from speedstack.quant.checkpoint import load_model
from speedstack.quant.checkpoint.config import BAD_FIELDS, read_config, reason_of
from speedstack.quant.checkpoint.files import WeightFiles, checkpoint_directory
from speedstack.quant.checkpoint.formats import Plain
from speedstack.quant.checkpoint.linears import check_unquantized
from speedstack.train.distributed import World


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
    """`load_model`, or under ZeRO-3 the same weights in parts. In eval mode; parameters have `dtype`.

    Raises ValueError as `load_model`, and under ZeRO-3 for a packed model.
    """
    if zero_stage < 3:
        return load_model(path, dtype=dtype)
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    path = checkpoint_directory(path)
    config, codec = read_config(path)
    if codec is not Plain:
        raise ValueError(
            f"{path} is in the format {codec.name}: ZeRO-3 shards unquantized models only. `speedstack convert {path} "
            "--to plain` writes one with the same values; or use distributed.zero_stage 2 or less"
        )
    # transformers' own errors for damaged files are not lines a user can act on.
    with WeightFiles(path) as files:
        check_unquantized(files)
        if not files.is_as_transformers_wants:
            raise ValueError(
                f"{path} cannot be read under ZeRO-3, where transformers reads it: its index lacks metadata, or shards "
                "hold copies of tensors that the index places elsewhere; download it again, or use "
                "distributed.zero_stage 2 or less"
            )
    # transformers looks for a living object of this class to know that it has to shard.
    marker = HfDeepSpeedConfig(_sharding_config(world))
    model_class: Any = AutoModelForCausalLM
    try:
        model, report = model_class.from_pretrained(
            path, config=config, dtype=torch.float32, experts_implementation="grouped_mm", output_loading_info=True
        )
    except BAD_FIELDS as error:
        raise ValueError(f"{path}: the weights do not fit the configuration: {reason_of(error)}") from error
    finally:
        unset_hf_deepspeed_config()
        del marker
    missing = sorted(set(report["missing_keys"]) - set(model._tied_weights_keys or {}))
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} tensors, such as {missing[0]}: is it a complete model?")
    for parameter in model.parameters():
        # Not by loading in `dtype`: that would round buffers too, which routers need in float32.
        parameter.data = parameter.data.to(dtype)
        parameter.ds_tensor.data = parameter.ds_tensor.data.to(dtype)
    return model.eval()


def shard_frozen(model: PreTrainedModel, world: World) -> Any:
    """Have a sharded model that is not trained gather its parameters as its modules need them.

    Returns DeepSpeed's engine, which has to live as long as the model is called. The model itself is what to call: it
    computes under the caller's autocast, the engine would under its own.
    """
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, config=_sharding_config(world), dist_init_required=False)
    return engine


def _sharding_config(world: World) -> dict[str, Any]:
    return {
        "train_batch_size": world.size,
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "steps_per_print": 2**31,
    }
