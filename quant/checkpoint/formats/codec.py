"""A checkpoint format: where routed experts are stored, in which bytes, and its config.json fields.

A codec serves one directory and family. Readers and writers handle `ExpertWeight`s, one fused weight per layer, one
expert at a time: rows in transformers' order (gate, then up; interleaved for gpt-oss), contraction axis last. So every
conversion passes an `MXFP4Tensor` and moves codes and scales without computing values.
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
# Rows of an expert processed at a time: rounding makes several float32 copies.
ROWS_AT_A_TIME = 128


@dataclass(frozen=True, order=True)
class ExpertWeight:
    """One fused weight of a layer's routed experts.

    module: the experts' module on disk, such as model.layers.1.mlp.experts. name: gate_up_proj or down_proj. One expert
    is [num_rows, num_columns], contracted over num_columns.
    """

    module: str
    name: str
    num_experts: int
    num_rows: int
    num_columns: int


class Sink(Protocol):
    """Where a codec writes tensors: safetensors shards, or its own file."""

    def add(self, name: str, tensor: torch.Tensor) -> None: ...


class Codec(Protocol):
    """One format. name: for `--to`, if `is_written`. linear_scale: suffix and dtype of FP8 linears' scales, if any."""

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
        """Whether config.json declares this format."""

    @staticmethod
    def refusal(names: HubNames) -> str | None:
        """Why the format cannot express a family; None if it can."""

    @staticmethod
    def caution(names: HubNames) -> str | None:
        """A warning about the format for a family, or None."""

    def find(self, files: WeightFiles) -> list[ExpertWeight]:
        """All expert weights, unordered. Raises ValueError for incomplete or inconsistent ones."""

    def tensor_names(self, weight: ExpertWeight) -> Iterator[str]:
        """The tensors of `files` that make up the weight."""

    def read(self, files: WeightFiles, weight: ExpertWeight, index: int) -> Weight:
        """One expert. Raises ValueError for missing tensors, wrong shapes and dtypes, and NaN scales."""

    def open_sink(self, directory: Path, weights: list[ExpertWeight], shards: Sink) -> AbstractContextManager[Sink]:
        """The destination of `write`; `weights` are all that will be written, in order."""

    def write(self, weight: ExpertWeight, experts: Iterator[MXFP4Tensor], sink: Sink) -> None:
        """Writes a weight's experts in order."""

    def config(self, ignored: list[str]) -> dict[str, Any]:
        """Fields of config.json, given the modules of all unquantized matrices."""


class PerExpert:
    """Formats with one or two tensors per projection of each expert: all but gpt-oss' and GGUF.

    `suffixes`: of elements and scales; `dtypes`: as written. Either sign of byte and E8M0 are read alike.
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
    """The expert weights with a 2-D tensor `<module>.<index>.<projection>.<suffix>` for every projection.

    In packed formats, tensors that are not bytes count as other tensors: multi-token-prediction heads keep unquantized
    experts. Raises ValueError for experts that are missing or of different shapes.
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


# config.json fields for FP8 linear layers.
FP8_FIELDS: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [TILE_SIZE, TILE_SIZE],
}


def check_tiles(quantization: dict[str, Any]) -> None:
    """Raises ValueError for another FP8 layout: other tiles, scales per tensor or channel, other elements."""
    size = quantization.get("weight_block_size", [TILE_SIZE, TILE_SIZE])
    if size != [TILE_SIZE, TILE_SIZE]:
        raise ValueError(f"weight_block_size {size} is not supported: FP8 tiles are read as {TILE_SIZE} x {TILE_SIZE}")
    if quantization.get("fmt", "e4m3") != "e4m3":
        raise ValueError(f"fmt {quantization['fmt']!r} is not supported: FP8 elements are read as e4m3")


def read_fp8(files: WeightFiles, name: str, scales: str, shape: tuple[int, ...]) -> FP8Tensor:
    """The matrix `name` with its tile scales. Raises ValueError for missing, damaged and misshapen tensors."""
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


# safetensors dtypes of bytes with two elements; both signs occur.
CODE_DTYPES = ("U8", "I8")


def code_bytes(files: WeightFiles, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of packed elements as uint8. Raises ValueError if it is missing, misshapen or not bytes."""
    return _as_bytes(files, name, files.get(name, shape), torch.int8)


def scale_bytes(files: WeightFiles, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of scales as uint8. Raises ValueError as `code_bytes`, and for NaN scales."""
    return checked_scales(files.path, name, _as_bytes(files, name, files.get(name, shape), torch.float8_e8m0fnu))


def checked_scales(path: Path, name: str, scales: torch.Tensor) -> torch.Tensor:
    """`scales`. Raises ValueError, naming the tensor, if one is NaN, which would lose a block of weights."""
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
