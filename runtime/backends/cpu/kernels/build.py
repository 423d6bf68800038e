"""Builds and loads `decode_cpu.cpp`, the decode kernels of backend 'cpu', for the instruction set of this machine."""

import ctypes
import os
import platform
from functools import cache
from pathlib import Path

from speedstack.quant.kernels.build import load_library

SOURCE = Path(__file__).with_name("decode_cpu.cpp")
HEADERS = (
    *("simd.h", "weights.h", "matmul.h", "program.h", "thread_pool.h"),
    *("attention.h", "dense.h", "experts.h", "head.h", "pack.h"),
)
# No -march=native: any of the machine's instruction sets can be built and tested. No -ffast-math and no contraction:
# the source fixes the order and rounding of sums on every set.
FLAGS = ("-O3", "-std=c++20", "-ffp-contract=off", "-pthread", "-shared", "-fPIC")
# Best first, with the required flags of /proc/cpuinfo.
INSTRUCTION_SETS = {
    "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx2", "fma", "f16c"),
    "avx2": ("avx2", "fma", "f16c"),
    "neon": (),
}
# Choice and order of equivalent instructions: measured, a third of the speed of two rows on AVX2.
TUNING = {"avx2": ("-mtune=haswell",)}
VARIABLE = "SPEEDSTACK_CPU"


def available_sets() -> list[str]:
    """This machine's INSTRUCTION_SETS, best first."""
    machine = platform.machine().lower()
    if machine in ("aarch64", "arm64"):
        return ["neon"]
    if machine not in ("x86_64", "amd64"):
        return []
    found = _cpu_flags()
    return [name for name, flags in INSTRUCTION_SETS.items() if flags and found.issuperset(flags)]


def choose_set() -> str:
    """The instruction set to build for: SPEEDSTACK_CPU, else the best. Raises ValueError if the machine lacks it."""
    available, wanted = available_sets(), os.environ.get(VARIABLE)
    if not available:
        raise ValueError("backend 'cpu' needs a processor with AVX2 and FMA, or NEON; use backend='reference'")
    if not wanted:
        return available[0]
    if wanted not in available:
        raise ValueError(f"{VARIABLE}={wanted!r}: this machine has {' and '.join(available)}; name one, or unset it")
    return wanted


def flags_of(instruction_set: str) -> tuple[str, ...]:
    """The compiler's flags for one of INSTRUCTION_SETS."""
    named = (f"-m{flag}" for flag in INSTRUCTION_SETS[instruction_set])
    return (*FLAGS, *named, *TUNING.get(instruction_set, ()))


def load_kernels() -> ctypes.CDLL:
    """The compiled kernels, built on first use. Raises ValueError as `load_library` and `choose_set`."""
    return _load(choose_set())


@cache
def _load(instruction_set: str) -> ctypes.CDLL:
    headers = [SOURCE.with_name(header) for header in HEADERS]
    return load_library(SOURCE, "backend 'cpu'", headers, flags_of(instruction_set))


@cache
def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(word for line in lines if line.startswith("flags") for word in line.split())
