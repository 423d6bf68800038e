"""Converts a checkpoint from one format to another, tensor by tensor.

Packed experts' codes and scales are moved, never computed; unquantized experts are rounded to MXFP4. Other tensors keep
their names and values, also multi-token-prediction heads, whose experts are not rounded. Memory holds one output shard
and at most one fused weight of one layer. The result appears atomically.

Left out: changing a model's family or sizes, and weights that are not safetensors.
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
    """The result: format names, number of fused expert weights (two a layer) and of other tensors, and how many of
    those became bfloat16 because the new format cannot hold their FP8.
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
    """Writes the checkpoint `source` at `out` in the format `target_format`.

    `scale_rule`: for an unquantized source; None is the default. `linears="fp8"` rounds the other linear layers to FP8
    as in mimo and deepseek-v4, "keep" leaves them; `lm_head="fp8"` does so with the LM head, which those makers do not.
    The tokenizer and other side files are copied; a model directory at `out` is replaced. `on_progress` gets the
    tensors written and in all; `add_files` gets the directory before it appears.

    Warns if FP8 becomes bfloat16, if linear layers cannot become FP8, if experts outside the model's layers stay, if
    few loaders know the result, and about sub-directories, which are not copied. Raises ValueError, one line, for an
    unknown format, a source already in it or quantized otherwise, an unsupported family, settings without effect, a
    head that FP8 cannot hold, NaN in experts, an `out` that must not be replaced, and anything missing, corrupt or
    inconsistent. Raises OSError if `out` cannot be written.
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
    """A weight's experts, moved, or rounded once from the files' dtype."""
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
    """Linear layers that `linears="fp8"` means and FP8 cannot hold. Raises ValueError if none can."""
    meant = [name for name in names if is_fp8_linear(codec_type, name) and len(files.shape(name)) == 2]
    kept = [name for name in meant if not is_whole_tiles(files.shape(name))]
    if len(kept) == len(meant):
        raise ValueError(
            f"{files.path} has no linear layer of whole tiles of {TILE_SIZE} x {TILE_SIZE} that FP8 could take: leave "
            "linears at keep"
        )
    return kept


def _check_head(source: Source, codec_type: type[Codec], head: str) -> None:
    """Raises ValueError if the LM head cannot be stored in FP8."""
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
    """Whether the target format stores this FP8 tensor as it is; partial tiles are then allowed."""
    tensor = source.other(name)
    assert codec_type.linear_scale is not None
    return isinstance(tensor, FP8Tensor) and tensor.with_scales(codec_type.linear_scale[1]) is not None


def _plain_dtype(source: Source) -> torch.dtype:
    return torch.float32 if source.named_dtype == torch.float32 else torch.bfloat16


def _has_float16(source: Source) -> bool:
    """Whether a loader may load bfloat16 experts as float16, which does not hold all their values."""
    return source.named_dtype == torch.float16 or any(source.files.dtype(name) == "F16" for name in source.others)
