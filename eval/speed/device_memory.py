"""What fits in a device's memory, counted from the very tensors that would be made, on the meta device.

Each contestant is a process with its own weights. A share is left for what is not counted: a CUDA context and compiled
kernels of each process, and memory that allocators hold in pieces.
"""

from dataclasses import replace
from typing import Any

import torch

from speedstack.runtime.backends.gpu.base import formats_of
from speedstack.runtime.backends.gpu.buffers import Memory
from speedstack.runtime.model.families.registry import spec_from_config
from speedstack.runtime.model.spec import ModelSpec
from speedstack.runtime.model.synthetic_weights import empty_weights
from speedstack.runtime.plan.step import build_plan

PROCESS_BYTES = 2 << 30
USABLE = 0.96
META = torch.device("meta")
TYPICAL_PROGRAMS = 132  # tiles, and with them padding, depend little on it


def backend_bytes(spec: ModelSpec, max_length: int, num_slots: int = 1) -> int:
    """A GPU backend's weights, packed experts, its own copies of some, key/value buffers and activations."""
    from speedstack.runtime.backends.gpu.bindings.layers import bind

    weights = empty_weights(spec, torch.bfloat16, META, is_packed=True)
    plan = build_plan(spec, formats_of(weights), TYPICAL_PROGRAMS, max_context=max_length)
    memory = Memory(plan, weights, num_slots, max_length)
    held = {id(tensor): tensor for tensor in [*memory.buffers.values(), *memory.caches]}
    for binding in bind(plan, weights, memory):
        held |= {id(tensor): tensor for tensor in binding.pointers}
    # Phases name weights that are not copied as well, and every weight is in the first sum.
    own = {id(tensor) for tensor in weight_tensors(weights)}
    copies = sum(tensor.nbytes for key, tensor in held.items() if key not in own)
    return sum(weights.nbytes_by_part().values()) + copies


def weight_tensors(owner: Any) -> list[torch.Tensor]:
    """Every tensor of a `ModelWeights` or a part of it, packed ones as their two."""
    if isinstance(owner, torch.Tensor):
        return [owner]
    if isinstance(owner, list):
        return [tensor for each in owner for tensor in weight_tensors(each)]
    if hasattr(owner, "__dataclass_fields__") and not isinstance(owner, ModelSpec):
        return [tensor for each in vars(owner).values() for tensor in weight_tensors(each)]
    return []


def peer_bytes(config: Any, max_length: int) -> int:
    """The same layers with bfloat16 experts and full-length key/value buffers, as transformers would hold them."""
    spec = spec_from_config(config)
    weights = empty_weights(spec, torch.bfloat16, META, is_packed=False)
    caches = sum(
        2 * max_length * layer.attention.num_kv_heads * (layer.attention.qk_head_dim + layer.attention.v_head_dim)
        for layer in spec.layers
    )
    return sum(weights.nbytes_by_part().values()) + caches


def layers_that_fit(spec: ModelSpec, max_length: int, num_processes: int, available: int) -> int:
    """How many of a model's first layers `num_processes` backends can each hold in `available` bytes of a device.

    Raises ValueError when not even one fits.
    """

    def fits(num_layers: int) -> bool:
        cut = replace(spec, layers=spec.layers[:num_layers])
        return num_processes * (backend_bytes(cut, max_length) + PROCESS_BYTES) <= USABLE * available

    if fits(spec.num_layers):
        return spec.num_layers
    if not fits(1):
        raise ValueError(f"not one layer of {spec.model_type} fits in {available / 2**30:.1f} GiB")
    low, high = 1, spec.num_layers - 1  # `low` fits, nothing above `high` does
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
