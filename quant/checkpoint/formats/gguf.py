"""GGUF's MXFP4 for the routed experts, as in llama.cpp: `experts.gguf` beside the other tensors.

A layer's projection is one tensor `blk.<layer>.ffn_{gate,up,down}_exps.weight` [experts, out, in] of 17-byte blocks:
the scale, then 16 bytes; byte j holds element j in its low and element j + 16 in its high nibble. Other tensors stay in
safetensors: a whole GGUF also needs the tokenizer and per-family attention layouts, which llama.cpp's converter makes.
So llama.cpp cannot run this file, but its experts can be read: unknown tensors in `experts.gguf` are ignored.

The `gguf` package reads and writes the container; the blocks are made here.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from speedstack.quant.checkpoint.files import ReadError, WeightFiles
from speedstack.quant.checkpoint.formats.codec import ExpertWeight, Sink, Weight, checked_scales
from speedstack.quant.checkpoint.names import HubNames, layer_index
from speedstack.quant.mxfp4 import BLOCK_SIZE, MXFP4Tensor

EXPERTS_FILE = "experts.gguf"
_BLOCK_BYTES = 1 + BLOCK_SIZE // 2
# llama.cpp's names of the architectures it has for our families.
_ARCHITECTURES = {
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "glm4_moe": "glm4moe",
    "gpt_oss": "gpt-oss",
    "mimo_v2_flash": "mimo2",
    "mixtral": "llama",
    "olmoe": "olmoe",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
}
_PROJECTIONS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}


class Gguf:
    """Experts in a GGUF file, everything else in safetensors."""

    name: ClassVar[str] = "gguf"
    title: ClassVar[str] = "GGUF"
    is_packed: ClassVar[bool] = True
    is_written: ClassVar[bool] = True
    linear_scale: ClassVar[tuple[str, torch.dtype] | None] = None
    plain_linears: ClassVar[tuple[str, ...]] = ()

    def __init__(self, names: HubNames) -> None:
        self.names = names
        self._tensors: dict[str, Any] = {}

    @staticmethod
    def describes(config: dict[str, Any]) -> bool:
        return (config.get("quantization_config") or {}).get("quant_method") == "gguf"

    @staticmethod
    def refusal(names: HubNames) -> str | None:
        if names.model_type not in _ARCHITECTURES:
            return f"llama.cpp has no architecture for {names.model_type}"
        return None

    @staticmethod
    def caution(names: HubNames) -> str | None:
        return f"{EXPERTS_FILE} holds the routed experts alone: llama.cpp's own converter makes the rest of a model"

    def find(self, files: WeightFiles) -> list[ExpertWeight]:
        self._tensors = _read_index(files.path / EXPERTS_FILE)
        weights = []
        for name in self._tensors:
            match = re.fullmatch(r"blk\.(\d+)\.ffn_(gate|down)_exps\.weight", name)
            if match:
                module = self.names.of(f"model.layers.{match[1]}.mlp.experts")
                weight_name = "down_proj" if match[2] == "down" else "gate_up_proj"
                num_columns, num_rows, num_experts = (int(size) for size in self._tensors[name].shape)
                num_rows *= len(_PROJECTIONS[weight_name])
                weights.append(ExpertWeight(module, weight_name, num_experts, num_rows, num_columns))
        return weights

    def tensor_names(self, weight: ExpertWeight) -> Iterator[str]:
        return iter(())

    def read(self, files: WeightFiles, weight: ExpertWeight, index: int) -> Weight:
        if not self._tensors:
            self._tensors = _read_index(files.path / EXPERTS_FILE)
        path = files.path / EXPERTS_FILE
        num_rows = weight.num_rows // len(_PROJECTIONS[weight.name])
        shape = (weight.num_experts, num_rows, weight.num_columns)
        parts = []
        for name in _tensor_names(weight):
            blocks = _read_blocks(path, self._tensors, name, index, shape)
            checked_scales(path, name, blocks[..., 0])
            parts.append(from_blocks(blocks))
        return MXFP4Tensor(
            self.names.join([part.codes for part in parts]), self.names.join([part.scales for part in parts])
        )

    @contextmanager
    def open_sink(self, directory: Path, weights: list[ExpertWeight], shards: Sink) -> Iterator[Sink]:
        gguf = _package()
        writer = gguf.GGUFWriter(directory / EXPERTS_FILE, _ARCHITECTURES[self.names.model_type])
        try:
            for weight in weights:
                num_rows = weight.num_rows // len(_PROJECTIONS[weight.name])
                shape = (weight.num_experts, num_rows, weight.num_columns // BLOCK_SIZE * _BLOCK_BYTES)
                for name in _tensor_names(weight):
                    writer.add_tensor_info(
                        name, shape, np.dtype(np.uint8), int(np.prod(shape)), gguf.GGMLQuantizationType.MXFP4
                    )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            yield _GgufSink(writer)
        finally:
            writer.close()

    def write(self, weight: ExpertWeight, experts: Iterator[MXFP4Tensor], sink: Sink) -> None:
        num_rows = weight.num_rows // len(_PROJECTIONS[weight.name])
        shape = (weight.num_experts, num_rows, weight.num_columns // BLOCK_SIZE, _BLOCK_BYTES)
        projections = [torch.empty(shape, dtype=torch.uint8) for _ in _PROJECTIONS[weight.name]]
        for index, expert in enumerate(experts):
            codes = self.names.split(weight.name, expert.codes)
            scales = self.names.split(weight.name, expert.scales)
            for blocks, part_codes, part_scales in zip(projections, codes, scales, strict=True):
                blocks[index] = to_blocks(MXFP4Tensor(part_codes, part_scales))
        for name, blocks in zip(_tensor_names(weight), projections, strict=True):
            sink.add(name, blocks.flatten(-2))

    def config(self, ignored: list[str]) -> dict[str, Any]:
        return {"quantization_config": {"quant_method": "gguf", "experts_file": EXPERTS_FILE}}


def to_blocks(tensor: MXFP4Tensor) -> torch.Tensor:
    """GGUF's blocks of a packed tensor [..., K]: uint8 [..., K / 32, 17]."""
    codes = tensor.codes.unflatten(-1, (-1, BLOCK_SIZE // 2))
    elements = torch.stack((codes & 0xF, codes >> 4), dim=-1).flatten(-2)
    first, second = elements.chunk(2, dim=-1)
    return torch.cat((tensor.scales.unsqueeze(-1), first | (second << 4)), dim=-1)


def from_blocks(blocks: torch.Tensor) -> MXFP4Tensor:
    """The inverse of `to_blocks`."""
    halves = blocks[..., 1:]
    elements = torch.cat((halves & 0xF, halves >> 4), dim=-1)
    codes = elements[..., 0::2] | (elements[..., 1::2] << 4)
    return MXFP4Tensor(codes.flatten(-2), blocks[..., 0].contiguous())


class _GgufSink:
    """Hands tensors to a writer that has been told of them in this order."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def add(self, name: str, tensor: torch.Tensor) -> None:
        assert next(iter(self._writer.tensors[0])) == name
        self._writer.write_tensor_data(tensor.numpy())


def _tensor_names(weight: ExpertWeight) -> list[str]:
    layer = layer_index(weight.module)
    if layer is None:
        raise ValueError(f"GGUF has no name for the experts of {weight.module}, which is not in a decoder layer")
    return [f"blk.{layer}.ffn_{projection}_exps.weight" for projection in _PROJECTIONS[weight.name]]


def _read_index(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} is missing although config.json says that the experts lie there: download it again")
    try:
        reader = _package().GGUFReader(path)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ValueError(f"{path} is truncated or corrupt ({error}): write or download it again") from error
    return {tensor.name: tensor for tensor in reader.tensors}


def _read_blocks(
    path: Path, tensors: dict[str, Any], name: str, index: int, shape: tuple[int, int, int]
) -> torch.Tensor:
    """The blocks of one expert, read from the file rather than its mapping, whose pages would stay in memory."""
    if name not in tensors:
        raise ValueError(f"{path} lacks the tensor {name}: is it a complete model?")
    tensor = tensors[name]
    found = tuple(int(size) for size in reversed(tensor.shape))
    if found != shape or tensor.tensor_type.name != "MXFP4":
        raise ValueError(
            f"{path}: {name} is {tensor.tensor_type.name} {found}, config.json asks for MXFP4 {shape}: "
            "the experts and the configuration are of different models"
        )
    _, num_rows, num_columns = shape
    num_bytes = num_rows * num_columns // BLOCK_SIZE * _BLOCK_BYTES
    try:
        data = np.fromfile(path, dtype=np.uint8, count=num_bytes, offset=int(tensor.data_offset) + index * num_bytes)
    except OSError as error:
        raise ReadError(f"cannot read {path}: {error.strerror or error}") from error
    if data.size != num_bytes:
        raise ValueError(f"{path} ends inside {name}: write or download it again")
    return torch.from_numpy(data).view(num_rows, num_columns // BLOCK_SIZE, _BLOCK_BYTES)


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ValueError("the format gguf needs the gguf package: pip install 'speedstack[gguf]'") from error
    return gguf
