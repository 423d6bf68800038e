"""The device, and the bandwidth of a copy on it, the denominator of every fraction in the results."""

from typing import Any

import torch

from speedstack.eval.gpu_suite.scale import Scale
from speedstack.eval.results.environment import environment_fields
from speedstack.eval.results.spread import spread_fields
from speedstack.eval.speed.device_timing import device_seconds

COPIES_A_SAMPLE = 4
NUM_SAMPLES = 15


class Machine:
    """Made in a worker."""

    def __init__(self, scale: Scale) -> None:
        self.device = torch.device(scale.device)
        self.copy_bytes = scale.copy_bytes

    def describe(self) -> dict[str, Any]:
        """Software and hardware; `free_bytes` of device memory at the start."""
        found: dict[str, Any] = {"software": environment_fields(), "device": str(self.device)}
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            free, total = torch.cuda.mem_get_info(self.device)
            found |= {
                "name": properties.name,
                "num_programs": properties.multi_processor_count,
                "l2_bytes": getattr(properties, "L2_cache_size", None),
                "capability": list(torch.cuda.get_device_capability(self.device)),
                "free_bytes": free,
                "memory_bytes": total,
            }
        return found

    def copy_bandwidth(self) -> dict[str, Any]:
        """Bytes/s of a device-to-device copy, bytes read plus bytes written."""
        source = torch.empty(self.copy_bytes, dtype=torch.uint8, device=self.device)
        source.random_(0, 256)  # zeros can be faster than data
        target = torch.empty_like(source)
        target.copy_(source)

        def copies() -> None:
            for _ in range(COPIES_A_SAMPLE):
                target.copy_(source)

        seconds = [device_seconds(copies, self.device) / COPIES_A_SAMPLE for _ in range(NUM_SAMPLES)]
        if not torch.equal(source, target):
            raise RuntimeError("a copy on the device is not equal to its source")
        rates = spread_fields([2 * self.copy_bytes / value for value in seconds])
        return {
            "copy_bytes": self.copy_bytes,
            "bytes_per_second": rates,
            "best": rates["maximum"],
            "median": rates["median"],
        }
