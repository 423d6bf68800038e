"""The machine and software of a measurement, read from the operating system and the installed packages.

Unreadable fields say "unknown". The host's name is left out, because reports are shared.
"""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from speedstack.eval.results.failures import one_line
from speedstack.eval.results.labels import printable

if TYPE_CHECKING:
    from speedstack.eval.results.schema import Environment

PACKAGES = ("speedstack", "torch", "transformers", "datasets", "deepspeed", "lm_eval", "safetensors", "triton", "numpy")
THREAD_SETTINGS = ("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_")
# Which scikit-learn sets when it is imported, and with which nothing runs otherwise.
_SET_BY_IMPORTS = ("KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK")


def describe_environment() -> "Environment":
    """The running process's environment; `num_threads` is torch's intra-op count."""
    from speedstack.eval.results.schema import Environment

    return Environment(**environment_fields())


def environment_fields() -> dict[str, Any]:
    """The same as plain values, without pydantic."""
    return {
        "machine": platform.machine(),
        "operating_system": _operating_system(),
        "cpu_model": _cpu_model(),
        "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "num_threads": torch.get_num_threads(),
        "memory_bytes": _memory_bytes(),
        "gpus": _gpus(),
        "python": platform.python_version(),
        "packages": package_versions(PACKAGES),
        "git_sha": _git_sha(Path(__file__).resolve()),
        "command": command_line(),
        "thread_settings": {
            name: printable(value)
            for name, value in sorted(os.environ.items())
            if name.startswith(THREAD_SETTINGS) and name not in _SET_BY_IMPORTS
        },
    }


def command_line() -> str | None:
    """The command that runs this process, None for commands that are not ours."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.name.partition(".")[0] == "speedstack":
        name = spec.name.removesuffix(".__main__")
        program = ["speedstack"] if name == "speedstack" else ["python", "-m", name]
    elif sys.argv and Path(sys.argv[0]).name == "speedstack":
        program = ["speedstack"]
    else:
        return None
    if "TORCHELASTIC_RUN_ID" in os.environ:
        module = program[1:] if len(program) > 1 else ["-m", *program]
        program = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1"), *module]
    return printable(shlex.join([*program, *sys.argv[1:]]))


def package_versions(names: Sequence[str]) -> dict[str, str]:
    """Versions of the installed ones among the packages."""
    return {name: version for name in names if (version := _version(name)) is not None}


class LoadWatch:
    """A context that measures how busy other processes keep the machine.

    Afterwards `busy_cores_of_others` is the mean number of cores used by others than this process and its finished
    children; None without /proc/stat.
    """

    busy_cores_of_others: float | None = None

    def __enter__(self) -> "LoadWatch":
        self._before = _busy_seconds(), _own_seconds(), time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        busy_before, own_before, started = self._before
        busy, own, seconds = _busy_seconds(), _own_seconds(), time.monotonic() - started
        if busy is None or busy_before is None or seconds <= 0:
            return
        self.busy_cores_of_others = max(0.0, (busy - busy_before - (own - own_before)) / seconds)


def _busy_seconds() -> float | None:
    """Busy seconds of all cores since boot."""
    try:
        fields = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    ticks = dict(zip(("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal"), fields, strict=False))
    # Waiting is not work; what a hypervisor took away is missing from the machine as if it were.
    working = ("user", "nice", "system", "irq", "softirq", "steal")
    return sum(int(ticks.get(name, 0)) for name in working) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    return sum(os.times()[:4])


def _memory_bytes() -> int:
    """The machine's memory, 0 if unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return 0


def _gpus() -> tuple[str, ...]:
    """Names of the GPUs torch sees; a failing driver is named, not raised."""
    try:
        return tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    except RuntimeError as error:
        return (f"unknown ({one_line(error)})",)


def _operating_system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system() or "unknown"


def _cpu_model() -> str:
    """The processor's marketing name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_sha(source: Path) -> str | None:
    """HEAD of the checkout that tracks `source`, None if installed elsewhere."""
    git = ["git", "-C", str(source.parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", source.name], capture_output=True, check=True, timeout=10)
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, check=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip()
