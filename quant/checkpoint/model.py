"""Reads a model directory into a transformers model with ordinary weights, for training and as a peer to time."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from speedstack.quant.checkpoint.files import WeightFiles, checkpoint_directory
from speedstack.quant.checkpoint.reader import build_skeleton, load_checkpoint, read_config
from speedstack.quant.mxfp4 import MXFP4Tensor


def load_model(
    path: str | Path, dtype: torch.dtype = torch.float32, experts_implementation: str = "grouped_mm"
) -> PreTrainedModel:
    """The model of a directory, on the CPU and in eval mode, its packed experts dequantized to `dtype`.

    float32 and bfloat16 hold MXFP4 values exactly. Unquantized directories of any family that transformers loads work;
    packed ones of those that `load_checkpoint` reads. Raises ValueError as `load_checkpoint` does.
    """
    path = checkpoint_directory(path)
    config, is_packed = read_config(path)
    if is_packed:
        checkpoint = load_checkpoint(path)
        state_dict = {
            name: tensor.dequantize(dtype) if isinstance(tensor, MXFP4Tensor) else tensor
            for name, tensor in checkpoint.tensors.items()
        }
        source = None
    else:
        # transformers' own errors for damaged files are not lines a user can act on: open them all first.
        with WeightFiles(path):
            state_dict, source = None, path
    # The automatic class cannot make a model of tensors in memory, its own class can.
    model_class: Any = type(build_skeleton(config))
    try:
        model, report = model_class.from_pretrained(
            source,
            config=config,
            state_dict=state_dict,
            dtype=dtype,
            experts_implementation=experts_implementation,
            output_loading_info=True,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: the weights do not fit the configuration: {reason}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} tensors, such as {missing[0]}: is it a complete model?")
    return model.eval()
