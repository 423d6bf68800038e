"""What a checkpoint format is: where the routed experts lie, in which bytes, and what config.json says about it.

A codec is made for one directory and one family. Readers and writers see routed experts as `ExpertWeight`s, one fused
weight of one layer each, and take or give one expert at a time: rows as transformers stacks them (gate rows, then up
rows; gpt-oss' take turns), contraction axis last. What lies between two formats is therefore always the same
`MXFP4Tensor`, and a conversion from one to another moves codes and scales without ever seeing a weight's value.
"""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from speedstack.quant.checkpoint.files import WeightFiles
from speedstack.quant.checkpoint.names import HubNames
from speedstack.quant.fp8 import TILE_SIZE, FP8Tensor
from speedstack.quant.mxfp4 import BLOCK_SIZE, MXFP4Tensor

Weight = torch.Tensor | MXFP4Tensor
NAN_SCALE = 255
# Rows of an expert whose values are in memory at a time: rounding takes several float32 copies of what it is given.
ROWS_AT_A_TIME = 128


@dataclass(frozen=True, order=True)
class ExpertWeight:
    """One fused weight of a layer's routed experts.

    module: the experts' module on disk, such as model.layers.1.mlp.experts.
    name: gate_up_proj or down_proj. One expert of it is [num_rows, num_columns], num_columns being contracted.
    """

    module: str
    name: str
    num_experts: int
    num_rows: int
    num_columns: int


class Sink(Protocol):
    """Where a codec puts tensors: shards of safetensors, or a file of its own."""

    def add(self, name: str, tensor: torch.Tensor) -> None: ...


class Codec(Protocol):
    """One format.

    name: what `--to` takes, where `is_written`. linear_scale: the suffix and dtype of FP8 linears' scales, if any.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    is_packed: ClassVar[bool]
    is_written: ClassVar[bool]
    linear_scale: ClassVar[tuple[str, torch.dtype] | None]
    plain_linears: ClassVar[tuple[str, ...]]
    names: HubNames

    def __init__(self, names: HubNames) -> None: ...

    @staticmethod
    def describes(config: dict[str, Any]) -> bool:
        """Whether config.json says that its directory is of this format."""

    @staticmethod
    def refusal(names: HubNames) -> str | None:
        """Why the format cannot express a family; None when it can."""

    @staticmethod
    def caution(names: HubNames) -> str | None:
        """What a user should know before relying on the format for a family; None when there is nothing."""

    def find(self, files: WeightFiles) -> list[ExpertWeight]:
        """All expert weights, unordered. Raises ValueError for incomplete or inconsistent ones."""

    def tensor_names(self, weight: ExpertWeight) -> Iterator[str]:
        """The tensors of `files` that the weight occupies."""

    def read(self, files: WeightFiles, weight: ExpertWeight, index: int) -> Weight:
        """One expert. Raises ValueError for missing tensors, wrong shapes and dtypes, and NaN scales."""

    def open_sink(self, directory: Path, weights: list[ExpertWeight], shards: Sink) -> AbstractContextManager[Sink]:
        """Where `write` puts the weights, all of which are announced here in the order of writing."""

    def write(self, weight: ExpertWeight, experts: Iterator[MXFP4Tensor], sink: Sink) -> None:
        """Write the experts of a weight, in their order."""

    def config(self, ignored: list[str]) -> dict[str, Any]:
        """Fields of config.json, given the modules of all matrices that stay unquantized."""


class PerExpert:
    """The formats that name a tensor, or two, for every projection of every expert: all but gpt-oss' and GGUF.

    `suffixes` are those of the elements and of the scales, `dtypes` what they are written as. Containers of either sign
    and E8M0 are bytes all the same, so all of them are read.
    """

    suffixes: ClassVar[tuple[str, ...]]
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.uint8, torch.uint8)
    linear_scale: ClassVar[tuple[str, torch.dtype] | None] = None
    plain_linears: ClassVar[tuple[str, ...]] = ()
    is_packed: ClassVar[bool] = True
    is_written: ClassVar[bool] = True
    name: ClassVar[str]
    title: ClassVar[str]

    def __init__(self, names: HubNames) -> None:
        self.names = names

    @classmethod
    def refusal(cls, names: HubNames) -> str | None:
        if names.is_fused:
            return f"{names.model_type} experts have biases and interleaved rows, which {cls.title} cannot express"
        return None

    @staticmethod
    def caution(names: HubNames) -> str | None:
        return None

    def find(self, files: WeightFiles) -> list[ExpertWeight]:
        return group_experts(files, self.names, self.suffixes[0], is_packed=self.is_packed)

    def tensor_names(self, weight: ExpertWeight) -> Iterator[str]:
        for index in range(weight.num_experts):
            for part in self.names.parts(weight.module, weight.name, index):
                for suffix in self.suffixes:
                    yield f"{part}.{suffix}"

    def read(self, files: WeightFiles, weight: ExpertWeight, index: int) -> Weight:
        parts = self.names.parts(weight.module, weight.name, index)
        num_rows = weight.num_rows // len(parts)
        codes, scales = self.suffixes
        return MXFP4Tensor(
            self.names.join(
                [code_bytes(files, f"{part}.{codes}", (num_rows, weight.num_columns // 2)) for part in parts]
            ),
            self.names.join(
                [scale_bytes(files, f"{part}.{scales}", (num_rows, weight.num_columns // BLOCK_SIZE)) for part in parts]
            ),
        )

    def open_sink(self, directory: Path, weights: list[ExpertWeight], shards: Sink) -> AbstractContextManager[Sink]:
        return nullcontext(shards)

    def write(self, weight: ExpertWeight, experts: Iterator[MXFP4Tensor], sink: Sink) -> None:
        for index, expert in enumerate(experts):
            for tensor, suffix, dtype in zip((expert.codes, expert.scales), self.suffixes, self.dtypes, strict=True):
                parts = self.names.parts(weight.module, weight.name, index)
                for part, rows in zip(parts, self.names.split(weight.name, tensor), strict=True):
                    sink.add(f"{part}.{suffix}", rows.view(dtype))


def group_experts(files: WeightFiles, names: HubNames, suffix: str, is_packed: bool) -> list[ExpertWeight]:
    """The expert weights whose every projection is a 2-D tensor `<module>.<index>.<projection>.<suffix>`.

    In packed formats, tensors that are not bytes are left to the other tensors: heads for multi-token prediction keep
    their experts unquantized. Raises ValueError for experts that are missing or of different shapes.
    """
    leaves = "|".join(map(re.escape, (names.gate, names.up, names.down)))
    pattern = re.compile(rf"(.+\.experts)\.(\d+)\.(?:{leaves})\.{re.escape(suffix)}")
    num_experts: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in files.names():
        match = pattern.fullmatch(name)
        if match and (not is_packed or files.dtype(name) in CODE_DTYPES):
            num_experts[match[1]] = max(num_experts.get(match[1], 0), 1 + int(match[2]))
            shapes[name] = files.shape(name)
    weights = []
    for module, count in num_experts.items():
        for weight_name in ("gate_up_proj", "down_proj"):
            parts = [f"{part}.{suffix}" for index in range(count) for part in names.parts(module, weight_name, index)]
            first = parts[0]
            for part in parts:
                if part not in shapes:
                    raise ValueError(f"{files.path} lacks the tensor {part}: is it a complete model?")
                if shapes[part] != shapes[first]:
                    raise ValueError(
                        f"{files.path}: {part} has shape {shapes[part]}, {first} has {shapes[first]}: experts of one "
                        "layer have one shape, so the files are of different models"
                    )
            if len(shapes[first]) != 2:
                raise ValueError(f"{files.path}: {first} has shape {shapes[first]}, an expert's weight has two sizes")
            num_rows, num_columns = shapes[first]
            num_rows *= len(parts) // count
            weights.append(ExpertWeight(module, weight_name, count, num_rows, num_columns * (2 if is_packed else 1)))
    return weights


# What config.json says of FP8 linear layers, in the formats that have them.
FP8_FIELDS: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [TILE_SIZE, TILE_SIZE],
}


def check_tiles(quantization: dict[str, Any]) -> None:
    """Raises ValueError for FP8 of another layout: other tiles, one scale a tensor or channel, other elements."""
    size = quantization.get("weight_block_size", [TILE_SIZE, TILE_SIZE])
    if size != [TILE_SIZE, TILE_SIZE]:
        raise ValueError(f"weight_block_size {size} is not supported: FP8 tiles are read as {TILE_SIZE} x {TILE_SIZE}")
    if quantization.get("fmt", "e4m3") != "e4m3":
        raise ValueError(f"fmt {quantization['fmt']!r} is not supported: FP8 elements are read as e4m3")


def read_fp8(files: WeightFiles, name: str, scales: str, shape: tuple[int, ...]) -> FP8Tensor:
    """The matrix `name` and the scales of its tiles. Raises ValueError for missing, damaged and misshapen ones."""
    tensor = files.get(name, shape)
    tiles = files.get(scales, tuple(-(-size // TILE_SIZE) for size in shape))
    if tiles.dtype == torch.bfloat16:  # as Qwen3's are
        tiles = tiles.float()
    try:
        fp8 = FP8Tensor(tensor, tiles)
        if fp8.has_nan():
            raise ValueError("elements or scales are NaN or infinity: the checkpoint is damaged, download it again")
        return fp8
    except ValueError as error:
        raise ValueError(f"{files.path}: {name}: {error}") from error


# What safetensors calls the containers of two elements; both signs occur.
CODE_DTYPES = ("U8", "I8")


def code_bytes(files: WeightFiles, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of packed elements as uint8. Raises ValueError when it is missing, of another shape or no bytes."""
    return _as_bytes(files, name, files.get(name, shape), torch.int8)


def scale_bytes(files: WeightFiles, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of scales as uint8. Raises ValueError as `code_bytes` does, and for NaN scales."""
    return checked_scales(files.path, name, _as_bytes(files, name, files.get(name, shape), torch.float8_e8m0fnu))


def checked_scales(path: Path, name: str, scales: torch.Tensor) -> torch.Tensor:
    """`scales`, unless one is NaN, which would lose its block of weights. Raises ValueError, naming the tensor."""
    num_nan = int((scales == NAN_SCALE).sum())
    if num_nan:
        raise ValueError(
            f"{path}: {name} has the byte {NAN_SCALE}, which is NaN, for {num_nan} scales: the checkpoint is damaged, "
            "write or download it again"
        )
    return scales


def _as_bytes(files: WeightFiles, name: str, tensor: torch.Tensor, other_dtype: torch.dtype) -> torch.Tensor:
    if tensor.dtype not in (torch.uint8, other_dtype):
        raise ValueError(f"{files.path}: {name} is {tensor.dtype}, not the bytes of MXFP4")
    return tensor.view(torch.uint8)
