"""Registers and spills of compiled kernels, without a GPU: Triton compiles for one and brings the assembler."""

import re
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import triton

from speedstack.eval.microbench.sass import Issue, issues, listing_of, product_of
from speedstack.runtime.backends.gpu.bindings.layers import SLICE
from speedstack.runtime.backends.gpu.kernels.aot_compile import compile_kernel
from speedstack.runtime.backends.gpu.kernels.layers.matmul import num_slices
from speedstack.runtime.backends.gpu.kernels.single_op import phase_kernel
from speedstack.runtime.backends.gpu.op_launch import Launch
from speedstack.runtime.model.weight_formats import BITS
from speedstack.runtime.plan.tiling import ceil_div

# Shared memory that one program may take on an H100 or H200 (CUDA C++ Programming Guide, compute capability 9.0).
MAX_SHARED_BYTES = 227 * 1024


@dataclass(frozen=True)
class Resources:
    """Of one kernel. registers, local_bytes (spills): per thread. issues: of the code that multiplies weights."""

    registers: int
    shared_bytes: int
    local_bytes: int
    issues: tuple[Issue, ...] = ()


def compile_launch(launch: Launch) -> Resources:
    """Resources of a phase's own kernel."""
    built = compile_kernel(phase_kernel, launch.arguments(is_dependent=True), launch.options(is_dependent=True))
    bits = weight_bits(launch)
    if bits is None:
        return resources_of(built)
    product = product_of(built.asm["ttgir"])
    found = issues(listing_of(_run("nvdisasm", "-c", built)), product, bits, share_of_stretches(launch))
    return replace(resources_of(built), issues=tuple(found))


def weight_bits(launch: Launch) -> float | None:
    """Bits of a weight that a phase multiplies on tensor cores; None if it multiplies none."""
    constants = launch.binding.constants
    if constants.op in ("expert_gate_up", "expert_down"):
        return BITS["mxfp4" if constants.IS_PACKED else "bf16"]
    if constants.op in ("qkv", "o_proj", "dense_gate_up", "dense_down", "lm_head"):
        return BITS["fp8" if constants.FP8_ROWS > 0 else "bf16"]
    return BITS["bf16"] if constants.op in ("fuse", "context") else None


def share_of_stretches(launch: Launch) -> float:
    """The share of real weights in what a phase multiplies: contraction axes are padded to stretches of slices."""
    c = launch.binding.constants
    size = {"expert_down": "WIDTH", "o_proj": "K", "dense_down": "K"}.get(c.op, "D")
    num_weights = c.values[size]
    is_packed = c.values.get("IS_PACKED", False)
    stretch = c.SLICES * SLICE if is_packed else num_slices(num_weights, c.CHUNK) * c.CHUNK
    return num_weights / (ceil_div(num_weights, stretch) * stretch)


def resources_of(built: Any) -> Resources:
    listing = _run("cuobjdump", "-res-usage", built)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", listing)
    assert found, listing
    return Resources(int(found[1]), built.metadata.shared, int(found[2]) + int(found[3]))


def _run(tool: str, option: str, built: Any) -> str:
    """Output of one of Triton's binary tools on a compiled kernel."""
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory) / "kernel.cubin"
        cubin.write_bytes(built.asm["cubin"])
        path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
        return subprocess.run([path, option, cubin], capture_output=True, text=True, check=True).stdout
