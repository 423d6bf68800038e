"""Weights in the order that the CPU kernels read them: panels of 16 outputs (see kernels/weights.h).

[N, K] becomes [N/16, chunks, 16] words of 32 bits: a chunk of 16 words holds one contraction position of float32, two
of bfloat16 or eight of MXFP4, for the panel's 16 outputs. Bits are moved, never changed, but for FP8, which the kernels
do not read: it becomes bfloat16, which has all its values.

A float32 matrix that holds nothing but values of bfloat16, as one from a bfloat16 checkpoint does, is moved as
bfloat16: half the bytes, the same products.

Legend: N outputs, K inputs (the contraction axis), F the SwiGLU width, P panels, C chunks, L lanes, G scale groups.
"""

from dataclasses import dataclass

import torch

from speedstack.quant.fp8 import FP8Tensor
from speedstack.quant.mxfp4 import MXFP4Tensor
from speedstack.runtime.kernels.build import load_kernels
from speedstack.runtime.weights import Linear, Weight, plain_matrix

LANES = 16
FLOAT32, BFLOAT16, MXFP4 = range(3)
# Chunks of codes that follow a chunk of scales, and the blocks whose scales that is.
_CODES_A_GROUP, _BLOCKS_A_GROUP = 16, 4


@dataclass(frozen=True)
class Panels:
    """One weight matrix, or a stack of them, for the kernels. `format` is the enum of the C++ source."""

    format: int
    data: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


def panels(weight: Weight | Linear, is_gate_up: bool = False) -> Panels:
    """[..., N, K] in panels. `is_gate_up`: the gate rows, then as many up rows; their panels come out alternating."""
    arrange = _interleaved if is_gate_up else _transposed
    if isinstance(weight, MXFP4Tensor):
        return Panels(MXFP4, _with_scales(_codes(arrange(_words(weight.codes))), arrange(_scale_words(weight.scales))))
    if isinstance(weight, FP8Tensor):
        weight = plain_matrix(weight, torch.bfloat16)
    elif weight.dtype == torch.float32 and weight.shape[-1] % 2 == 0 and holds_bfloat16(weight):
        weight = weight.to(torch.bfloat16)
    if weight.dtype == torch.bfloat16:
        return Panels(BFLOAT16, arrange(_words(weight)))
    return Panels(FLOAT32, arrange(weight))


def holds_bfloat16(weight: torch.Tensor) -> bool:
    """Whether every value of a float32 tensor is one of bfloat16."""
    # Rows at a time: of a large matrix a second copy is what is to be spared.
    rows = weight.reshape(-1, weight.shape[-1]).split(4096)
    return all(not bool((part.contiguous().view(torch.int32) & 0xFFFF).any()) for part in rows)


def unpacked(matrix: Panels, num_outputs: int) -> torch.Tensor:
    """The [N, K] matrix that `panels` arranged, in float32; of MXFP4 none."""
    assert matrix.format in (FLOAT32, BFLOAT16)
    w_NK = matrix.data.transpose(-1, -2).flatten(0, 1)[:num_outputs].contiguous()
    return w_NK if matrix.format == FLOAT32 else w_NK.view(torch.bfloat16).float()


def _words(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32)


def _scale_words(scales_NB: torch.Tensor) -> torch.Tensor:
    return _words(torch.nn.functional.pad(scales_NB, (0, -scales_NB.shape[-1] % _BLOCKS_A_GROUP)))


def _transposed(w_NC: torch.Tensor) -> torch.Tensor:
    """[..., N, C] to [..., ceil(N/16), C, 16], zero rows added."""
    padding = -w_NC.shape[-2] % LANES
    padded = torch.nn.functional.pad(w_NC, (0, 0, 0, padding)) if padding else w_NC
    return padded.unflatten(-2, (-1, LANES)).transpose(-1, -2).contiguous()


def _interleaved(w_FC: torch.Tensor) -> torch.Tensor:
    gate, up = _transposed(w_FC).chunk(2, dim=-3)
    return torch.stack([gate, up], dim=-3).flatten(-4, -3).contiguous()


def _codes(words_PCL: torch.Tensor) -> torch.Tensor:
    """Words of eight codes a lane as the loaded kernels look them up: as they are, or in the order of bytes."""
    if load_kernels().speedstack_lanes() == LANES:
        return words_PCL
    # Byte j of a lane: code j in the lower, code j + 4 in the upper nibble; then [four lanes, pair, lane, j of a pair].
    bytes_PCL4 = torch.stack([(words_PCL >> 4 * j & 15) | (words_PCL >> 12 + 4 * j & 240) for j in range(4)], dim=-1)
    grouped = bytes_PCL4.to(torch.uint8).unflatten(-2, (4, 4)).unflatten(-1, (2, 2)).transpose(-3, -2)
    return grouped.contiguous().flatten(-4).view(torch.int32)


def _with_scales(codes_PCL: torch.Tensor, scales_PGL: torch.Tensor) -> torch.Tensor:
    """Every group's chunk of scales before its chunks of codes."""
    num_chunks = codes_PCL.shape[-2] + scales_PGL.shape[-2]
    padding = -codes_PCL.shape[-2] % _CODES_A_GROUP
    padded = torch.nn.functional.pad(codes_PCL, (0, 0, 0, padding)).unflatten(-2, (-1, _CODES_A_GROUP))
    joined = torch.cat([scales_PGL[..., None, :], padded], dim=-2).flatten(-3, -2)
    return joined[..., :num_chunks, :].contiguous()
