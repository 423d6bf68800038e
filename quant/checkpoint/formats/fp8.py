"""FP8 in tiles, experts included, as MiMo-V2-Flash, DeepSeek-V3 and Qwen3-MoE are released: a source to quantize from.

Every linear layer but those that config.json leaves out is `weight` float8_e4m3fn [out, in] and `weight_scale_inv` (a
multiplier, its name notwithstanding) [ceil(out / 128), ceil(in / 128)], an expert's projections too. What the weights
are is the product in float32 rounded to bfloat16: what the makers' own scripts write.

Left out: writing it, and FP8 experts that are fused.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from speedstack.quant.checkpoint.files import WeightFiles
from speedstack.quant.checkpoint.formats.codec import ExpertWeight, PerExpert, Weight, check_tiles, read_fp8
from speedstack.quant.checkpoint.names import HubNames
from speedstack.quant.mxfp4 import MXFP4Tensor


class FP8(PerExpert):
    """quant_method fp8, and no other format for the experts. Those that are stored unquantized are read as they are."""

    name: ClassVar[str] = "fp8"
    title: ClassVar[str] = "FP8 in tiles"
    suffixes: ClassVar[tuple[str, ...]] = ("weight", "weight_scale_inv")
    linear_scale: ClassVar[tuple[str, torch.dtype] | None] = ("weight_scale_inv", torch.float32)
    is_packed: ClassVar[bool] = False
    is_written: ClassVar[bool] = False

    @staticmethod
    def describes(config: dict[str, Any]) -> bool:
        quantization = config.get("quantization_config") or {}
        if quantization.get("quant_method") != "fp8":
            return False
        check_tiles(quantization)
        for key, value in (("store_dtype", quantization.get("store_dtype")), ("expert_dtype", _expert_dtype(config))):
            if value not in (None, "fp8"):
                raise ValueError(f"{key} {value!r} of FP8 checkpoints is not known")
        return True

    @classmethod
    def refusal(cls, names: HubNames) -> str | None:
        if names.is_native:
            return "its FP8 experts are fused, and only those of a tensor each are read"
        return super().refusal(names)

    def read(self, files: WeightFiles, weight: ExpertWeight, index: int) -> Weight:
        parts = self.names.parts(weight.module, weight.name, index)
        shape = (weight.num_rows // len(parts), weight.num_columns)
        return self.names.join([self._values(files, part, shape) for part in parts])

    def _values(self, files: WeightFiles, part: str, shape: tuple[int, int]) -> torch.Tensor:
        name, scales = (f"{part}.{suffix}" for suffix in self.suffixes)
        if name in files and files.dtype(name) == "F8_E4M3":
            return read_fp8(files, name, scales, shape).dequantize(torch.bfloat16)
        tensor = files.get(name, shape)
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{files.path}: {name} is {tensor.dtype}, which is neither FP8 in tiles nor unquantized")
        return tensor

    def write(self, weight: ExpertWeight, experts: Iterator[MXFP4Tensor], sink: object) -> None:
        raise AssertionError("a format that is only read")

    def config(self, ignored: list[str]) -> dict[str, Any]:
        raise AssertionError("a format that is only read")


def _expert_dtype(config: dict[str, Any]) -> Any:
    return (config.get("quantization_config") or {}).get("expert_dtype", config.get("expert_dtype"))
