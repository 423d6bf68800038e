"""A target in memory: weights, digest, tokenizer.

Engines of one target share its weights, except where a backend copies them: `cpu` packs them for its kernels,
`reference` on a CPU widens bfloat16.
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
    """Input of `Engine.from_target`. `sha256`: of the directory's weights; `tokenizer`: None if there is none."""

    weights: ModelWeights
    sha256: str
    tokenizer: Any


def load_target(path: str | Path, device: str = "auto", dtype: str | torch.dtype | None = None) -> LoadedTarget:
    """Loads a Hugging Face directory; MXFP4 experts and FP8 matrices stay as stored. See `Engine.from_pretrained`.

    Raises ValueError, one line, for a broken directory or tokenizer, an unknown model, or an unavailable device or
    dtype.
    """
    torch_device = choose_device(device)
    torch_dtype = choose_dtype(dtype, torch_device)
    # The config is checked before the weights are read.
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
    """The spec of a model directory's config, before any weights are read.

    Raises ValueError, one line, for a broken directory or config and for a model that no backend decodes.
    """
    return spec_from_config(read_config(checkpoint_directory(path))[0])


def warn_if_not_decodable(config: PreTrainedConfig) -> None:
    """Warns before a job starts that this runtime cannot decode its result."""
    try:
        spec_from_config(config)
    except ValueError as error:
        warnings.warn(f"{error}: the result is for other engines, generate, eval and bench refuse it", stacklevel=2)
