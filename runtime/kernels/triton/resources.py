"""What a compiled kernel takes of a multiprocessor, found without a GPU.

Triton compiles for a GPU that is not there, with the assembler that it brings; the assembler says how many registers a
kernel takes and what it spills to memory.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from speedstack.runtime.launches import Launch

HOPPER = 90
# Shared memory that one program may take on an H100 or H200 (CUDA C++ Programming Guide, compute capability 9.0).
MAX_SHARED_BYTES = 227 * 1024
_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Resources:
    """Of one kernel. registers: a thread's. local_bytes: a thread's in memory, which is where registers are spilled."""

    registers: int
    shared_bytes: int
    local_bytes: int


def signature(launch: Launch, is_dependent: bool) -> tuple[dict[str, str], dict[str, Any]]:
    """Types of a launch's arguments by name, and values of those that are fixed at compile time, as a call has them."""
    arguments = launch.arguments | {"IS_DEPENDENT": is_dependent}
    types, constants = {}, {}
    for parameter in launch.kernel.params:
        value = arguments[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            types[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[parameter.name] = _TYPES[value.dtype]
        else:
            types[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    return types, constants


def compile_launch(launch: Launch, capability: int = HOPPER, is_dependent: bool = True) -> Resources:
    """Compiles a launch's kernel for its shapes, with pointers aligned as an allocator's are."""
    types, constants = signature(launch, is_dependent)
    names = list(types)
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if types[name].startswith("*") or (types[name] == "i32" and launch.arguments[name] % 16 == 0)
    }
    source = ASTSource(
        launch.kernel, types, {(names.index(name),): value for name, value in constants.items()}, aligned
    )
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options(is_dependent))
    return _resources(built)


def _resources(built: Any) -> Resources:
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
