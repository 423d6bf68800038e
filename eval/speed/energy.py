"""Joules that a GPU has used, from NVIDIA's driver: a counter where there is one, else power samples added up.

NVML's counter is the board's energy since the driver was loaded, in millijoules, on GPUs since Volta; it moves every 20
to 100 ms, so figures of single short calls are coarse and sums over many are not. Without the Python bindings
`nvidia-smi` prints the power several times a second, which is integrated: the power of the moment where the driver has
it, since `power.draw` is the mean of a second on GPUs since Ampere, and calls that take turns would share it. A CPU has
no such meter here. A meter that fails ends the counting, not the measurement.
"""

import contextlib
import importlib
import logging
import shutil
import subprocess
import threading
import time
from types import TracebackType
from typing import IO, Any, Protocol, Self

import torch

logger = logging.getLogger(__name__)

SAMPLE_MS = 50
FIRST_SAMPLE_SECONDS, CLOSE_SECONDS = 10.0, 5.0
INSTANT_POWER, AVERAGE_POWER = "power.draw.instant", "power.draw"


class Meter(Protocol):
    """Counts joules, from an arbitrary zero."""

    source: str

    def joules(self) -> float:
        """Energy used until now."""
        ...

    def close(self) -> None:
        """Lets go of the driver or the process behind it."""
        ...


class NvmlMeter:
    """NVML's own counter of one GPU, through the `pynvml` bindings."""

    source = "NVML's energy counter of the GPU, over whole calls"

    def __init__(self, uuid: str) -> None:
        """Raises ImportError without the bindings, and what they raise where the GPU has no counter."""
        self._nvml: Any = importlib.import_module("pynvml")
        self._nvml.nvmlInit()
        try:
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(uuid)
            self.joules()
        except Exception:
            self._nvml.nvmlShutdown()
            raise

    def joules(self) -> float:
        """See `Meter`."""
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3

    def close(self) -> None:
        """See `Meter`."""
        self._nvml.nvmlShutdown()


class SmiMeter:
    """Power of one GPU as a running `nvidia-smi` prints it, every sample held until the next.

    `quantity` is what it is asked for.
    """

    def __init__(self, uuid: str, program: str = "nvidia-smi", quantity: str = INSTANT_POWER) -> None:
        """Raises OSError where the program does not start, ValueError where it prints no power, or none in time."""
        self.source = f"nvidia-smi's {quantity} of the GPU every {SAMPLE_MS} ms, over whole calls"
        self._lock = threading.Lock()
        self._joules, self._watts, self._since = 0.0, 0.0, time.perf_counter()
        self._process = subprocess.Popen(
            [
                program,
                f"--query-gpu={quantity}",
                "--format=csv,noheader,nounits",
                f"--id={uuid}",
                f"--loop-ms={SAMPLE_MS}",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        self._first: str | None = None
        self._began = threading.Event()
        threading.Thread(target=self._follow, args=(self._process.stdout,), daemon=True).start()
        # A driver that hangs lets nvidia-smi hang with it.
        if not self._began.wait(FIRST_SAMPLE_SECONDS):
            self.close()
            raise ValueError(f"nvidia-smi printed nothing in {FIRST_SAMPLE_SECONDS:g} s")
        if self._first is not None:
            self.close()
            raise ValueError(f"nvidia-smi printed {self._first.strip()!r} as its power")

    def joules(self) -> float:
        """See `Meter`. Raises ValueError when the program has ended, since there is no power to add any more."""
        if self._process.poll() is not None:
            raise ValueError(f"nvidia-smi ended with code {self._process.returncode} while energy was counted")
        with self._lock:
            return self._joules + self._watts * (time.perf_counter() - self._since)

    def close(self) -> None:
        """See `Meter`. A process that does not end, because the driver holds it, is left to the system."""
        for end in (self._process.terminate, self._process.kill):
            end()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(CLOSE_SECONDS)
                return
        logger.warning("nvidia-smi does not end")

    def _follow(self, lines: IO[str]) -> None:
        first = lines.readline()
        try:
            self._sample(float(first))
        except ValueError:
            self._first = first
        self._began.set()
        for line in lines:
            try:
                self._sample(float(line))
            except ValueError:  # "[N/A]" between two samples: the last one goes on
                logger.debug("nvidia-smi printed %r as its power", line)

    def _sample(self, watts: float) -> None:
        with self._lock:
            now = time.perf_counter()
            self._joules += self._watts * (now - self._since)
            self._watts, self._since = watts, now


class EnergyCounter:
    """The meter of a device, or none and why not; a context, at whose end the meter is closed."""

    def __init__(self, device: str | torch.device) -> None:
        self.meter, self.reason = _open(torch.device(device))

    @property
    def description(self) -> str:
        """One line for the result."""
        return self.meter.source if self.meter is not None else f"not counted: {self.reason}"

    def joules(self) -> float | None:
        """Energy used until now, None without a meter, and from the moment on at which the meter has failed."""
        if self.meter is None:
            return None
        try:
            return self.meter.joules()
        except Exception as error:  # NVMLError, of a package that may not be there
            logger.warning("energy is not counted any more: %s", error)
            self.reason = f"the meter failed, joules are of the repeats before ({error})"
            failed, self.meter = self.meter, None
            _close(failed)
            return None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.meter is not None:
            _close(self.meter)


def _close(meter: Meter) -> None:
    """What was measured is worth more than a meter that fails at its end."""
    try:
        meter.close()
    except Exception as error:  # NVMLError, of a package that may not be there
        logger.debug("closing the meter: %s", error)


def _open(device: torch.device) -> tuple[Meter | None, str]:
    if device.type != "cuda":
        return None, f"joules are those of an NVIDIA GPU, and this ran on {device.type}"
    # Indices of the driver are not those of CUDA_VISIBLE_DEVICES.
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    try:
        return NvmlMeter(uuid), ""
    except ImportError:
        reason = "pynvml is not installed (pip install nvidia-ml-py)"
    except Exception as error:  # NVMLError, of a package that may not be there
        reason = f"NVML: {error}"
    if shutil.which("nvidia-smi") is None:
        return None, f"{reason}, and there is no nvidia-smi"
    for quantity in (INSTANT_POWER, AVERAGE_POWER):
        try:
            return SmiMeter(uuid, quantity=quantity), ""
        except (OSError, ValueError) as error:
            last = error
    return None, f"{reason}; {last}"
