"""One GPU's share of a model under tensor parallelism, as a spec."""

import math
from dataclasses import replace

from speedstack.runtime.model.spec import ModelSpec


def shard(spec: ModelSpec, num_gpus: int) -> ModelSpec:
    """The part of the model that one of `num_gpus` GPUs computes: heads, columns and vocabulary are divided.

    Key/value heads are repeated if there are fewer than GPUs. Experts keep whole MXFP4 blocks; this is the largest
    share. Raises ValueError if the heads cannot be divided.
    """
    layers = []
    for layer in spec.layers:
        a, mlp = layer.attention, layer.mlp
        if a.num_heads % num_gpus or max(a.num_kv_heads, num_gpus) % min(a.num_kv_heads, num_gpus):
            raise ValueError(
                f"{a.num_heads} heads with {a.num_kv_heads} key/value heads cannot be divided among {num_gpus} GPUs"
            )
        a = replace(a, num_heads=a.num_heads // num_gpus, num_kv_heads=max(1, a.num_kv_heads // num_gpus))
        blocks = math.ceil(math.ceil(mlp.intermediate_size / 32) / num_gpus)
        size = min(mlp.intermediate_size, 32 * blocks)
        layers.append(replace(layer, attention=a, mlp=replace(mlp, intermediate_size=size)))
    return replace(spec, vocab_size=math.ceil(spec.vocab_size / num_gpus), layers=tuple(layers))
