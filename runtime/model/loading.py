"""A target in memory: its weights as backends take them, its digest, its tokenizer.

Engines that are built from one share its weights, as far as their backends compute on them as they are; the `cpu`
backend arranges them for its kernels, `reference` on a CPU widens those in bfloat16, and so they have copies of their
own.
"""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from speedstack.quant.checkpoint import load_checkpoint, weights_sha256
from speedstack.quant.checkpoint.config import read_config
from speedstack.quant.checkpoint.files import checkpoint_directory
from speedstack.quant.checkpoint.generation import end_token_ids
from speedstack.quant.checkpoint.tokenizer import find_tokenizer
from speedstack.runtime.model.device import choose_device, choose_dtype
from speedstack.runtime.model.families.registry import spec_from_config
from speedstack.runtime.model.spec import ModelSpec
from speedstack.runtime.model.weights import ModelWeights, read_weights


@dataclass(frozen=True)
class LoadedTarget:
    """What `Engine.from_target` takes. `sha256` is of the directory's weights; `tokenizer`: None where it has none."""

    weights: ModelWeights
    sha256: str
    tokenizer: Any


def load_target(path: str | Path, device: str = "auto", dtype: str | torch.dtype | None = None) -> LoadedTarget:
    """Reads the Hugging Face directory `path`, experts in MXFP4 and other matrices in FP8 as they are stored.

    See `Engine.from_pretrained`.

    Raises ValueError, one line, for a directory or a tokenizer that is broken, a model that the runtime does not know,
    and a device or dtype that is not there.
    """
    torch_device = choose_device(device)
    torch_dtype = choose_dtype(dtype, torch_device)
    # Before the weights: what cannot be decoded is said by its config.
    spec = check_decodable(path)
    tokenizer = find_tokenizer(path)
    spec = replace(spec, eos_token_ids=end_token_ids(path, spec.vocab_size, tokenizer))
    checkpoint = load_checkpoint(path, keep_fp8=True)
    sha256 = weights_sha256(path)
    tied = bool(checkpoint.config.tie_word_embeddings)
    tensors = {**checkpoint.tensors, **checkpoint.fp8}
    keeps_bfloat16 = torch_device.type == "cpu" and torch_dtype == torch.float32
    weights = read_weights(spec, tensors, torch_dtype, torch_device, tied, keeps_bfloat16)
    return LoadedTarget(weights, sha256, tokenizer)


def check_decodable(path: str | Path) -> ModelSpec:
    """The spec that the config of a model directory says, before anything large is read.

    Raises ValueError, one line, for a directory or config that is broken, and for a model that no backend decodes.
    """
    return spec_from_config(read_config(checkpoint_directory(path))[0])


def warn_if_not_decodable(config: PreTrainedConfig) -> None:
    """For work whose result others may serve: says before it that this runtime will not."""
    try:
        spec_from_config(config)
    except ValueError as error:
        warnings.warn(f"{error}: the result is for other engines, generate, eval and bench refuse it", stacklevel=2)
