"""Turns a checkpoint of one format into one of another, a tensor at a time.

Codes and scales of packed experts are moved, never computed; the experts of an unquantized source are rounded to MXFP4.
Every other tensor is passed through under its own name, those of heads for multi-token prediction too: what config.json
does not count among the model's layers is not rounded, experts or not.
Memory holds one output shard and at most one fused weight of one layer, whatever the size of the model. The result
appears whole or not at all.

Left out: changing a model's family or its sizes, and weights that are not safetensors.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from speedstack.quant.checkpoint.config import read_config, tied_names
from speedstack.quant.checkpoint.directory import MAX_SHARD_BYTES, check_apart, check_target, new_directory
from speedstack.quant.checkpoint.files import CONFIG_FILE, WeightFiles, checkpoint_directory
from speedstack.quant.checkpoint.formats import Codec, ExpertWeight, Plain, check_family, format_named
from speedstack.quant.checkpoint.formats.codec import ROWS_AT_A_TIME
from speedstack.quant.checkpoint.linears import check_unquantized, is_fp8_linear, is_whole_tiles, to_fp8
from speedstack.quant.checkpoint.names import hub_names
from speedstack.quant.checkpoint.source import Source, open_by_expert
from speedstack.quant.checkpoint.writer import Writer
from speedstack.quant.fp8 import TILE_SIZE, FP8Tensor
from speedstack.quant.mxfp4 import DEFAULT_SCALE_RULE, MXFP4Tensor, ScaleRule, quantize

Linears = Literal["keep", "fp8"]


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
    add_files: Callable[[Path], object] | None = None,
) -> Conversion:
    """Write the checkpoint in directory `source` at `out` in the format named `target_format`.

    `scale_rule` is for an unquantized source, whose experts are rounded; None is the default rule. `linears="fp8"`
    stores the other linear layers in FP8 as the makers of mimo and deepseek-v4 do, which rounds them; "keep" leaves
    them as they are. `lm_head="fp8"` does so with the language-model head, which those makers leave alone. The source's
    tokenizer and other side files are copied; a model directory already at `out` is replaced. `on_progress` is called
    with the number of tensors written and in all, `add_files` with the directory before it appears at `out`, to put
    more files beside the model.

    Warns when FP8 layers become bfloat16, when linear layers cannot become FP8, when experts outside the model's layers
    stay as they are, when few loaders know the result, and about sub-directories, which are not copied. Raises
    ValueError, of one line, for an unknown format, a source that is already in it or is quantized otherwise, a format
    that cannot express the family, settings that would do nothing, a head that FP8 cannot take, NaN in experts, an
    `out` whose replacement would delete something else, and anything missing, corrupt or inconsistent. Raises OSError
    when `out` cannot be written.
    """
    codec_type = format_named(target_format)
    source, out = checkpoint_directory(source), Path(out)
    config, source_type = read_config(source)
    if source_type is codec_type:
        if source_type is Plain:
            with WeightFiles(source) as files:
                check_unquantized(files)
        raise ValueError(f"{source} is in the format {codec_type.name} already")
    for setting, value in (("linears", linears), ("lm_head", lm_head)):
        if value == "fp8" and codec_type.linear_scale is None:
            raise ValueError(f"format {codec_type.name} has no FP8 linear layers: leave {setting} at keep")
    if scale_rule is not None and source_type.is_packed:
        raise ValueError(
            f"{source} is packed, its codes and scales are moved as they are: scale_rule {scale_rule} is for rounding "
            "an unquantized source"
        )
    if scale_rule is not None and not codec_type.is_packed:
        raise ValueError(f"format {codec_type.name} is not rounded to: leave out scale_rule {scale_rule}")
    check_family(source_type, hub_names(config.model_type))
    check_family(codec_type, hub_names(config.model_type))
    check_apart(source, out)
    check_target(out)
    with open_by_expert(source) as opened:
        num_weights, num_others = len(opened.weights), len(opened.others)
        if not (source_type.is_packed or codec_type.is_packed):
            opened = opened.whole()
        kept = _linears_kept(opened.files, codec_type, opened.others) if linears == "fp8" else []
        head = opened.names.of("lm_head.weight")
        if lm_head == "fp8":
            _check_head(opened, codec_type, head)
        to_round = {name for name in opened.others if linears == "fp8" and is_fp8_linear(codec_type, name)}
        to_round |= {head} if lm_head == "fp8" else set()
        names = opened.names.as_written()
        codec = Plain(names, _plain_dtype(opened)) if codec_type is Plain else codec_type(names)

        def other(name: str) -> torch.Tensor | FP8Tensor:
            tensor = opened.other(name)
            return to_fp8(tensor, codec_type, name) if name in to_round else tensor

        with new_directory(out) as partial:
            writer = Writer(opened, codec, partial)
            rule = scale_rule or DEFAULT_SCALE_RULE
            writer.write_tensors(lambda weight: _experts(opened, weight, rule), other, max_shard_bytes, on_progress)
            writer.finish(is_widened=source_type.is_packed and codec_type is Plain and _has_float16(opened))
            if add_files is not None:
                add_files(partial)
        heads = opened.heads
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
    if names.of("lm_head.weight") in writer.fp8_names:
        warnings.warn(
            f"the LM head is in FP8, which speedstack reads: most loaders of {codec.title} take it unquantized only",
            stacklevel=2,
        )
    caution = codec.caution(names)
    if caution is not None:
        warnings.warn(caution, stacklevel=2)
    if writer.num_dequantized:
        warnings.warn(
            f"{writer.num_dequantized} linear layers of {source} are FP8, which {codec.title} does not hold as they "
            "are: they are rounded to bfloat16",
            stacklevel=2,
        )
    return Conversion(source_type.name, codec_type.name, num_weights, num_others, writer.num_dequantized)


def _experts(source: Source, weight: ExpertWeight, scale_rule: ScaleRule) -> Iterator[MXFP4Tensor]:
    """The experts of a weight, moved as they are or rounded once, from the dtype of the files."""
    for index in range(weight.num_experts):
        expert = source.codec.read(source.files, weight, index)
        if isinstance(expert, torch.Tensor):
            try:
                expert = _quantize(expert, scale_rule)
            except ValueError as error:
                raise ValueError(f"{source.path}: {weight.module}.{index} ({weight.name}): {error}") from error
        yield expert


def _quantize(values: torch.Tensor, scale_rule: ScaleRule) -> MXFP4Tensor:
    parts = [quantize(rows.float(), scale_rule) for rows in values.split(ROWS_AT_A_TIME)]
    return MXFP4Tensor(torch.cat([part.codes for part in parts]), torch.cat([part.scales for part in parts]))


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


def _check_head(source: Source, codec_type: type[Codec], head: str) -> None:
    """Raises ValueError when the language-model head cannot be stored in FP8."""
    files = source.files
    if "lm_head.weight" in tied_names(source.skeleton):
        raise ValueError(
            f"the LM head of {files.path} is its embedding, which is not stored in FP8: leave lm_head at keep"
        )
    is_moved = files.dtype(head) == "F8_E4M3" and _can_hold(source, codec_type, head)
    if not is_moved and not is_whole_tiles(files.shape(head)):
        raise ValueError(
            f"{files.path}: {head} of shape {files.shape(head)} is not of whole tiles of {TILE_SIZE} x {TILE_SIZE}, "
            "which FP8 takes: leave lm_head at keep"
        )


def _can_hold(source: Source, codec_type: type[Codec], name: str) -> bool:
    """Whether a tensor is FP8 that the target format stores as it is: tiles that are cut are no matter then."""
    tensor = source.other(name)
    assert codec_type.linear_scale is not None
    return isinstance(tensor, FP8Tensor) and tensor.with_scales(codec_type.linear_scale[1]) is not None


def _plain_dtype(source: Source) -> torch.dtype:
    return torch.float32 if source.named_dtype == torch.float32 else torch.bfloat16


def _has_float16(source: Source) -> bool:
    """Whether a loader may take experts in bfloat16 for float16, which does not hold all of their values."""
    return source.named_dtype == torch.float16 or any(source.files.dtype(name) == "F16" for name in source.others)
