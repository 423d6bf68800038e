"""A target in memory: its weights as backends take them, its digest, its tokenizer.

Engines that are built from one share its weights, as far as their backends compute on them as they are; the `cpu`
backend arranges them for its kernels, and so has a copy of its own.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from speedstack.quant.checkpoint import load_checkpoint, weights_sha256
from speedstack.quant.checkpoint.tokenizer import load_tokenizer
from speedstack.runtime.select import choose_device, choose_dtype
from speedstack.runtime.spec import spec_from_config
from speedstack.runtime.weights import ModelWeights, read_weights


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
    checkpoint = load_checkpoint(path, keep_fp8=True)
    spec = spec_from_config(checkpoint.config)
    sha256 = weights_sha256(path)
    tied = bool(checkpoint.config.tie_word_embeddings)
    weights = read_weights(spec, {**checkpoint.tensors, **checkpoint.fp8}, torch_dtype, torch_device, tied)
    return LoadedTarget(weights, sha256, load_tokenizer(path))
