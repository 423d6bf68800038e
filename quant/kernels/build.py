"""Compiles and loads a C++ source, cached by source, flags, compiler and (with -march=native) CPU.

It uses plain C symbols and ctypes: without torch headers a build takes seconds, works for any torch and needs only a
C++ compiler with OpenMP. Cache: `$SPEEDSTACK_CACHE`, else `$XDG_CACHE_HOME/speedstack`, else `~/.cache/speedstack`.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from speedstack.support.files import atomic_path

# Never -ffast-math: it reorders sums, and results depend on their order.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
BUILD_TIMEOUT_SECONDS = 300


def cache_dir() -> Path:
    """The cache of compiled kernels. Raises ValueError for a user without a home directory."""
    if os.environ.get("SPEEDSTACK_CACHE"):
        return Path(os.environ["SPEEDSTACK_CACHE"])
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "speedstack"
    except RuntimeError as error:
        raise ValueError(f"there is no home directory to cache kernels in ({error}): set SPEEDSTACK_CACHE") from error


def find_compiler(needed_by: str) -> str:
    """Path of `$CXX`, else of g++ or c++. Raises ValueError, naming `needed_by`, if there is none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++"]
    for name in names:
        path = shutil.which(name)
        if path:
            return path
    raise ValueError(f"{needed_by} needs GCC, and {' or '.join(names)} is not there: install it, or set CXX")


def load_library(
    source: Path, needed_by: str, headers: Sequence[Path] = (), flags: Sequence[str] = FLAGS
) -> ctypes.CDLL:
    """The library of one source and its headers, built unless cached; errors name `needed_by`.

    Raises ValueError if there is no compiler, if it fails (with its first error line), or if the cache cannot be used.
    """
    compiler = find_compiler(needed_by)
    texts = [path.read_text(encoding="utf-8") for path in (source, *headers)]
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
        made_for = _cpu_identity() if "-march=native" in flags else platform.machine()
        identity = "\n".join([*texts, " ".join(flags), compiler, version, made_for])
        library = cache_dir() / f"{source.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
        if not library.exists():
            _compile(compiler, source, flags, library, needed_by)
        return ctypes.CDLL(str(library.resolve()))
    except (OSError, subprocess.SubprocessError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{needed_by} cannot be built in {cache_dir()} ({reason}); set SPEEDSTACK_CACHE to a directory that can "
            "be written and executed from"
        ) from error


def _cpu_identity() -> str:
    # Another CPU that shares the cache must not reuse native code.
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )


def _compile(compiler: str, source: Path, flags: Sequence[str], library: Path, needed_by: str) -> None:
    with atomic_path(library) as built:
        result = subprocess.run(
            [compiler, *flags, str(source), "-o", str(built)],
            capture_output=True,
            text=True,
            timeout=BUILD_TIMEOUT_SECONDS,
            check=False,
        )
        if result.returncode:
            errors = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()
            raise ValueError(f"{compiler} could not build {needed_by}: {errors[0] if errors else 'no message'}")
