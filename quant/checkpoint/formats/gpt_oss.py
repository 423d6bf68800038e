"""gpt-oss' own MXFP4 (`quant_method: mxfp4`): a layer's experts fused into `<weight>_blocks` and `<weight>_scales`.

blocks are uint8 [experts, out, in / 32, 16], scales uint8 [experts, out, in / 32]; gate and up rows take turns, and
biases lie beside them unquantized. Loaders pick this format by the model's class, so no other family can use it.
Source: transformers' integrations/mxfp4.py.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch

from speedstack.quant.checkpoint.files import WeightFiles
from speedstack.quant.checkpoint.formats.codec import (
    CODE_DTYPES,
    ExpertWeight,
    Sink,
    Weight,
    checked_scales,
)
from speedstack.quant.checkpoint.names import HubNames
from speedstack.quant.mxfp4 import BLOCK_SIZE, MXFP4Tensor

_BYTES_PER_BLOCK = BLOCK_SIZE // 2


class GptOss:
    """quant_method mxfp4."""

    name: ClassVar[str] = "gpt-oss"
    title: ClassVar[str] = "gpt-oss' blocks and scales"
    is_packed: ClassVar[bool] = True
    is_written: ClassVar[bool] = True
    linear_scale: ClassVar[tuple[str, torch.dtype] | None] = None
    plain_linears: ClassVar[tuple[str, ...]] = ()

    def __init__(self, names: HubNames) -> None:
        self.names = names

    @staticmethod
    def describes(config: dict[str, Any]) -> bool:
        return (config.get("quantization_config") or {}).get("quant_method") == "mxfp4"

    @classmethod
    def refusal(cls, names: HubNames) -> str | None:
        if not names.is_fused:
            return f"loaders read {cls.title} for gpt_oss models alone, not for {names.model_type}"
        return None

    @staticmethod
    def caution(names: HubNames) -> str | None:
        return None

    def find(self, files: WeightFiles) -> list[ExpertWeight]:
        weights = []
        for name in files.names():
            module, _, leaf = name.rpartition(".")
            if leaf not in ("gate_up_proj_blocks", "down_proj_blocks"):
                continue
            shape = files.shape(name)
            if len(shape) != 4 or shape[3] != _BYTES_PER_BLOCK or files.dtype(name) not in CODE_DTYPES:
                raise ValueError(
                    f"{files.path}: {name} is {files.dtype(name)} {shape}, not U8 [experts, out, in / {BLOCK_SIZE}, "
                    f"{_BYTES_PER_BLOCK}]: write or download it again"
                )
            num_experts, num_rows, num_blocks, _ = shape
            weight_name = leaf.removesuffix("_blocks")
            weights.append(ExpertWeight(module, weight_name, num_experts, num_rows, num_blocks * BLOCK_SIZE))
        return weights

    def tensor_names(self, weight: ExpertWeight) -> Iterator[str]:
        yield f"{weight.module}.{weight.name}_blocks"
        yield f"{weight.module}.{weight.name}_scales"

    def read(self, files: WeightFiles, weight: ExpertWeight, index: int) -> Weight:
        blocks_name, scales_name = self.tensor_names(weight)
        shape = (weight.num_experts, weight.num_rows, weight.num_columns // BLOCK_SIZE)
        blocks = files.get_row(blocks_name, index, (*shape, _BYTES_PER_BLOCK))
        scales = files.get_row(scales_name, index, shape)
        for name, tensor in ((blocks_name, blocks), (scales_name, scales)):
            if tensor.dtype != torch.uint8:
                raise ValueError(f"{files.path}: {name} is {tensor.dtype}, not the bytes of MXFP4")
        return MXFP4Tensor(blocks.flatten(-2), checked_scales(files.path, scales_name, scales))

    def open_sink(self, directory: Path, weights: list[ExpertWeight], shards: Sink) -> AbstractContextManager[Sink]:
        return nullcontext(shards)

    def write(self, weight: ExpertWeight, experts: Iterator[MXFP4Tensor], sink: Sink) -> None:
        shape = (weight.num_experts, weight.num_rows, weight.num_columns // BLOCK_SIZE)
        blocks = torch.empty((*shape, _BYTES_PER_BLOCK), dtype=torch.uint8)
        scales = torch.empty(shape, dtype=torch.uint8)
        for index, expert in enumerate(experts):
            blocks[index] = expert.codes.unflatten(-1, (-1, _BYTES_PER_BLOCK))
            scales[index] = expert.scales
        blocks_name, scales_name = self.tensor_names(weight)
        sink.add(blocks_name, blocks)
        sink.add(scales_name, scales)

    def config(self, ignored: list[str]) -> dict[str, Any]:
        # As in the released checkpoints; loaders take patterns here and convert experts only.
        kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        return {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": kept}}
