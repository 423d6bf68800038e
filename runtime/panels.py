"""Weights in the order that the CPU kernels read them: panels of 16 outputs, contiguous for one input.

[N, K] becomes [N/16, K, 16]. Formats narrower than 32 bits move in words: two bfloat16 values, eight MXFP4 codes or
four scale bytes of one output are one 32-bit word, so that one load brings a word for each of the 16 outputs. Bits are
moved, never changed, but for FP8, which the kernels do not read: it becomes bfloat16, which holds all its values.

Legend: N outputs, K inputs (the contraction axis), F the SwiGLU width.
"""

from dataclasses import dataclass

import torch

from speedstack.quant.fp8 import FP8Tensor
from speedstack.quant.mxfp4 import MXFP4Tensor
from speedstack.runtime.weights import Linear, Weight, plain_matrix

LANES = 16
FLOAT32, BFLOAT16, MXFP4 = range(3)


@dataclass(frozen=True)
class Panels:
    """One weight matrix, or a stack of them, for the kernels. `format` is the enum of the C++ source."""

    format: int
    data: torch.Tensor
    scales: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (self.scales.nbytes if self.scales is not None else 0)


def panels(weight: Weight | Linear, is_gate_up: bool = False) -> Panels:
    """[..., N, K] in panels. `is_gate_up`: the gate rows, then as many up rows; their panels come out alternating."""
    arrange = _interleaved if is_gate_up else _transposed
    if isinstance(weight, MXFP4Tensor):
        scales = torch.nn.functional.pad(weight.scales, (0, -weight.scales.shape[-1] % 4))
        return Panels(MXFP4, arrange(_words(weight.codes)), arrange(_words(scales)))
    if isinstance(weight, FP8Tensor):
        weight = plain_matrix(weight, torch.bfloat16)
    if weight.dtype == torch.bfloat16:
        return Panels(BFLOAT16, arrange(_words(weight)))
    return Panels(FLOAT32, arrange(weight))


def unpacked(matrix: Panels, num_outputs: int) -> torch.Tensor:
    """The [N, K] matrix that `panels` arranged, in float32; of MXFP4 none."""
    assert matrix.format in (FLOAT32, BFLOAT16)
    w_NK = matrix.data.transpose(-1, -2).flatten(0, 1)[:num_outputs].contiguous()
    return w_NK if matrix.format == FLOAT32 else w_NK.view(torch.bfloat16).float()


def _words(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32)


def _transposed(w_NK: torch.Tensor) -> torch.Tensor:
    """[..., N, K] to [..., ceil(N/16), K, 16], zero rows added."""
    padding = -w_NK.shape[-2] % LANES
    padded = torch.nn.functional.pad(w_NK, (0, 0, 0, padding)) if padding else w_NK
    return padded.unflatten(-2, (-1, LANES)).transpose(-1, -2).contiguous()


def _interleaved(w_FK: torch.Tensor) -> torch.Tensor:
    gate, up = _transposed(w_FK).chunk(2, dim=-3)
    return torch.stack([gate, up], dim=-3).flatten(-4, -3).contiguous()
