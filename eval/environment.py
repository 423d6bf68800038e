"""What a result was measured on: machine, processor, threads, package versions, source revision.

Read from the operating system and the installed packages; a field that cannot be read says "unknown" rather than fail,
because a report without a processor's name is still a report. The host's name is left out: reports are shared.
"""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from speedstack.eval.results import Environment

PACKAGES = ("speedstack", "torch", "transformers", "datasets", "deepspeed", "lm_eval", "safetensors", "triton", "numpy")


def describe_environment() -> "Environment":
    """The running process's environment; `num_threads` is what torch uses inside an operation."""
    from speedstack.eval.results import Environment

    return Environment(**environment_fields())


def environment_fields() -> dict[str, Any]:
    """The same as plain values: a machine that measures need not have what checks a schema."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "machine": platform.machine(),
        "operating_system": _operating_system(),
        "cpu_model": _cpu_model(),
        "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "num_threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": tuple(gpus),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "git_sha": _git_sha(Path(__file__).resolve()),
    }


def _operating_system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system() or "unknown"


def _cpu_model() -> str:
    """The processor's marketing name; /proc has it on Linux, the platform module elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_sha(source: Path) -> str | None:
    """HEAD of the checkout that tracks `source`; None when installed elsewhere, so no stranger's revision is named."""
    git = ["git", "-C", str(source.parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", source.name], capture_output=True, check=True, timeout=10)
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, check=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip()
