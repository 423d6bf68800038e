"""Calls `mxfp4_cpu.cpp`. Uses as many threads as torch does.

Shape suffixes as in `speedstack.quant.mxfp4`: N = leading dimensions, K = contraction, G = K / 32 blocks, H = K / 2.
"""

import ctypes
import logging
from functools import cache
from pathlib import Path

import torch

from speedstack.quant.kernels.build import FLAGS, load_library

logger = logging.getLogger("speedstack.quant")

BLOCK_SIZE = 32
# The enum of the C++ source.
_RULES = {"floor": 0, "rceil": 1, "even": 2, "mse": 3}
# Fewest blocks (a few microseconds) for which waking a thread pays.
_MIN_BLOCKS_PER_THREAD = 1024


@cache
def load_kernels() -> ctypes.CDLL | None:
    """The compiled kernels; None, with the reason logged, if they cannot be built and the reference runs."""
    source = Path(__file__).with_name("mxfp4_cpu.cpp")
    try:
        # Without contraction, because the reference rounds products before adding.
        library = load_library(source, "fast MXFP4 on a CPU", flags=(*FLAGS, "-ffp-contract=off"))
    except ValueError as reason:
        logger.warning("MXFP4 by the PyTorch reference, because %s", reason)
        return None
    pointer, count, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.mxfp4_fake_quantize.argtypes = (pointer, pointer, count, flag, flag, flag)
    library.mxfp4_quantize.argtypes = (pointer, pointer, pointer, count, flag, flag, flag)
    library.mxfp4_dequantize.argtypes = (pointer, pointer, pointer, count, flag, flag)
    for function in (library.mxfp4_fake_quantize, library.mxfp4_quantize, library.mxfp4_dequantize):
        function.restype = None
    return library


def quantize(w_NK: torch.Tensor, scale_rule: str) -> tuple[torch.Tensor, torch.Tensor]:
    """See `Kernels`."""
    codes_NH = torch.empty((*w_NK.shape[:-1], w_NK.shape[-1] // 2), dtype=torch.uint8, device="cpu")
    scales_NG = torch.empty((*w_NK.shape[:-1], w_NK.shape[-1] // BLOCK_SIZE), dtype=torch.uint8, device="cpu")
    _library().mxfp4_quantize(
        w_NK.data_ptr(),
        codes_NH.data_ptr(),
        scales_NG.data_ptr(),
        scales_NG.numel(),
        _RULES[scale_rule],
        w_NK.dtype == torch.bfloat16,
        _num_threads(scales_NG.numel()),
    )
    return codes_NH, scales_NG


def dequantize(codes_NH: torch.Tensor, scales_NG: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """See `Kernels`."""
    w_NK = torch.empty((*codes_NH.shape[:-1], codes_NH.shape[-1] * 2), dtype=dtype, device="cpu")
    _library().mxfp4_dequantize(
        codes_NH.data_ptr(),
        scales_NG.data_ptr(),
        w_NK.data_ptr(),
        scales_NG.numel(),
        dtype == torch.bfloat16,
        _num_threads(scales_NG.numel()),
    )
    return w_NK


def fake_quantize(w_NK: torch.Tensor, scale_rule: str) -> torch.Tensor:
    """See `Kernels`."""
    num_blocks = w_NK.numel() // BLOCK_SIZE
    out_NK = torch.empty_like(w_NK)
    _library().mxfp4_fake_quantize(
        w_NK.data_ptr(),
        out_NK.data_ptr(),
        num_blocks,
        _RULES[scale_rule],
        w_NK.dtype == torch.bfloat16,
        _num_threads(num_blocks),
    )
    return out_NK


def _library() -> ctypes.CDLL:
    library = load_kernels()
    assert library is not None, "kernels_for offers these kernels only where they were built"
    return library


def _num_threads(num_blocks: int) -> int:
    return max(1, min(torch.get_num_threads(), num_blocks // _MIN_BLOCKS_PER_THREAD))
