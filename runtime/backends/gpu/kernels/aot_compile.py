"""Compiles kernels without their GPU into Triton's disk cache, for inspection or for its JIT to find.

Compiling goes through the JIT with a driver that only knows the GPU's target, so the cache key is that of a real
launch: source, types, alignments and values of arguments, options and target. The JIT itself compiles kernels one at a
time, at their first launch.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from speedstack.runtime.backends.gpu.kernels.ptxas_workaround import first_values

HOPPER = (9, 0)


class AbsentGpu:
    """What the JIT asks of a driver before a launch; it cannot launch."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        # The JIT keys kernels by device: do not collide with a real one.
        return f"sm_{self.target.arch}, not there"

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def driven_by(other: Any) -> Iterator[None]:
    """Makes `other` Triton's driver inside the block."""
    before = driver._active
    driver.set_active(other)
    try:
        yield
    finally:
        driver._active = before


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Names of the kernels that Triton compiles inside the block because the disk cache lacks them."""
    found, before = list[str](), knobs.compilation.listener

    def listen(**what: Any) -> None:
        if not what["cache_hit"]:
            found.append(what["src"].name)
        if before is not None:
            before(**what)

    knobs.compilation.listener = listen
    try:
        yield found
    finally:
        knobs.compilation.listener = before


def compile_kernel(
    kernel: Any, arguments: Mapping[str, Any], options: Mapping[str, Any], capability: tuple[int, int] = HOPPER
) -> Any:
    """Compiles the kernel that this launch would need, or takes it from the cache; returns Triton's kernel.

    Tensors may be on any device, meta included; allocations are assumed to start at multiples of 16 bytes, as on a GPU.
    """
    with driven_by(AbsentGpu(capability)), first_values():
        return kernel.warmup(**arguments, **options, grid=(1,))
