"""Unquantized directories, as `save_pretrained` writes them: the source of most conversions, and the way back.

MXFP4 values are exact in bfloat16 and float32, so going here loses nothing but space; the way back rounds again, to the
same values though not always to the same bytes (4 and 2 scales is 2 and 4 of half the scale).
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from speedstack.quant.checkpoint.files import WeightFiles
from speedstack.quant.checkpoint.formats.codec import ROWS_AT_A_TIME, ExpertWeight, PerExpert, Sink, Weight
from speedstack.quant.checkpoint.names import HubNames
from speedstack.quant.mxfp4 import MXFP4Tensor, dequantize


class Plain(PerExpert):
    """Every expert's projections as `<module>.<index>.<projection>.weight`; gpt-oss' fused and transposed.

    Experts fused as in transformers are read and not written. `dtype` is what packed experts are written as: float32,
    or bfloat16, which holds them too.
    """

    name: ClassVar[str] = "plain"
    title: ClassVar[str] = "unquantized safetensors"
    suffixes: ClassVar[tuple[str, ...]] = ("weight",)
    is_packed: ClassVar[bool] = False

    def __init__(self, names: HubNames, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(names)
        self.dtype = dtype

    @staticmethod
    def describes(config: dict[str, Any]) -> bool:
        return config.get("quantization_config") is None

    @classmethod
    def refusal(cls, names: HubNames) -> str | None:
        return None

    @property
    def _has_fused(self) -> bool:
        return self.names.is_fused or self.names.is_native

    def find(self, files: WeightFiles) -> list[ExpertWeight]:
        if not self._has_fused:
            return super().find(files)
        weights = []
        for name in files.names():
            module, _, weight_name = name.rpartition(".")
            if module.endswith(".experts") and weight_name in ("gate_up_proj", "down_proj"):
                shape = files.shape(name)
                if len(shape) != 3:
                    raise ValueError(f"{files.path}: {name} has shape {shape}, fused experts have three sizes")
                num_experts, *sizes = shape
                num_rows, num_columns = sizes if self.names.is_native else reversed(sizes)
                weights.append(ExpertWeight(module, weight_name, num_experts, num_rows, num_columns))
        return weights

    def tensor_names(self, weight: ExpertWeight) -> Iterator[str]:
        if self._has_fused:
            yield f"{weight.module}.{weight.name}"
        else:
            yield from super().tensor_names(weight)

    def read(self, files: WeightFiles, weight: ExpertWeight, index: int) -> Weight:
        if self._has_fused:
            sizes = (weight.num_rows, weight.num_columns)
            fused_shape = (weight.num_experts, *(sizes if self.names.is_native else reversed(sizes)))
            rows = files.get_row(f"{weight.module}.{weight.name}", index, fused_shape)
            tensors = [rows if self.names.is_native else rows.T]
        else:
            parts = self.names.parts(weight.module, weight.name, index)
            shape = (weight.num_rows // len(parts), weight.num_columns)
            tensors = [files.get(f"{part}.weight", shape) for part in parts]
        for tensor in tensors:
            if tensor.dtype == torch.float64:
                raise ValueError(
                    f"{files.path}: {weight.module} holds {tensor.dtype}: store it in float32, bfloat16 or float16"
                )
            if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise ValueError(
                    f"{files.path}: {weight.module} holds {tensor.dtype} though config.json names no quantization: "
                    "its quantization_config is missing"
                )
        return tensors[0] if self._has_fused else self.names.join(tensors)

    def write(self, weight: ExpertWeight, experts: Iterator[MXFP4Tensor], sink: Sink) -> None:
        if self.names.is_fused:
            fused = torch.empty((weight.num_experts, weight.num_columns, weight.num_rows), dtype=self.dtype)
            for index, expert in enumerate(experts):
                fused[index] = self._values(expert, weight, index).T
            sink.add(f"{weight.module}.{weight.name}", fused)
            return
        for index, expert in enumerate(experts):
            parts = self.names.parts(weight.module, weight.name, index)
            rows = self.names.split(weight.name, self._values(expert, weight, index))
            for part, values in zip(parts, rows, strict=True):
                sink.add(f"{part}.weight", values)

    def config(self, ignored: list[str]) -> dict[str, Any]:
        return {}

    def _values(self, expert: MXFP4Tensor, weight: ExpertWeight, index: int) -> torch.Tensor:
        values = torch.empty(expert.shape, dtype=self.dtype)
        parts = (tensor.split(ROWS_AT_A_TIME) for tensor in (values, expert.codes, expert.scales))
        for rows, codes, scales in zip(*parts, strict=True):
            rows.copy_(dequantize(MXFP4Tensor(codes, scales), self.dtype))
        if not torch.isfinite(values).all():
            raise ValueError(f"{weight.module}.{index}: its scales exceed the range of {self.dtype}")
        return values
