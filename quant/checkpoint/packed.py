"""Writes a model directory with its routed experts as MXFP4, everything else as it is.

The format is compressed-tensors' `mxfp4-pack-quantized`, weights only: per expert projection `weight_packed`
uint8 [out, in / 2] and `weight_scale` uint8 [out, in / 32], under the names of the family's Hub checkpoints. Experts
are quantized one at a time and written in shards, so memory beyond the model stays at one shard.

A directory appears whole or not at all: it is written next to its place and renamed.
"""

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from speedstack.quant.checkpoint.files import CONFIG_FILE, INDEX_FILE, SINGLE_FILE
from speedstack.quant.checkpoint.names import HubNames, hub_names
from speedstack.quant.checkpoint.reader import PACKED_FORMAT, tied_names
from speedstack.quant.experts import expert_parameters, routed_experts
from speedstack.quant.mxfp4 import BLOCK_SIZE, DEFAULT_SCALE_RULE, ScaleRule, quantize

MAX_SHARD_BYTES = 5 * 10**9


def save_packed(
    model: PreTrainedModel,
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    scale_rule: ScaleRule = DEFAULT_SCALE_RULE,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `model`, and the tokenizer if given, as a packed Hugging Face directory at `path`.

    `scale_rule` must be the one the model was trained with. A model directory already at `path` is replaced.

    Raises ValueError for a model that is quantized already, has no routed experts, or is of a family the format cannot
    express; and for NaN or infinity in an expert. Raises OSError when `path` cannot be written, on a full disk for one.
    """
    path = Path(path).absolute()
    names = hub_names(model.config)
    if getattr(model, "is_quantized", False) or getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(
            f"{type(model).__name__} is quantized already: load it with load_model to get ordinary weights"
        )
    routed_experts(model)
    if path.exists() and not (path.is_dir() and ((path / CONFIG_FILE).is_file() or not any(path.iterdir()))):
        raise ValueError(f"{path} exists and is not a model directory: choose another path")
    partial = path.with_name(f".{path.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_weights(_hub_tensors(model, names, scale_rule), partial, max_shard_bytes)
        _write_config(model, names, partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        _rename_over(partial, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _hub_tensors(model: PreTrainedModel, names: HubNames, scale_rule: ScaleRule) -> Iterator[tuple[str, torch.Tensor]]:
    """Names on disk and CPU tensors, experts packed, in the order of the state dict."""
    experts = expert_parameters(model)
    tied = tied_names(model)
    for name, tensor in model.state_dict().items():
        if name in experts:
            yield from _packed_expert_tensors(names, name, tensor, scale_rule)
        elif name not in tied:
            yield names.of(name), tensor.cpu().contiguous()


def _packed_expert_tensors(
    names: HubNames, name: str, fused: torch.Tensor, scale_rule: ScaleRule
) -> Iterator[tuple[str, torch.Tensor]]:
    experts_name, _, weight_name = name.rpartition(".")
    for index, weight in enumerate(fused):
        parts = names.of_expert(experts_name, weight_name, index)
        for part, rows in zip(parts, weight.chunk(len(parts)), strict=True):
            try:
                packed = quantize(rows, scale_rule).to("cpu")
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            yield f"{part}.weight_packed", packed.codes
            yield f"{part}.weight_scale", packed.scales


def _write_weights(tensors: Iterator[tuple[str, torch.Tensor]], directory: Path, max_shard_bytes: int) -> None:
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    pending_bytes = total_bytes = 0

    def flush() -> None:
        nonlocal pending, pending_bytes
        save_file(pending, directory / f"{len(shards)}.shard", metadata={"format": "pt"})
        shards.append(list(pending))
        pending, pending_bytes = {}, 0

    for name, tensor in tensors:
        if pending and pending_bytes + tensor.nbytes > max_shard_bytes:
            flush()
        pending[name] = tensor
        pending_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    flush()
    if len(shards) == 1:
        (directory / "0.shard").rename(directory / SINGLE_FILE)
        return
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(shards):
        file_name = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"{index}.shard").rename(directory / file_name)
        weight_map |= dict.fromkeys(shard, file_name)
    index_fields = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX_FILE).write_text(json.dumps(index_fields, indent=2) + "\n", encoding="utf-8")


def _write_config(model: PreTrainedModel, names: HubNames, directory: Path) -> None:
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    config.quantization_config = quantization_config(model, names)
    config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)


def quantization_config(model: PreTrainedModel, names: HubNames) -> dict[str, Any]:
    """config.json's description of the format: all linear layers, except those listed, are 4-bit groups of 32."""
    return {
        "quant_method": "compressed-tensors",
        "format": PACKED_FORMAT,
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "ignore": [names.of(name) for name, module in model.named_modules() if _has_matrix(module)],
        "config_groups": {
            "group_0": {
                "format": PACKED_FORMAT,
                "targets": ["Linear"],
                "input_activations": None,
                "output_activations": None,
                "weights": {
                    "num_bits": 4,
                    "type": "float",
                    "strategy": "group",
                    "group_size": BLOCK_SIZE,
                    "symmetric": True,
                    "dynamic": False,
                    "scale_dtype": "torch.uint8",
                    "zp_dtype": None,
                    "actorder": None,
                    "block_structure": None,
                    "observer": "memoryless_minmax",
                    "observer_kwargs": {},
                },
            }
        },
    }


def _has_matrix(module: nn.Module) -> bool:
    """Linear layers and routers, which are linear layers in other loaders; fused experts have no `weight`."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 2 and not isinstance(module, nn.Embedding)


def _rename_over(source: Path, target: Path) -> None:
    """Rename a directory onto another one, of which a crash in between leaves a copy at `.<name>.old`."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    source.rename(target)
    shutil.rmtree(old, ignore_errors=True)
