"""Parameters, active parameters and expert bytes of a checkpoint, counted from its tensors, not its config."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from speedstack.eval.results.report import ExpertStorage, ModelSummary
from speedstack.quant.checkpoint import load_checkpoint
from speedstack.quant.checkpoint.config import build_skeleton, read_config
from speedstack.quant.checkpoint.files import weight_files
from speedstack.quant.formats import number_format
from speedstack.quant.ptq import ModuleGroup, weights_of

EXPERTS = ".experts."
BF16_BYTES = 2


def summarize_model(path: str | Path, name: str) -> ModelSummary:
    """The model in directory `path`; active parameters count a token's experts. Raises as `load_checkpoint`."""
    checkpoint = load_checkpoint(path)
    config = checkpoint.config
    sizes = {key: math.prod(tensor.shape) for key, tensor in checkpoint.tensors.items()}
    num_parameters = sum(sizes.values())
    num_expert_parameters = sum(size for key, size in sizes.items() if EXPERTS in key)
    num_active_parameters = None
    description = f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}"
    if num_expert_parameters:
        # `num_local_experts` is transformers' common name; families have several.
        num_experts, num_chosen = config.num_local_experts, config.num_experts_per_tok
        num_active_parameters = num_parameters - num_expert_parameters * (num_experts - num_chosen) // num_experts
        description += f", {num_experts} experts a layer of which {num_chosen} compute a token"
    return ModelSummary(
        name=name,
        architecture=(config.architectures or [config.model_type])[0],
        num_parameters=num_parameters,
        num_active_parameters=num_active_parameters,
        num_expert_parameters=num_expert_parameters,
        description=description,
    )


def expert_storage(path: str | Path) -> ExpertStorage:
    """Bytes of the routed experts in directory `path`, and in bfloat16.

    Raises ValueError without routed experts, and as `load_checkpoint`.
    """
    experts = [tensor for key, tensor in load_checkpoint(path).tensors.items() if EXPERTS in key]
    if not experts:
        raise ValueError(f"{path} holds no routed experts")
    return ExpertStorage(
        place="on disk",
        packed_bytes=sum(tensor.nbytes for tensor in experts),
        bf16_bytes=BF16_BYTES * sum(math.prod(tensor.shape) for tensor in experts),
    )


def directory_bytes(path: str | Path) -> dict[str, int]:
    """Bytes of every stored tensor in directory `path`, by name. Raises ValueError as `weight_files`."""
    sizes = {}
    for file in weight_files(path):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                sizes[name] = end - start
    return sizes


def bytes_per_weight(path: str | Path) -> float:
    """Bytes per routed-expert weight in directory `path`. Raises ValueError without any, and as `weight_files`."""
    skeleton = build_skeleton(read_config(Path(path))[0])
    num_weights = sum(tensor.numel() for name, tensor in skeleton.state_dict().items() if EXPERTS in name)
    if not num_weights:
        raise ValueError(f"{path} holds no routed experts")
    return sum(size for name, size in directory_bytes(path).items() if EXPERTS in name) / num_weights


def bytes_in_format(
    path: str | Path, format_name: str, modules: ModuleGroup | Sequence[ModuleGroup]
) -> tuple[int, int]:
    """Bytes of an unpacked model and of its routed experts with the weights of `modules` in a number format.

    Other weights stay as stored; weights of `modules` outside the experts are taken to have their dtype. Raises as
    `weights_of` and `bytes_per_weight`.
    """
    chosen = number_format(format_name)
    weights = weights_of(build_skeleton(read_config(Path(path))[0]), modules)
    stored = directory_bytes(path)
    num_bytes = bytes_per_weight(path)
    total = sum(stored.values())
    experts = sum(size for name, size in stored.items() if EXPERTS in name)
    for name, weight in weights.items():
        difference = chosen.num_bytes(tuple(weight.shape)) - round(weight.numel() * num_bytes)
        total += difference
        experts += difference if EXPERTS in name else 0
    return total, experts
