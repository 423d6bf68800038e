"""Compiles `decode_cpu.cpp` for this machine and loads it; the result is cached by source, flags, compiler and CPU.

Plain C symbols and ctypes: no torch headers, so a build takes seconds, works for any torch, and needs nothing but a C++
compiler with OpenMP. The cache is `$SPEEDSTACK_CACHE`, else `$XDG_CACHE_HOME/speedstack`, else `~/.cache/speedstack`.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("decode_cpu.cpp")
HEADERS = ("simd.h", "panels.h", "program.h", "attention.h", "experts.h")
# No -ffast-math: it would let the compiler reorder the sums whose order row invariance rests on. Products and sums are
# fused by GCC's default contraction, in every tile alike; the tests compare the bits of all tile shapes.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
BUILD_TIMEOUT_SECONDS = 300


def cache_dir() -> Path:
    """Where compiled kernels are kept."""
    if os.environ.get("SPEEDSTACK_CACHE"):
        return Path(os.environ["SPEEDSTACK_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "speedstack"


def find_compiler() -> str:
    """Path of `$CXX` if that is set, else of g++ or c++.

    Raises:
        ValueError: none of them is there.
    """
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++"]
    for name in names:
        path = shutil.which(name)
        if path:
            return path
    raise ValueError(f"backend 'cpu' needs GCC, and {' or '.join(names)} is not there: install it, or set CXX")


def _cpu_identity() -> str:
    # -march=native code must not be reused on another CPU that shares the cache directory.
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )


@cache
def load_kernels() -> ctypes.CDLL:
    """The compiled kernels, built on first use.

    Raises:
        ValueError: there is no compiler, it failed (the message holds its first error line), or the cache directory
            cannot be used.
    """
    compiler = find_compiler()
    sources = [SOURCE.read_text(), *(SOURCE.with_name(header).read_text() for header in HEADERS)]
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
        identity = "\n".join([*sources, " ".join(FLAGS), compiler, version, _cpu_identity()])
        library = cache_dir() / f"decode_cpu-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
        if not library.exists():
            _compile(compiler, library)
        return ctypes.CDLL(str(library.resolve()))
    except (OSError, subprocess.SubprocessError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"backend 'cpu' cannot be built in {cache_dir()} ({reason}); set SPEEDSTACK_CACHE to a directory that can "
            "be written and executed from"
        ) from error


def _compile(compiler: str, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        built = Path(scratch) / library.name
        result = subprocess.run(
            [compiler, *FLAGS, str(SOURCE), "-o", str(built)],
            capture_output=True,
            text=True,
            timeout=BUILD_TIMEOUT_SECONDS,
            check=False,
        )
        if result.returncode:
            errors = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()
            raise ValueError(f"{compiler} could not build backend 'cpu': {errors[0] if errors else 'no message'}")
        os.replace(built, library)
