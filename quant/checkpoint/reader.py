"""Reads a Hugging Face directory of any of our formats into transformers-named tensors with fused experts.

The config decides: a meta-device model lists every name and shape, which are looked up in the files. Packed experts
stay packed, byte for byte.

Refused: other quantization formats, and quantized layers other than routed experts and the format's FP8 linears.
"""

import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from speedstack.quant.checkpoint.config import build_skeleton, read_config, tied_names
from speedstack.quant.checkpoint.files import CONFIG_FILE, WeightFiles, checkpoint_directory
from speedstack.quant.checkpoint.formats import Codec, ExpertWeight, check_family
from speedstack.quant.checkpoint.linears import read_linear
from speedstack.quant.checkpoint.names import HubNames, hub_names
from speedstack.quant.experts import contraction_last, routed_experts, weight_names
from speedstack.quant.fp8 import FP8Tensor
from speedstack.quant.mxfp4 import BLOCK_SIZE, MXFP4Tensor


@dataclass(frozen=True)
class Checkpoint:
    """A model directory in memory.

    config: without quantization, so it builds an ordinary model.
    tensors: by state-dict name. Experts are fused: unquantized in transformers' layout, packed as MXFP4Tensor,
    contraction axis last: `...mlp.experts.gate_up_proj` [E, 2I, H] (gate rows first; interleaved for gpt-oss) and
    `...down_proj` [E, H, I]. FP8 linears come in bfloat16, the rest in the files' dtypes.
    fp8: the FP8 linears by the same names, if kept.
    """

    config: PreTrainedConfig
    tensors: dict[str, torch.Tensor | MXFP4Tensor]
    is_packed: bool
    fp8: dict[str, FP8Tensor] = field(default_factory=dict)


def load_checkpoint(path: str | Path, keep_fp8: bool = False) -> Checkpoint:
    """Reads a model directory of any format onto the CPU. keep_fp8: do not dequantize FP8 linear layers.

    Warns about tensors that the model does not have. Raises ValueError, one line, for anything missing, corrupt or
    inconsistent, another quantization format, and an unknown family.
    """
    path = checkpoint_directory(path)
    config, codec_type = read_config(path)
    names = hub_names(config.model_type)
    check_family(codec_type, names)
    skeleton = build_skeleton(config)
    tensors: dict[str, torch.Tensor | MXFP4Tensor] = {}
    fp8: dict[str, FP8Tensor] = {}
    with WeightFiles(path) as files:
        names = stored_names(files, names)
        check_family(codec_type, names)
        tied = tied_as_stored(skeleton, files, names)
        codec = codec_type(names)
        for name, weight in expert_weights(skeleton, names).items():
            experts = skeleton.get_submodule(name.rpartition(".")[0])
            tensors[name] = _read_experts(codec, files, weight, experts)
        for name, expected in skeleton.state_dict().items():
            if name not in tensors and name not in tied:
                tensor = read_linear(files, codec_type, names.of(name), tuple(expected.shape))
                if keep_fp8 and isinstance(tensor, FP8Tensor):
                    fp8[name] = tensor
                else:
                    tensors[name] = _plain(tensor)
        for name, source in tied.items():
            files.used.add(names.of(name))
            tensors[name] = _plain(fp8[source]) if source in fp8 else tensors[source]
        _check_unused(files, skeleton)
    return Checkpoint(config, tensors, codec_type.is_packed, fp8)


def load_tensor(path: str | Path, name: str) -> torch.Tensor:
    """One tensor of `load_checkpoint` that is no routed expert, read alone. Raises ValueError as `load_checkpoint`."""
    path = checkpoint_directory(path)
    config, codec_type = read_config(path)
    skeleton = build_skeleton(config)
    with WeightFiles(path) as files:
        names = stored_names(files, hub_names(config.model_type))
        name = tied_as_stored(skeleton, files, names).get(name, name)
        return _plain(read_linear(files, codec_type, names.of(name), tuple(skeleton.state_dict()[name].shape)))


def _plain(tensor: torch.Tensor | FP8Tensor) -> torch.Tensor:
    return tensor.dequantize(torch.bfloat16) if isinstance(tensor, FP8Tensor) else tensor


def stored_names(files: WeightFiles, names: HubNames) -> HubNames:
    """The naming of these files: `save_pretrained`'s, the makers', or the model's own with fused experts.

    Raises ValueError for experts stored both ways.
    """
    fused = {name.rpartition(".")[0] for name in files.names() if name.endswith(".experts.down_proj")}
    each = {match[1] for name in files.names() if (match := re.match(r"(.+\.experts)\.\d+\.", name))}
    if fused & each:
        raise ValueError(
            f"{files.path} has {min(fused & each)} fused and one by one: take away those that are not meant"
        )
    if fused and not names.is_fused:
        return names.as_native()
    released = names.as_released()
    return released if released.of("model.embed_tokens.weight") in files else names


def tied_as_stored(model: PreTrainedModel, files: WeightFiles, names: HubNames) -> dict[str, str]:
    """`tied_names`, reversed where the other tensor of a pair is stored."""
    tied = tied_names(model)
    turned = {
        source: name for name, source in tied.items() if names.of(source) not in files and names.of(name) in files
    }
    return {name: source for name, source in tied.items() if source not in turned} | turned


def expert_weights(model: PreTrainedModel, names: HubNames) -> dict[str, ExpertWeight]:
    """Every expert weight of a model, by its state-dict name."""
    weights = {}
    for experts_name, experts in routed_experts(model).items():
        for weight_name in weight_names(experts):
            shape = contraction_last(experts, getattr(experts, weight_name)).shape
            if 0 in shape:
                raise ValueError(
                    f"{CONFIG_FILE} asks for experts {experts_name} of shape {tuple(shape)}: they are none"
                )
            weights[f"{experts_name}.{weight_name}"] = ExpertWeight(names.of(experts_name), weight_name, *shape)
    return weights


def _read_experts(
    codec: Codec, files: WeightFiles, weight: ExpertWeight, experts: nn.Module
) -> torch.Tensor | MXFP4Tensor:
    shape = (weight.num_experts, weight.num_rows)
    if codec.is_packed:
        codes = torch.empty((*shape, weight.num_columns // 2), dtype=torch.uint8)
        scales = torch.empty((*shape, weight.num_columns // BLOCK_SIZE), dtype=torch.uint8)
        for index in range(weight.num_experts):
            expert = codec.read(files, weight, index)
            assert isinstance(expert, MXFP4Tensor)
            codes[index], scales[index] = expert.codes, expert.scales
        return MXFP4Tensor(codes, scales)
    fused = None
    for index in range(weight.num_experts):
        expert = codec.read(files, weight, index)
        assert isinstance(expert, torch.Tensor)
        if fused is None:
            fused = torch.empty(getattr(experts, weight.name).shape, dtype=expert.dtype)
        elif expert.dtype != fused.dtype:
            fused = fused.to(torch.promote_types(expert.dtype, fused.dtype))
        contraction_last(experts, fused)[index] = expert
    assert fused is not None
    return fused


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
