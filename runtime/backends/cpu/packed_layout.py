"""Weight layout of the CPU kernels: panels of 16 outputs (see kernels/weights.h).

[N, K] becomes [N/16, chunks, 16] 32-bit words. A chunk of 16 words holds, for the panel's 16 outputs, one contraction
position of float32, two of bfloat16, four of FP8 or int8, or eight of MXFP4. Packing moves bits and changes none. A
float32 matrix with bfloat16 values only is stored as bfloat16: half the bytes, the same products. MXFP4 codes have one
order per kind of instruction set; kernels reject the other one.

Legend: N outputs, K inputs (the contraction axis), F the SwiGLU width, P panels, C chunks, L lanes, G scale groups.
"""

import ctypes
from dataclasses import dataclass

import torch

from speedstack.quant.fp8 import ELEMENT_DTYPE, TILE_SIZE, FP8Tensor
from speedstack.quant.mxfp4 import MXFP4Tensor
from speedstack.runtime.backends.cpu.kernels.build import load_kernels
from speedstack.runtime.model.weights import Linear, Weight, plain_matrix

LANES = 16
FLOAT32, BFLOAT16, MXFP4_WORDS, MXFP4_BYTES, INT8, FP8 = range(6)
# Code chunks after each chunk of scales.
_CODES_A_GROUP = 16
_BLOCK = 32  # k that share a scale
_LARGEST_INT8 = 127


class Matrices(ctypes.Structure):
    """The input of packing; mirrors the struct in kernels/pack.h."""

    _fields_ = (
        ("format", ctypes.c_int32),
        ("is_gate_up", ctypes.c_int32),
        ("num_matrices", ctypes.c_int64),
        ("N", ctypes.c_int64),
        ("K", ctypes.c_int64),
        ("values", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("panels", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Panels:
    """One weight matrix, or a stack, in panels. `format`: the enum of the C++ source. `data`: float32 or int32 [..., P,
    C, 16].
    """

    format: int
    data: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


def panels(weight: Weight | Linear, is_gate_up: bool = False, to_int8: bool = False) -> Panels:
    """Packs [..., N, K].

    is_gate_up: gate rows, then as many up rows; their panels alternate in the result.
    to_int8: round to eight bits in blocks of 32 inputs if K is whole blocks and the weight is not packed.

    Raises ValueError if the kernels cannot be built (see `load_kernels`) or int8 cannot hold a value.
    """
    if isinstance(weight, MXFP4Tensor):
        format = load_kernels().speedstack_mxfp4_format()
        return _packed(format, weight.shape[-1], weight.codes, weight.scales, is_gate_up)
    if isinstance(weight, FP8Tensor):
        if not to_int8 and weight.shape[-1] % _BLOCK == 0 and not weight.has_nan():
            return _packed(FP8, weight.shape[-1], weight.codes_OI, _fp8_scales(weight), is_gate_up)
        weight = plain_matrix(weight, torch.bfloat16)
    if to_int8 and weight.shape[-1] % _BLOCK == 0:
        return _packed(INT8, weight.shape[-1], *int8_blocks(weight), is_gate_up)
    if weight.dtype == torch.float32 and weight.shape[-1] % 2 == 0 and holds_bfloat16(weight):
        weight = weight.to(torch.bfloat16)
    format = BFLOAT16 if weight.dtype == torch.bfloat16 else FLOAT32
    return _packed(format, weight.shape[-1], weight, None, is_gate_up)


def _packed(
    format: int, num_inputs: int, values_NK: torch.Tensor, scales_NG: torch.Tensor | None, is_gate_up: bool
) -> Panels:
    kernels, num_outputs = load_kernels(), values_NK.shape[-2]
    assert not is_gate_up or num_outputs % (2 * LANES) == 0
    shape = (*values_NK.shape[:-2], -(-num_outputs // LANES), kernels.speedstack_panel_bytes(format, num_inputs) // 64)
    data_PCL = torch.empty(*shape, LANES, dtype=torch.float32 if format == FLOAT32 else torch.int32)
    values, scales = values_NK.contiguous(), None if scales_NG is None else scales_NG.contiguous()
    matrices = Matrices(
        format=format,
        is_gate_up=is_gate_up,
        num_matrices=values.shape[:-2].numel(),
        N=num_outputs,
        K=num_inputs,
        values=values.data_ptr(),
        scales=None if scales is None else scales.data_ptr(),
        panels=data_PCL.data_ptr(),
    )
    status = kernels.speedstack_pack(ctypes.byref(matrices), ctypes.sizeof(matrices), torch.get_num_threads())
    assert status == 0, "kernels and panels disagree about what is packed"
    return Panels(format, data_PCL)


def holds_bfloat16(weight: torch.Tensor) -> bool:
    """Whether every value of a float32 tensor is a bfloat16 value."""
    # In parts, to avoid a second copy of a large matrix.
    rows = weight.reshape(-1, weight.shape[-1]).split(4096)
    return all(not bool((part.contiguous().view(torch.int32) & 0xFFFF).any()) for part in rows)


def int8_blocks(weight_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Int8 codes [N, K] in -127..127 and bfloat16 scales [N, K/32], rounded to nearest. Raises ValueError unless
    finite.
    """
    w_NBK = weight_NK.float().unflatten(-1, (-1, _BLOCK))
    scales_NB = (w_NBK.abs().amax(-1) / _LARGEST_INT8).to(torch.bfloat16)
    if not bool(scales_NB.isfinite().all()):
        raise ValueError("a matrix has values that are not finite, which eight bits cannot hold: keep it as stored")
    divisors_NB = torch.where(scales_NB == 0, 1.0, scales_NB.float())
    codes_NBK = (w_NBK / divisors_NB[..., None]).round().clamp(-_LARGEST_INT8, _LARGEST_INT8)
    return codes_NBK.to(torch.int8).flatten(-2), scales_NB


def unpacked(matrix: Panels, num_outputs: int) -> torch.Tensor:
    """The float32 values [N, K] that the kernels multiply by; not for MXFP4."""
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


def _fp8_scales(weight: FP8Tensor) -> torch.Tensor:
    """Float32 scales [N, G] of every output and group of code chunks."""
    num_outputs, num_inputs = weight.shape
    scales_NQ = weight.scales_PQ.float().repeat_interleave(weight.tile_rows, 0)[:num_outputs]
    num_groups = -(-num_inputs // (4 * _CODES_A_GROUP))
    return scales_NQ.repeat_interleave(TILE_SIZE // (4 * _CODES_A_GROUP), 1)[:, :num_groups]


def _without_scales(data_PCL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    num_chunks, size = data_PCL.shape[-2], _CODES_A_GROUP + 1
    padded = torch.nn.functional.pad(data_PCL, (0, 0, 0, -num_chunks % size)).unflatten(-2, (-1, size))
    codes_PCL = padded[..., 1:, :].flatten(-3, -2)[..., : num_chunks - padded.shape[-3], :]
    return codes_PCL, padded[..., 0, :]
