"""Writes a copy of a model directory with some parts changed.

Unchanged tensors keep bytes and name, except FP8 that the new format lacks. config.json keeps its fields except
quantization, and gets transformers' fields if it has only the makers'. Other files are copied. Memory holds one shard
and at most one fused weight of one layer.
"""

import copy
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from speedstack.quant.checkpoint.config import unquantized_fields
from speedstack.quant.checkpoint.directory import MAX_SHARD_BYTES, ShardWriter
from speedstack.quant.checkpoint.files import CONFIG_FILE, INDEX_FILE, ReadError
from speedstack.quant.checkpoint.formats import Codec, ExpertWeight
from speedstack.quant.checkpoint.linears import plain_matrices, write_linear
from speedstack.quant.checkpoint.source import Source, natural_key
from speedstack.quant.checkpoint.spelling import transformers_fields
from speedstack.quant.fp8 import HEAD_FIELD, FP8Tensor
from speedstack.quant.mxfp4 import MXFP4Tensor

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_DTYPE_FIELDS = ("dtype", "torch_dtype")


class Writer:
    """A directory being written.

    shapes: of all tensors but the source's `weights`, by new name. fp8_names: those in FP8. num_dequantized: how many
    were FP8 and are not.
    """

    def __init__(self, source: Source, target: Codec, directory: Path) -> None:
        self._source = source
        self._target = target
        self._directory = directory
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.fp8_names: set[str] = set()
        self.num_dequantized = 0

    def write_tensors(
        self,
        experts: Callable[[ExpertWeight], Iterator[MXFP4Tensor]],
        other: Callable[[str], torch.Tensor | FP8Tensor],
        max_shard_bytes: int = MAX_SHARD_BYTES,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Writes every tensor: `experts` gives a weight's experts in order, `other` any other tensor by name."""
        source, shards = self._source, ShardWriter(self._directory, max_shard_bytes)
        # Experts stay among their layer's tensors, as in `save_pretrained`: loaders read shard by shard.
        items: list[str | ExpertWeight] = sorted([*source.weights, *source.others], key=natural_key)
        targets = {weight: replace(weight, module=self._name(weight.module)) for weight in source.weights}
        with self._target.open_sink(self._directory, list(targets.values()), shards) as sink:
            for done, item in enumerate(items):
                if on_progress is not None:
                    on_progress(done, len(items))
                if isinstance(item, str):
                    self._write_other(item, other(item), shards)
                else:
                    self._target.write(targets[item], experts(item), sink)
            shards.finish()
        if on_progress is not None:
            on_progress(len(items), len(items))

    def finish(self, is_widened: bool = False) -> None:
        """Writes config.json and copies side files. is_widened: config.json names float32, because its dtype would
        round values.
        """
        own = unquantized_fields(self._source.fields)
        # Makers' keys that transformers does not read stay, beside transformers' own.
        others = {key: value for key, value in transformers_fields(own).items() if key not in own}
        config = copy.deepcopy(own | others) | _tied_field(self._source)
        if is_widened:
            _name_float32(config)
        config |= self._target.config(plain_matrices(self.shapes, self.fp8_names))
        if self._target.names.of("lm_head.weight") in self.fp8_names:
            config["quantization_config"][HEAD_FIELD] = True
        (self._directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        copy_side_files(self._source.path, self._directory)

    def _name(self, name: str) -> str:
        """The new name of a source tensor or module."""
        is_renamed = self._source.names.is_native and not self._target.names.is_native
        return self._target.names.of(name) if is_renamed else name

    def _write_other(self, name: str, tensor: torch.Tensor | FP8Tensor, shards: ShardWriter) -> None:
        name = self._name(name)
        stored = write_linear(tensor, type(self._target), name)
        self.num_dequantized += isinstance(tensor, FP8Tensor) and len(stored) == 1
        if len(stored) > 1:
            self.fp8_names.add(name)
        for stored_name, value in stored.items():
            shards.add(stored_name, value)
            self.shapes[stored_name] = tuple(value.shape)


def copy_side_files(source: Path, directory: Path) -> None:
    """Copies everything beside the weights, following links: tokenizer, generation settings, templates, code, licences.

    Warns about sub-directories, which are not copied. Raises ReadError for an unreadable file.
    """
    skipped = []
    for entry in sorted(source.iterdir()):
        if entry.name in (CONFIG_FILE, INDEX_FILE) or entry.name.startswith(".") or entry.suffix in _WEIGHT_SUFFIXES:
            continue
        if entry.is_dir():
            skipped.append(entry.name)
        elif not entry.name.endswith(".index.json"):
            try:
                content = entry.open("rb")
            except OSError as error:
                raise ReadError(f"cannot read {entry}: {error.strerror}") from error
            with content, (directory / entry.name).open("wb") as file:
                shutil.copyfileobj(content, file)
    if skipped:
        warnings.warn(f"the sub-directories {', '.join(skipped)} of {source} are not copied", stacklevel=2)


def _tied_field(source: Source) -> dict[str, bool]:
    """`tie_word_embeddings` as in the files, if config.json differs."""
    is_tied = bool(source.config.tie_word_embeddings)
    by_default = bool(getattr(type(source.config), "tie_word_embeddings", is_tied))
    if bool(source.fields.get("tie_word_embeddings", by_default)) == is_tied:
        return {}
    return {"tie_word_embeddings": is_tied}


def _name_float32(config: dict[str, Any]) -> None:
    """Sets config.json's dtypes to float32."""
    text = config.get("text_config")
    parts = [config, text] if isinstance(text, dict) else [config]
    named = [(part, key) for part in parts for key in _DTYPE_FIELDS if key in part]
    # The spelling that every version of transformers knows.
    for part, key in named or [(config, "torch_dtype")]:
        part[key] = "float32"
