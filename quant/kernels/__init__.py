"""Fast MXFP4 in one pass over memory, bit-identical to the reference in `speedstack.quant.mxfp4`.

    build          compiles C++ for this machine; the runtime uses it too
    mxfp4_cpu      the kernels for CPUs, compiled when first needed
    mxfp4_triton   the kernels for GPUs

Both kernel modules have the same three functions, whose arguments `mxfp4` has checked: contiguous, not empty, known
scale rules.
"""

import importlib.util
from functools import cache
from typing import Protocol

import torch


class Kernels(Protocol):
    """The functions of a kernel module."""

    def quantize(self, w_NK: torch.Tensor, scale_rule: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [..., K / 2] and scale bytes [..., K / 32]; the byte of a block with NaN or infinity is 255."""

    def dequantize(self, codes_NH: torch.Tensor, scales_NG: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Values [..., K] in `dtype`."""

    def fake_quantize(self, w_NK: torch.Tensor, scale_rule: str) -> torch.Tensor:
        """Rounded values [..., K] in the dtype of `w_NK`; NaN in a block with NaN or infinity."""


def kernels_for(*tensors: torch.Tensor) -> Kernels | None:
    """The kernels for these tensors' device; None if only the reference works.

    That is without a compiler on a CPU or Triton on a GPU, on other devices, for empty tensors, tensor subclasses
    (DTensor, fake tensors), and inside torch.compile, which cannot trace them.
    """
    device = tensors[0].device
    if torch.compiler.is_compiling() or not all(_is_plain(tensor, device) for tensor in tensors):
        return None
    if device.type == "cpu":
        from speedstack.quant.kernels import mxfp4_cpu

        return mxfp4_cpu if mxfp4_cpu.load_kernels() is not None else None
    if device.type == "cuda" and _has_triton():
        from speedstack.quant.kernels import mxfp4_triton

        return mxfp4_triton
    return None


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _is_plain(tensor: torch.Tensor, device: torch.device) -> bool:
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device == device and tensor.numel() > 0
