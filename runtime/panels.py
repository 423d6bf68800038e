"""Weights in the order that the CPU kernels read them: panels of 16 outputs (see kernels/weights.h).

[N, K] becomes [N/16, chunks, 16] words of 32 bits: a chunk of 16 words holds one contraction position of float32, two
of bfloat16, four of FP8 or eight of MXFP4, for the panel's 16 outputs. Bits are moved, never changed.

A float32 matrix that holds nothing but values of bfloat16, as one from a bfloat16 checkpoint does, is moved as
bfloat16: half the bytes, the same products.

Legend: N outputs, K inputs (the contraction axis), F the SwiGLU width, P panels, C chunks, L lanes, G scale groups.
"""

from dataclasses import dataclass

import torch

from speedstack.quant.fp8 import ELEMENT_DTYPE, TILE_SIZE, FP8Tensor
from speedstack.quant.mxfp4 import MXFP4Tensor
from speedstack.runtime.kernels.build import load_kernels
from speedstack.runtime.weights import Linear, Weight, plain_matrix

LANES = 16
FLOAT32, BFLOAT16, MXFP4, INT8, FP8 = range(5)
# Chunks of codes that follow a chunk of scales.
_CODES_A_GROUP = 16
_BLOCK = 32  # k that share a scale
_LARGEST_INT8 = 127


@dataclass(frozen=True)
class Panels:
    """One weight matrix, or a stack of them, for the kernels. `format` is the enum of the C++ source."""

    format: int
    data: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


def panels(weight: Weight | Linear, is_gate_up: bool = False, to_int8: bool = False) -> Panels:
    """[..., N, K] in panels.

    is_gate_up: the gate rows, then as many up rows; their panels come out alternating.
    to_int8: rounded to eight bits in blocks of 32 inputs, where K is whole blocks; never what is packed already.
    """
    arrange = _interleaved if is_gate_up else _transposed
    if isinstance(weight, MXFP4Tensor):
        return Panels(
            MXFP4, _with_scales(_codes(arrange(_words(weight.codes))), arrange(_scale_words(weight.scales, 4)))
        )
    if isinstance(weight, FP8Tensor):
        if not to_int8 and weight.shape[-1] % _BLOCK == 0 and not weight.has_nan():
            codes_PCL = _byte_words(arrange(weight.codes_OI.view(torch.int8)))
            return Panels(FP8, _with_scales(codes_PCL, arrange(_fp8_scale_words(weight))))
        weight = plain_matrix(weight, torch.bfloat16)
    if to_int8 and weight.shape[-1] % _BLOCK == 0:
        codes_NK, scales_NB = int8_blocks(weight)
        return Panels(INT8, _with_scales(_byte_words(arrange(codes_NK)), arrange(_scale_words(scales_NB, 2))))
    if weight.dtype == torch.float32 and weight.shape[-1] % 2 == 0 and holds_bfloat16(weight):
        weight = weight.to(torch.bfloat16)
    if weight.dtype == torch.bfloat16:
        return Panels(BFLOAT16, arrange(_words(weight)))
    return Panels(FLOAT32, arrange(weight))


def holds_bfloat16(weight: torch.Tensor) -> bool:
    """Whether every value of a float32 tensor is one of bfloat16."""
    # Rows at a time: of a large matrix a second copy is what is to be spared.
    rows = weight.reshape(-1, weight.shape[-1]).split(4096)
    return all(not bool((part.contiguous().view(torch.int32) & 0xFFFF).any()) for part in rows)


def int8_blocks(weight_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, int8 [N, K] from -127 to 127, and scales, bfloat16 [N, K/32]: code times scale is nearest the weight.

    Raises ValueError for values that are not finite.
    """
    w_NBK = weight_NK.float().unflatten(-1, (-1, _BLOCK))
    scales_NB = (w_NBK.abs().amax(-1) / _LARGEST_INT8).to(torch.bfloat16)
    if not bool(scales_NB.isfinite().all()):
        raise ValueError("a matrix has values that are not finite, which eight bits cannot hold: keep it as stored")
    divisors_NB = torch.where(scales_NB == 0, 1.0, scales_NB.float())
    codes_NBK = (w_NBK / divisors_NB[..., None]).round().clamp(-_LARGEST_INT8, _LARGEST_INT8)
    return codes_NBK.to(torch.int8).flatten(-2), scales_NB


def unpacked(matrix: Panels, num_outputs: int) -> torch.Tensor:
    """The values [N, K] that the kernels multiply by, in float32; not of MXFP4."""
    if matrix.format in (INT8, FP8):
        codes_PCL, scales_PGL = _without_scales(matrix.data)
        dtype = torch.int8 if matrix.format == INT8 else ELEMENT_DTYPE
        codes_PKL = codes_PCL.contiguous().view(dtype).unflatten(-1, (4, LANES)).flatten(-3, -2).float()
        if matrix.format == INT8:
            scales_PGLB = scales_PGL.contiguous().view(torch.bfloat16).unflatten(-1, (LANES, 2))
            scales_PBL = scales_PGLB.transpose(-1, -2).flatten(-3, -2).float()
        else:
            scales_PBL = scales_PGL.contiguous().view(torch.float32).repeat_interleave(2, 1)
        w_PKL = codes_PKL * scales_PBL.repeat_interleave(_BLOCK, 1)[:, : codes_PKL.shape[1]]
        if matrix.format == FP8:
            w_PKL = w_PKL.to(torch.bfloat16).float()
        return w_PKL.transpose(-1, -2).flatten(0, 1)[:num_outputs].contiguous()
    assert matrix.format in (FLOAT32, BFLOAT16)
    w_NK = matrix.data.transpose(-1, -2).flatten(0, 1)[:num_outputs].contiguous()
    return w_NK if matrix.format == FLOAT32 else w_NK.view(torch.bfloat16).float()


def _words(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32)


def _byte_words(codes_PKL: torch.Tensor) -> torch.Tensor:
    """Bytes of four contraction positions a chunk."""
    return codes_PKL.unflatten(-2, (-1, 4)).flatten(-2).view(torch.int32)


def _fp8_scale_words(weight: FP8Tensor) -> torch.Tensor:
    """Float32 scales of every output and group of chunks of codes, [N, G], as words."""
    num_outputs, num_inputs = weight.shape
    scales_NQ = weight.scales_PQ.float().repeat_interleave(weight.tile_rows, 0)[:num_outputs]
    num_groups = -(-num_inputs // (4 * _CODES_A_GROUP))
    return _words(scales_NQ.repeat_interleave(TILE_SIZE // (4 * _CODES_A_GROUP), 1)[:, :num_groups])


def _scale_words(scales_NB: torch.Tensor, num_a_word: int) -> torch.Tensor:
    return _words(torch.nn.functional.pad(scales_NB, (0, -scales_NB.shape[-1] % num_a_word)))


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


def _without_scales(data_PCL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    num_chunks, size = data_PCL.shape[-2], _CODES_A_GROUP + 1
    padded = torch.nn.functional.pad(data_PCL, (0, 0, 0, -num_chunks % size)).unflatten(-2, (-1, size))
    codes_PCL = padded[..., 1:, :].flatten(-3, -2)[..., : num_chunks - padded.shape[-3], :]
    return codes_PCL, padded[..., 0, :]
