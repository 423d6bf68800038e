"""Reads a model directory into a transformers model with ordinary weights, for training and as a peer to time."""

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from speedstack.quant.checkpoint.config import BAD_FIELDS, build_skeleton, read_config, reason_of
from speedstack.quant.checkpoint.files import WeightFiles, checkpoint_directory, read_json
from speedstack.quant.checkpoint.formats import Plain
from speedstack.quant.checkpoint.linears import check_unquantized
from speedstack.quant.checkpoint.reader import load_checkpoint
from speedstack.quant.experts import contraction_last
from speedstack.quant.mxfp4 import MXFP4Tensor


def load_model(path: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a directory, on the CPU and in eval mode, its packed experts dequantized to `dtype`.

    float32 and bfloat16 hold MXFP4 values exactly. Unquantized directories of any family that transformers loads work;
    packed ones of those that `load_checkpoint` reads. Raises ValueError as `load_checkpoint` does, and for a family
    whose experts do not go through transformers' registry of implementations.
    """
    path = checkpoint_directory(path)
    config, codec = read_config(path)
    skeleton = build_skeleton(config)
    if not skeleton._can_set_experts_implementation():
        raise ValueError(
            f"{path}: the experts of {type(skeleton).__name__} do not go through transformers' registry of "
            "implementations, which all work on experts here does: no other directory of this family can be used either"
        )
    state_dict, source = None, None
    if codec is not Plain:
        state_dict = {
            name: _values(skeleton, name, tensor, dtype) for name, tensor in load_checkpoint(path).tensors.items()
        }
    else:
        # transformers' own errors for damaged files are not lines a user can act on: open them all first.
        with WeightFiles(path) as files:
            check_unquantized(files)
            if files.is_as_transformers_wants:
                source = path
            else:
                state_dict = {name: files.get(name, files.shape(name)) for name in files.names()}
    generation_config = _read_generation_config(path)
    # The automatic class cannot make a model of tensors in memory, its own class can.
    model_class: Any = type(skeleton)
    try:
        model, report = model_class.from_pretrained(
            source,
            config=skeleton.config,
            state_dict=state_dict,
            dtype=dtype,
            experts_implementation="grouped_mm",
            output_loading_info=True,
        )
    except BAD_FIELDS as error:
        raise ValueError(f"{path}: the weights do not fit the configuration: {reason_of(error)}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} tensors, such as {missing[0]}: is it a complete model?")
    if source is None and generation_config is not None:
        # transformers reads it only where it reads the weights as well.
        model.generation_config = generation_config
    return model.eval()


def _read_generation_config(path: Path) -> GenerationConfig | None:
    """Of a directory, if it has one. Raises ValueError for one that transformers refuses."""
    file = path / GENERATION_CONFIG_NAME
    if not file.is_file():
        return None
    read_json(file)  # which transformers takes for an object
    try:
        return GenerationConfig.from_pretrained(path)
    except BAD_FIELDS as error:
        raise ValueError(f"{file} is not valid ({reason_of(error)}): correct or remove it") from error


def _values(
    skeleton: PreTrainedModel, name: str, tensor: torch.Tensor | MXFP4Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """A tensor as the model holds it: packed experts have the contraction axis last, some models do not."""
    if not isinstance(tensor, MXFP4Tensor):
        return tensor
    experts = skeleton.get_submodule(name.rpartition(".")[0])
    return contraction_last(experts, tensor.dequantize(dtype)).contiguous()
