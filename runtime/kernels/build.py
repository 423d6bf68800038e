"""Builds and loads `decode_cpu.cpp`, the decode kernels of backend 'cpu'."""

import ctypes
from functools import cache
from pathlib import Path

from speedstack.quant.kernels.build import load_library

SOURCE = Path(__file__).with_name("decode_cpu.cpp")
HEADERS = ("simd.h", "panels.h", "program.h", "attention.h", "experts.h", "head.h")


@cache
def load_kernels() -> ctypes.CDLL:
    """The compiled kernels, built on first use. Raises ValueError as `load_library` does.

    Products and sums are fused by GCC's default contraction, in every tile alike; the tests compare the bits of all
    tile shapes.
    """
    return load_library(SOURCE, "backend 'cpu'", [SOURCE.with_name(header) for header in HEADERS])
