"""Writes a model as a directory with its routed experts as MXFP4, everything else as it is.

The format is compressed-tensors' `mxfp4-pack-quantized`, or gpt-oss' own for a gpt-oss model. Experts are quantized one
at a time and written in shards, so memory beyond the model stays at one shard. A directory appears whole or not at all.
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from speedstack.quant.checkpoint.config import read_config, tied_names
from speedstack.quant.checkpoint.directory import MAX_SHARD_BYTES, ShardWriter, new_directory
from speedstack.quant.checkpoint.files import WeightFiles
from speedstack.quant.checkpoint.formats import Codec, default_format
from speedstack.quant.checkpoint.linears import plain_matrices, read_linear
from speedstack.quant.checkpoint.names import hub_names
from speedstack.quant.checkpoint.reader import expert_weights, extra_names
from speedstack.quant.experts import contraction_last
from speedstack.quant.fp8 import FP8Tensor
from speedstack.quant.mxfp4 import DEFAULT_SCALE_RULE, MXFP4Tensor, ScaleRule, quantize


def save_packed(
    model: PreTrainedModel,
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    scale_rule: ScaleRule = DEFAULT_SCALE_RULE,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    extras_from: str | Path | None = None,
    add_files: Callable[[Path], object] | None = None,
    dtypes_from: str | Path | None = None,
) -> None:
    """Write `model`, and the tokenizer if given, as a packed Hugging Face directory at `path`.

    `scale_rule` must be the one the model was trained with. A model directory already at `path` is replaced.
    `extras_from` is the directory the model was loaded from: the tensors there that transformers' model does not have,
    which are heads for multi-token prediction, go along unquantized. `add_files` is called with the directory before it
    appears at `path`, to put more files beside the model. What a directory `dtypes_from` stores in 16 bits is stored so
    again where that changes no value, such as weights that were frozen beside float32 masters.

    Raises ValueError for a model that is quantized already, has no routed experts, or is of a family that `names` does
    not list; for NaN or infinity in an expert; and as `check_extras` does. Raises OSError when `path` cannot be
    written, on a full disk, say.
    """
    path = Path(path)
    names = hub_names(model.config.model_type)
    if getattr(model, "is_quantized", False) or getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(
            f"{type(model).__name__} is quantized already: load it with load_model to get ordinary weights"
        )
    codec = default_format(names)(names)
    weights = expert_weights(model, names)
    tied = tied_names(model)
    dtypes = {} if dtypes_from is None else _half_dtypes(dtypes_from)
    with new_directory(path) as partial:
        shards = ShardWriter(partial, max_shard_bytes)
        is_as_stored = bool(dtypes)
        shapes: dict[str, tuple[int, ...]] = {}
        for name, tensor in model.state_dict().items():
            if name in weights:
                experts = model.get_submodule(name.rpartition(".")[0])
                codec.write(weights[name], _quantized(name, contraction_last(experts, tensor), scale_rule), shards)
            elif name not in tied:
                dtype = dtypes.get(names.of(name))
                if dtype is not None and torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
                    tensor = tensor.to(dtype)
                is_as_stored &= dtype is None or tensor.dtype == dtype
                shards.add(names.of(name), tensor.cpu().contiguous())
                shapes[names.of(name)] = tuple(tensor.shape)
        if extras_from is not None:
            shapes |= _copy_extras(Path(extras_from), shards)
        shards.finish()
        stored_dtype: torch.dtype | str | None = model.dtype
        if dtypes_from is not None and is_as_stored:
            stored_dtype = read_config(Path(dtypes_from))[0].dtype
        _write_config(model, codec, plain_matrices(shapes, set()), stored_dtype, partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if add_files is not None:
            add_files(partial)


def check_extras(path: str | Path) -> None:
    """Raises ValueError when `save_packed` could not take along what `path` holds besides the model."""
    with WeightFiles(path) as files:
        extra_names(files)


def _half_dtypes(path: str | Path) -> dict[str, torch.dtype]:
    """The dtypes of tensors that are stored in 16 bits, by their names in the files of `path`."""
    kinds = {"BF16": torch.bfloat16, "F16": torch.float16}
    with WeightFiles(path) as files:
        return {name: kinds[files.dtype(name)] for name in files.names() if files.dtype(name) in kinds}


def _copy_extras(path: Path, shards: ShardWriter) -> dict[str, tuple[int, ...]]:
    """Write what `extra_names` names; returns the shapes."""
    shapes = {}
    codec_type = read_config(path)[1]
    with WeightFiles(path) as files:
        for name in extra_names(files):
            shapes[name] = files.shape(name)
            tensor = read_linear(files, codec_type, name, shapes[name])
            shards.add(name, tensor.dequantize(torch.bfloat16) if isinstance(tensor, FP8Tensor) else tensor)
    return shapes


def _quantized(name: str, weight_EOK: torch.Tensor, scale_rule: ScaleRule) -> Iterator[MXFP4Tensor]:
    for weight_OK in weight_EOK:
        try:
            yield quantize(weight_OK, scale_rule).to("cpu")
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def _write_config(
    model: PreTrainedModel, codec: Codec, ignored: list[str], dtype: torch.dtype | str | None, directory: Path
) -> None:
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    config.update(codec.config(ignored))
    config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)
