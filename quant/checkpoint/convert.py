"""Turns a checkpoint of one format into one of another, a tensor at a time.

Codes and scales of packed experts are moved, never computed; the experts of an unquantized source are rounded to MXFP4.
Every other tensor is passed through under its own name, those of heads for multi-token prediction too: what config.json
does not count among the model's layers is not rounded, experts or not.
Memory holds one output shard and at most one fused weight of one layer, whatever the size of the model. The result
appears whole or not at all.

Left out: changing a model's family or its sizes, and weights that are not safetensors.
"""

import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from speedstack.quant.checkpoint.config import build_skeleton, read_config, tied_names, unquantized_fields
from speedstack.quant.checkpoint.directory import MAX_SHARD_BYTES, ShardWriter, check_apart, check_target, new_directory
from speedstack.quant.checkpoint.files import (
    CONFIG_FILE,
    INDEX_FILE,
    ReadError,
    WeightFiles,
    checkpoint_directory,
    read_json,
)
from speedstack.quant.checkpoint.formats import (
    Codec,
    ExpertWeight,
    Plain,
    check_family,
    detect,
    format_named,
)
from speedstack.quant.checkpoint.formats.codec import ROWS_AT_A_TIME
from speedstack.quant.checkpoint.linears import (
    is_fp8_linear,
    is_whole_tiles,
    other_names,
    plain_matrices,
    read_linear,
    to_fp8,
    write_linear,
)
from speedstack.quant.checkpoint.names import HubNames, hub_names
from speedstack.quant.checkpoint.reader import expert_weights, stored_names
from speedstack.quant.fp8 import HEAD_FIELD, TILE_SIZE, FP8Tensor
from speedstack.quant.mxfp4 import DEFAULT_SCALE_RULE, MXFP4Tensor, ScaleRule, quantize

Linears = Literal["keep", "fp8"]
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


@dataclass(frozen=True)
class Conversion:
    """What was done: formats by name, expert weights (fused, two a layer), other tensors, and how many of those changed
    from FP8 to bfloat16 because the new format has no FP8 that holds them.
    """

    source_format: str
    target_format: str
    num_expert_weights: int
    num_other_tensors: int
    num_dequantized: int


def convert(
    source: str | Path,
    target_format: str,
    out: str | Path,
    *,
    scale_rule: ScaleRule | None = None,
    linears: Linears = "keep",
    lm_head: Linears = "keep",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Write the checkpoint in directory `source` at `out` in the format named `target_format`.

    `scale_rule` is for an unquantized source, whose experts are rounded; None is the default rule. `linears="fp8"`
    stores the other linear layers in FP8 as the makers of mimo and deepseek-v4 do, which rounds them; "keep" leaves
    them as they are. `lm_head="fp8"` does so with the language-model head, which those makers leave alone. The source's
    tokenizer and other side files are copied; a model directory already at `out` is replaced. `on_progress` is called
    with the number of tensors written and in all.

    Warns when FP8 layers become bfloat16, when linear layers cannot become FP8, when experts outside the model's layers
    stay as they are, when few loaders know the result, and about sub-directories, which are not copied. Raises
    ValueError, of one line, for an unknown format, a source that is already in it or is quantized otherwise, a format
    that cannot express the family, settings that would do nothing, a head that FP8 cannot take, NaN in experts, an
    `out` whose replacement would delete something else, and anything missing, corrupt or inconsistent. Raises OSError
    when `out` cannot be written.
    """
    codec_type = format_named(target_format)
    source, out = checkpoint_directory(source), Path(out)
    fields = read_json(source / CONFIG_FILE)
    source_type = detect(source, fields)
    if source_type is codec_type:
        raise ValueError(f"{source} is in the format {codec_type.name} already")
    for setting, value in (("linears", linears), ("lm_head", lm_head)):
        if value == "fp8" and codec_type.linear_scale is None:
            raise ValueError(f"format {codec_type.name} has no FP8 linear layers: leave {setting} at keep")
    if scale_rule is not None and source_type.is_packed:
        raise ValueError(
            f"{source} is packed, its codes and scales are moved as they are: scale_rule {scale_rule} is for rounding "
            "an unquantized source"
        )
    if scale_rule is not None and codec_type is Plain:
        raise ValueError(f"format {codec_type.name} rounds nothing: leave scale_rule {scale_rule} away")
    names = hub_names(str(fields.get("model_type")))
    check_family(source_type, names)
    check_family(codec_type, names)
    check_apart(source, out)
    check_target(out)
    with WeightFiles(source) as files:
        names = stored_names(files, names)
        source_codec = source_type(names)
        weights = sorted(source_codec.find(files), key=_natural_key)
        if not weights:
            raise ValueError(f"{source} has no routed experts that {source_type.title} would name: nothing to convert")
        skeleton = build_skeleton(read_config(source)[0])
        heads = _outside(weights, expert_weights(skeleton, names)) if not source_codec.is_packed else []
        weights = [weight for weight in weights if weight not in heads]
        expert_names = {name for weight in weights for name in source_codec.tensor_names(weight)}
        others = sorted(other_names(files, source_type, expert_names), key=_natural_key)
        _check_against_config(skeleton, files, names, weights, set(others))
        kept = _linears_kept(files, codec_type, others) if linears == "fp8" else []
        head = names.of("lm_head.weight")
        if lm_head == "fp8":
            _check_head(files, source_type, codec_type, head, "lm_head.weight" in tied_names(skeleton))
        # Of fused experts transformers alone writes the names; other formats have those of `save_pretrained`.
        written = hub_names(names.model_type) if names.is_native else names
        codec = Plain(written, _plain_dtype(fields)) if codec_type is Plain else codec_type(written)
        with new_directory(out) as partial:
            to_round = {name for name in others if linears == "fp8" and is_fp8_linear(codec_type, name)}
            to_round |= {head} if lm_head == "fp8" else set()
            rename = written.of if names.is_native else str
            job = _Job(files, source_codec, codec, scale_rule or DEFAULT_SCALE_RULE, to_round, rename)
            job.write(weights, others, partial, max_shard_bytes, on_progress or (lambda done, total: None))
            config = unquantized_fields(fields) | codec.config(plain_matrices(job.shapes, job.fp8_names))
            if head in job.fp8_names:
                config["quantization_config"][HEAD_FIELD] = True
            (partial / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            _copy_side_files(source, partial)
    if heads:
        warnings.warn(
            f"{len(heads)} expert weights of {source} are of no layer that {CONFIG_FILE} counts, such as "
            f"{heads[0].module}.{heads[0].name} (a head for multi-token prediction?): they stay as they are",
            stacklevel=2,
        )
    if kept:
        warnings.warn(
            f"{len(kept)} linear layers of {source} are not of whole tiles of {TILE_SIZE} x {TILE_SIZE}, such as "
            f"{kept[0]}: they stay as they are",
            stacklevel=2,
        )
    if head in job.fp8_names:
        warnings.warn(
            f"the LM head is in FP8, which speedstack reads: most loaders of {codec.title} take it unquantized only",
            stacklevel=2,
        )
    caution = codec.caution(names)
    if caution is not None:
        warnings.warn(caution, stacklevel=2)
    if job.num_dequantized:
        warnings.warn(
            f"{job.num_dequantized} linear layers of {source} are FP8, which {codec.title} does not hold as they are: "
            "they are rounded to bfloat16",
            stacklevel=2,
        )
    return Conversion(source_type.name, codec_type.name, len(weights), len(others), job.num_dequantized)


class _Job:
    """One conversion while it writes."""

    def __init__(
        self,
        files: WeightFiles,
        source: Codec,
        target: Codec,
        scale_rule: ScaleRule,
        to_round: set[str],
        rename: Callable[[str], str],
    ) -> None:
        self._files = files
        self._source = source
        self._target = target
        self._scale_rule: ScaleRule = scale_rule
        self._to_round = to_round
        self._rename = rename
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.fp8_names: set[str] = set()
        self.num_dequantized = 0

    def write(
        self,
        weights: list[ExpertWeight],
        others: list[str],
        directory: Path,
        max_shard_bytes: int,
        on_progress: Callable[[int, int], None],
    ) -> None:
        shards = ShardWriter(directory, max_shard_bytes)
        # Experts between the other tensors of their layer, as `save_pretrained` has them: loaders read shard by shard.
        items: list[str | ExpertWeight] = sorted([*weights, *others], key=_natural_key)
        targets = {weight: replace(weight, module=self._rename(weight.module)) for weight in weights}
        with self._target.open_sink(directory, list(targets.values()), shards) as sink:
            for done, item in enumerate(items):
                on_progress(done, len(items))
                if isinstance(item, str):
                    self._write_other(item, shards)
                else:
                    self._target.write(targets[item], self._experts(item), sink)
            shards.finish()
        on_progress(len(items), len(items))

    def _experts(self, weight: ExpertWeight) -> Iterator[Any]:
        """MXFP4Tensors; for a plain target the values of an unquantized source, or of one in FP8."""
        for index in range(weight.num_experts):
            expert = self._source.read(self._files, weight, index)
            if isinstance(expert, torch.Tensor) and not isinstance(self._target, Plain):
                try:
                    expert = self._quantize(expert)
                except ValueError as error:
                    raise ValueError(f"{self._files.path}: {weight.module}.{index} ({weight.name}): {error}") from error
            yield expert

    def _quantize(self, values: torch.Tensor) -> MXFP4Tensor:
        parts = [quantize(rows.float(), self._scale_rule) for rows in values.split(ROWS_AT_A_TIME)]
        return MXFP4Tensor(torch.cat([part.codes for part in parts]), torch.cat([part.scales for part in parts]))

    def _write_other(self, name: str, shards: ShardWriter) -> None:
        tensor = read_linear(self._files, type(self._source), name, self._files.shape(name))
        if name in self._to_round:
            tensor = to_fp8(tensor, type(self._target), name)
        name = self._rename(name)
        stored = write_linear(tensor, type(self._target), name)
        self.num_dequantized += isinstance(tensor, FP8Tensor) and len(stored) == 1
        if len(stored) > 1:
            self.fp8_names.add(name)
        for stored_name, value in stored.items():
            shards.add(stored_name, value)
            self.shapes[stored_name] = tuple(value.shape)


def _linears_kept(files: WeightFiles, codec_type: type[Codec], names: list[str]) -> list[str]:
    """The linear layers that `linears="fp8"` is about and that FP8 cannot take. Raises ValueError if it is all."""
    meant = [name for name in names if is_fp8_linear(codec_type, name) and len(files.shape(name)) == 2]
    kept = [name for name in meant if not is_whole_tiles(files.shape(name))]
    if len(kept) == len(meant):
        raise ValueError(
            f"{files.path} has no linear layer of whole tiles of {TILE_SIZE} x {TILE_SIZE} that FP8 could take: leave "
            "linears at keep"
        )
    return kept


def _check_head(
    files: WeightFiles, source_type: type[Codec], codec_type: type[Codec], head: str, is_tied: bool
) -> None:
    """Raises ValueError when the language-model head cannot be stored in FP8."""
    if is_tied:
        raise ValueError(
            f"the LM head of {files.path} is its embedding, which is not stored in FP8: leave lm_head at keep"
        )
    is_moved = files.dtype(head) == "F8_E4M3" and _can_hold(files, source_type, codec_type, head)
    if not is_moved and not is_whole_tiles(files.shape(head)):
        raise ValueError(
            f"{files.path}: {head} of shape {files.shape(head)} is not of whole tiles of {TILE_SIZE} x {TILE_SIZE}, "
            "which FP8 takes: leave lm_head at keep"
        )


def _can_hold(files: WeightFiles, source_type: type[Codec], codec_type: type[Codec], name: str) -> bool:
    """Whether a tensor is FP8 that the target format stores as it is: tiles that are cut are no matter then."""
    tensor = read_linear(files, source_type, name, files.shape(name))
    assert codec_type.linear_scale is not None
    return isinstance(tensor, FP8Tensor) and tensor.with_scales(codec_type.linear_scale[1]) is not None


def _outside(weights: list[ExpertWeight], of_model: dict[str, ExpertWeight]) -> list[ExpertWeight]:
    """The expert weights in modules that the model does not have."""
    modules = {weight.module for weight in of_model.values()}
    return [weight for weight in weights if weight.module not in modules]


def _check_against_config(
    skeleton: PreTrainedModel, files: WeightFiles, names: HubNames, weights: list[ExpertWeight], others: set[str]
) -> None:
    """Raises ValueError when the model that config.json describes has tensors or shapes that the files have not."""
    source = files.path
    expected_weights = expert_weights(skeleton, names)
    found = {(weight.module, weight.name): weight for weight in weights}
    for weight in expected_weights.values():
        match = found.get((weight.module, weight.name))
        if match is None:
            raise ValueError(f"{source} lacks the experts {weight.module}.{weight.name}: is it a complete model?")
        if match != weight:
            sizes = [(item.num_experts, item.num_rows, item.num_columns) for item in (match, weight)]
            raise ValueError(
                f"{source}: the experts {weight.module}.{weight.name} have shape {sizes[0]}, {CONFIG_FILE} asks for "
                f"{sizes[1]}: the weights and the configuration are of different models"
            )
    tied = tied_names(skeleton)
    for native_name, tensor in skeleton.state_dict().items():
        if native_name in expected_weights or native_name in tied:
            continue
        name = names.of(native_name)
        if name not in others:
            raise ValueError(f"{source} lacks the tensor {name}: is it a complete model of this {CONFIG_FILE}?")
        if files.shape(name) != tuple(tensor.shape):
            raise ValueError(
                f"{source}: {name} has shape {files.shape(name)}, {CONFIG_FILE} asks for {tuple(tensor.shape)}: "
                "the weights and the configuration are of different models"
            )


def _plain_dtype(fields: dict[str, Any]) -> torch.dtype:
    return torch.float32 if fields.get("dtype", fields.get("torch_dtype")) == "float32" else torch.bfloat16


def _copy_side_files(source: Path, directory: Path) -> None:
    """Everything beside the weights: tokenizer, generation settings, templates, licences."""
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
            with content, (directory / entry.name).open("wb") as copy:
                shutil.copyfileobj(content, copy)
    if skipped:
        warnings.warn(f"the sub-directories {', '.join(skipped)} of {source} are not copied", stacklevel=3)


def _natural_key(item: str | ExpertWeight) -> list[tuple[int, str]]:
    """Sorts names, and layer 2 before layer 10."""
    name = item if isinstance(item, str) else f"{item.module}.{item.name}"
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
