"""Reads a Hugging Face directory, packed or not, into transformers-native tensors with fused experts.

The configuration is the authority on what must be there: a meta-device model made from it lists every name and shape,
and each is looked up in the files. Nothing is dequantized; packed experts come back byte for byte.

Left out: weights quantized in other formats, and quantized layers that are not routed experts. Both are refused.
"""

import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from speedstack.quant.checkpoint.files import CONFIG_FILE, WeightFiles, checkpoint_directory, read_json
from speedstack.quant.checkpoint.names import HubNames, hub_names
from speedstack.quant.experts import routed_experts, weight_names
from speedstack.quant.mxfp4 import BLOCK_SIZE, MXFP4Tensor

PACKED_FORMAT = "mxfp4-pack-quantized"


@dataclass(frozen=True)
class Checkpoint:
    """A model directory in memory.

    config: without `quantization_config`, so that a model made of it is an ordinary one.
    tensors: by transformers' state-dict names. Routed experts are fused, `...mlp.experts.gate_up_proj` [E, 2I, H] (gate
        rows first) and `...down_proj` [E, H, I], as MXFP4Tensor when packed; the rest has the files' dtypes.
    """

    config: PreTrainedConfig
    tensors: dict[str, torch.Tensor | MXFP4Tensor]
    is_packed: bool


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a model directory: plain or `mxfp4-pack-quantized`, one file or shards. Tensors are on the CPU.

    Warns about tensors that the model does not have. Raises ValueError, of one line, for anything missing, corrupt or
    inconsistent, another quantization format, and a family that `names` does not list.
    """
    path = checkpoint_directory(path)
    config, is_packed = read_config(path)
    names = hub_names(config)
    skeleton = build_skeleton(config)
    tensors: dict[str, torch.Tensor | MXFP4Tensor] = {}
    with WeightFiles(path) as files:
        for experts_name, experts in routed_experts(skeleton).items():
            for weight_name in weight_names(experts):
                shape = tuple(getattr(experts, weight_name).shape)
                read = _read_packed_experts if is_packed else _read_experts
                tensors[f"{experts_name}.{weight_name}"] = read(files, names, experts_name, weight_name, shape)
        tied = tied_names(skeleton)
        for name, expected in skeleton.state_dict().items():
            if name not in tensors and name not in tied:
                tensors[name] = files.get(names.of(name), tuple(expected.shape))
        for name, source in tied.items():
            files.used.add(names.of(name))
            tensors[name] = tensors[source]
        _check_unused(files, skeleton)
    return Checkpoint(config, tensors, is_packed)


def read_config(path: Path) -> tuple[PreTrainedConfig, bool]:
    """The configuration without `quantization_config`, and whether the experts are packed. Raises ValueError."""
    fields = read_json(path / CONFIG_FILE)
    model_type = fields.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"{path / CONFIG_FILE}: transformers knows no model_type {model_type!r}")
    try:
        config = AutoConfig.from_pretrained(path)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path / CONFIG_FILE} is not a valid {model_type} configuration: {reason}") from error
    is_packed = _is_packed(path, fields.get("quantization_config"))
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config, is_packed


def build_skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The causal language model of a configuration, without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """State-dict names that are another tensor and not stored, each with the name it is stored under."""
    return dict(model._tied_weights_keys or {}) if model.config.tie_word_embeddings else {}


def _is_packed(path: Path, quantization: dict | None) -> bool:
    if quantization is None:
        return False
    method, layout = quantization.get("quant_method"), quantization.get("format")
    if method != "compressed-tensors" or layout != PACKED_FORMAT:
        found = " ".join(str(part) for part in (method, layout) if part)
        raise ValueError(
            f"{path} is quantized as {found or 'unknown'}: only unquantized weights and compressed-tensors "
            f"{PACKED_FORMAT} can be read"
        )
    if any(group.get("input_activations") for group in quantization.get("config_groups", {}).values()):
        warnings.warn(f"{path} asks for quantized activations, which are left as they are", stacklevel=3)
    return True


def _read_experts(
    files: WeightFiles, names: HubNames, experts_name: str, weight_name: str, shape: tuple[int, ...]
) -> torch.Tensor:
    num_experts, num_rows, num_columns = shape
    fused = None
    for index in range(num_experts):
        parts = names.of_expert(experts_name, weight_name, index)
        tensors = [files.get(f"{part}.weight", (num_rows // len(parts), num_columns)) for part in parts]
        if fused is None:
            fused = torch.empty(shape, dtype=tensors[0].dtype)
        torch.cat(tensors, out=fused[index])
    assert fused is not None
    return fused


def _read_packed_experts(
    files: WeightFiles, names: HubNames, experts_name: str, weight_name: str, shape: tuple[int, ...]
) -> MXFP4Tensor:
    num_experts, num_rows, num_columns = shape
    codes = torch.empty((num_experts, num_rows, num_columns // 2), dtype=torch.uint8)
    scales = torch.empty((num_experts, num_rows, num_columns // BLOCK_SIZE), dtype=torch.uint8)
    for index in range(num_experts):
        parts = names.of_expert(experts_name, weight_name, index)
        for fused, suffix in ((codes, "weight_packed"), (scales, "weight_scale")):
            part_shape = (num_rows // len(parts), fused.shape[-1])
            tensors = [files.get(f"{part}.{suffix}", part_shape) for part in parts]
            for part, tensor in zip(parts, tensors, strict=True):
                if tensor.dtype not in (torch.uint8, torch.float8_e8m0fnu):
                    raise ValueError(f"{files.path}: {part}.{suffix} is {tensor.dtype}, not the bytes of MXFP4")
            torch.cat([tensor.view(torch.uint8) for tensor in tensors], out=fused[index])
    return MXFP4Tensor(codes, scales)


def _check_unused(files: WeightFiles, skeleton: PreTrainedModel) -> None:
    ignored = [re.compile(pattern) for pattern in skeleton._keys_to_ignore_on_load_unexpected or ()]
    names = [name for name in files.unused() if not any(pattern.search(name) for pattern in ignored)]
    for name in names:
        if name.endswith("_packed"):
            raise ValueError(f"{files.path}: {name} is quantized and no routed expert; only those can be read packed")
    if names:
        warnings.warn(
            f"{files.path} has {len(names)} tensors that {type(skeleton).__name__} does not have, such as {names[0]}",
            stacklevel=3,
        )
