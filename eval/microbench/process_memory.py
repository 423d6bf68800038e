"""Memory of this process as the kernel counts it: heap, stacks and touched pages of mapped files. Needs Linux."""

import ctypes
import gc
from pathlib import Path

_RESET = Path("/proc/self/clear_refs")


def check_peak_is_known() -> None:
    """Raises ValueError where the system does not say how much memory a process had at most."""
    if not _RESET.exists():
        raise ValueError("peak memory is read from /proc, which this system does not have")


def restart_peak() -> int:
    """Count the peak anew from here; bytes in memory now."""
    _RESET.write_text("5")
    return resident_bytes()


def resident_bytes() -> int:
    """In memory now."""
    return _status_bytes("VmRSS")


def peak_bytes() -> int:
    """In memory at most since `restart_peak`."""
    return _status_bytes("VmHWM")


def give_back_freed() -> None:
    """Give freed memory back to the system, so that it does not count."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
