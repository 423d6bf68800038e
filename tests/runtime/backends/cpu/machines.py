"""What checks in C++ are compiled for and run on: each instruction set of this machine, and NEON under an emulator."""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from speedstack.quant.kernels.build import cache_dir, find_compiler
from speedstack.runtime.backends.cpu.kernels import build

KERNELS = Path(build.__file__).parent
HERE = Path(__file__).parent
# As the library is built, but for being one.
FLAGS = tuple(flag for flag in build.FLAGS if flag not in ("-shared", "-fPIC"))
BUILD_SECONDS, RUN_SECONDS = 250, 250


@dataclass(frozen=True)
class Machine:
    """A compiler for an instruction set, and what a program that it made is run by."""

    name: str
    compiler: str
    flags: tuple[str, ...]
    runner: tuple[str, ...] = ()

    def build(self, source: Path, *flags: str) -> Path:
        """`source` compiled against the kernels' headers, as a program unless `flags` say otherwise.

        What was built is kept beside the kernels for all test processes and later runs, by all that went into it.
        """
        command = [self.compiler, *FLAGS, *self.flags, f"-I{KERNELS}", *flags]
        texts = [file.read_text(encoding="utf-8") for file in (source, *sorted(KERNELS.glob("*.[ch]*")))]
        version = subprocess.run([self.compiler, "--version"], capture_output=True, text=True, check=True).stdout
        identity = hashlib.sha256("\n".join([*texts, *command, version]).encode()).hexdigest()
        built = cache_dir() / "tests" / f"{source.stem}-{identity[:16]}"
        if not built.exists():
            built.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=built.parent) as scratch:
                to = Path(scratch) / built.name
                result = subprocess.run(
                    [*command, str(source), "-o", str(to)], capture_output=True, text=True, timeout=BUILD_SECONDS
                )
                assert result.returncode == 0, result.stderr
                os.replace(to, built)
        return built

    def run(self, program: Path, *words: str) -> str:
        """What it prints; a failed assertion with that where it does not return 0."""
        command = [*self.runner, str(program), *words]
        result = subprocess.run(command, capture_output=True, text=True, timeout=RUN_SECONDS)
        assert result.returncode == 0, f"{result.returncode}: {result.stdout}{result.stderr}"
        return result.stdout


def find_machine(name: str) -> Machine:
    """The test is skipped, with what is missing, where there is no way to run it."""
    flags = build.flags_of(name)[len(build.FLAGS) :]
    if name in build.available_sets():
        return Machine(name, find_compiler("the test"), flags)
    if name != "neon":
        pytest.skip(f"this machine has no {name}")
    compiler, emulator = "aarch64-linux-gnu-g++", shutil.which("qemu-aarch64")
    if emulator is None or shutil.which(compiler) is None:
        pytest.skip(f"NEON on {platform.machine()} needs {compiler} and qemu-aarch64")
    return Machine(name, compiler, (*flags, "-static"), (emulator,))
