"""Joules that a GPU has used, by the counter of NVIDIA's driver.

NVML counts the board's energy since the driver was loaded, in millijoules, on GPUs since Volta. The counter moves every
20 to 100 ms, so figures of single short calls are coarse and sums over many are not. Its Python bindings are
nvidia-ml-py, an optional dependency (`energy`). A CPU has no such meter here. A meter that fails ends the counting, not
the measurement.
"""

import importlib
import logging
from types import TracebackType
from typing import Any, Self

import torch

logger = logging.getLogger(__name__)


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
        """Energy used until now, from an arbitrary zero."""
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3

    def close(self) -> None:
        """Lets go of the driver."""
        self._nvml.nvmlShutdown()


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


def _close(meter: NvmlMeter) -> None:
    """What was measured is worth more than a meter that fails at its end."""
    try:
        meter.close()
    except Exception as error:  # NVMLError, of a package that may not be there
        logger.debug("closing the meter: %s", error)


def _open(device: torch.device) -> tuple[NvmlMeter | None, str]:
    if device.type != "cuda":
        return None, f"joules are those of an NVIDIA GPU, and this ran on {device.type}"
    # Indices of the driver are not those of CUDA_VISIBLE_DEVICES.
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    try:
        return NvmlMeter(uuid), ""
    except ImportError:
        return None, "pynvml is not installed (pip install nvidia-ml-py, or speedstack[energy])"
    except Exception as error:  # NVMLError, of a package that may not be there
        return None, f"NVML: {error}"
