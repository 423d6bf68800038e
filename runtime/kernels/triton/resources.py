"""What a compiled kernel takes of a multiprocessor, found without a GPU.

Triton compiles for a GPU that is not there, with the assembler that it brings; the assembler says how many registers a
kernel takes and what it spills to memory.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from speedstack.runtime.bindings import SLICE
from speedstack.runtime.formats import BITS
from speedstack.runtime.kernels.triton.first_values import first_values
from speedstack.runtime.kernels.triton.issue import Issue, issues, listing_of, product_of
from speedstack.runtime.kernels.triton.phase import phase_kernel
from speedstack.runtime.kernels.triton.products import num_slices
from speedstack.runtime.launches import Launch
from speedstack.runtime.tiles import ceil_div

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
    """Of one kernel. registers: a thread's. local_bytes: a thread's in memory, which is where registers are spilled.

    issues: of the code that multiplies weights, where that has been looked at.
    """

    registers: int
    shared_bytes: int
    local_bytes: int
    issues: tuple[Issue, ...] = ()


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
    with first_values():
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def compile_launch(launch: Launch, capability: int = HOPPER, is_dependent: bool = True) -> Resources:
    """What a phase's own kernel takes."""
    options = launch.options(is_dependent)
    built = compile_kernel(phase_kernel, launch.arguments(is_dependent), options, capability)
    bits = weight_bits(launch)
    if bits is None:
        return resources_of(built)
    product = product_of(built.asm["ttgir"])
    found = issues(listing_of(_run("nvdisasm", "-c", built)), product, bits, share_of_stretches(launch))
    return replace(resources_of(built), issues=tuple(found))


def weight_bits(launch: Launch) -> float | None:
    """Bits of a weight that a phase multiplies on tensor cores; None where it multiplies none."""
    constants = launch.binding.constants
    if constants.op in ("expert_gate_up", "expert_down"):
        return BITS["mxfp4" if constants.IS_PACKED else "bf16"]
    if constants.op in ("qkv", "o_proj", "dense_gate_up", "dense_down", "lm_head"):
        return BITS["fp8" if constants.FP8_ROWS > 0 else "bf16"]
    return None


def share_of_stretches(launch: Launch) -> float:
    """How much of what a phase's products walk there is: a contraction axis is walked in whole stretches of slices."""
    c = launch.binding.constants
    size = {"expert_down": "WIDTH", "o_proj": "K", "dense_down": "K"}.get(c.op, "D")
    num_weights = c.values[size]
    is_packed = c.values.get("IS_PACKED", False)
    stretch = c.SLICES * SLICE if is_packed else num_slices(num_weights, c.CHUNK) * c.CHUNK
    return num_weights / (ceil_div(num_weights, stretch) * stretch)


def _type(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_type(element) for element in value)
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def resources_of(built: Any) -> Resources:
    """What a compiled kernel takes."""
    listing = _run("cuobjdump", "-res-usage", built)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", listing)
    assert found, listing
    return Resources(int(found[1]), built.metadata.shared, int(found[2]) + int(found[3]))


def _run(tool: str, option: str, built: Any) -> str:
    """What a tool of those that Triton brings says of a compiled kernel."""
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory) / "kernel.cubin"
        cubin.write_bytes(built.asm["cubin"])
        path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
        return subprocess.run([path, option, cubin], capture_output=True, text=True, check=True).stdout
