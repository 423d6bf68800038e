"""Compiling kernels without the GPU that they are for, into Triton's cache on disk: to look at, or for its JIT to find.

At a kernel's first launch Triton's JIT looks in that cache for what it would compile, and compiles one kernel at a time
where it finds nothing. What is compiled here goes through the JIT itself, with a driver that knows no more than which
GPU there would be. So it is filed under what a launch looks for: the source, the types, alignments and values of
arguments as the JIT specializes them, options and target.
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
    """All that the JIT asks of a driver before it launches anything. It launches nothing."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        # The JIT keeps kernels by device: not under the number of one that is there.
        return f"sm_{self.target.arch}, not there"

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def driven_by(other: Any) -> Iterator[None]:
    """Triton takes `other` for its driver inside."""
    before = driver._active
    driver.set_active(other)
    try:
        yield
    finally:
        driver._active = before


@contextmanager
def compilations() -> Iterator[list[str]]:
    """The kernels that Triton compiles inside, because it does not find them on disk, by name."""
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
    """Compiles what a launch with these arguments and options would, or takes it from the cache. Triton's kernel.

    Tensors may be on any device, the meta device too; an allocation is taken to begin at a multiple of 16 bytes, as on
    a GPU.
    """
    with driven_by(AbsentGpu(capability)), first_values():
        return kernel.warmup(**arguments, **options, grid=(1,))
