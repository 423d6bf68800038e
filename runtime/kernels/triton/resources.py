"""What a compiled kernel takes of a multiprocessor, found without a GPU.

Triton compiles for a GPU that is not there, with the assembler that it brings; the assembler says how many registers a
kernel takes and what it spills to memory.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from speedstack.runtime.kernels.triton.phase import phase_kernel
from speedstack.runtime.launches import Launch

HOPPER = 90
# Shared memory that one program may take on an H100 or H200 (CUDA C++ Programming Guide, compute capability 9.0).
MAX_SHARED_BYTES = 227 * 1024
_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.float8_e4m3fn: "*fp8e4nv",
}


@dataclass(frozen=True)
class Resources:
    """Of one kernel. registers: a thread's. local_bytes: a thread's in memory, which is where registers are spilled."""

    registers: int
    shared_bytes: int
    local_bytes: int


def signature(kernel: Any, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[tuple[int, ...], Any]]:
    """Types of a kernel's arguments by name, and values of those fixed at compile time by place, as a call has them."""
    types: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    for place, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        is_one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or is_one:
            types[parameter.name], constants[(place,)] = "constexpr", value
        else:
            types[parameter.name] = _type(value)
    return types, constants


def compile_kernel(kernel: Any, arguments: Mapping[str, Any], options: dict[str, Any], capability: int = HOPPER) -> Any:
    """Compiles a kernel for its arguments, with pointers aligned as an allocator's are. Triton's compiled kernel."""
    types, constants = signature(kernel, arguments)
    aligned: dict[tuple[int, ...], Any] = {}
    for place, (parameter, kind) in enumerate(zip(kernel.params, types.values(), strict=True)):
        value = arguments[parameter.name]
        if isinstance(kind, tuple):
            aligned |= {(place, inner): [["tt.divisibility", 16]] for inner in range(len(kind))}
        elif kind.startswith("*") or (kind == "i32" and value % 16 == 0 and not parameter.do_not_specialize):
            aligned[place,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, types, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def compile_launch(launch: Launch, capability: int = HOPPER, is_dependent: bool = True) -> Resources:
    """What a phase's own kernel takes."""
    options = launch.options(is_dependent)
    return resources_of(compile_kernel(phase_kernel, launch.arguments(is_dependent), options, capability))


def _type(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_type(element) for element in value)
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def resources_of(built: Any) -> Resources:
    """What a compiled kernel takes."""
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory) / "kernel.cubin"
        cubin.write_bytes(built.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        listing = subprocess.run(
            [tool, "-res-usage", cubin], capture_output=True, text=True, check=True
        ).stdout  # fmt: skip
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", listing)
    assert found, listing
    return Resources(int(found[1]), built.metadata.shared, int(found[2]) + int(found[3]))
