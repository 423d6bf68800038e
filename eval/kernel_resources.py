"""What the decode kernels take of a GPU's multiprocessor: `python -m speedstack.eval.kernel_resources [RESULT.json]`.

Compiles every kernel of a decode step for sm_90a at the shapes of released models, weights in bfloat16 or in FP8 and
experts in MXFP4 or bfloat16: those of the `graph` backend, and the one of the `resident` backend. Records registers,
spilled bytes and shared memory, and what a kernel that multiplies weights spends in instructions on a byte of them.
Needs Triton, and no GPU.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from speedstack.eval.environment import describe_environment
from speedstack.eval.released import MODELS, released_spec
from speedstack.eval.results import Document, Environment, Record
from speedstack.runtime.gpus import gpu_named
from speedstack.runtime.memory import Memory
from speedstack.runtime.phases import build_plan
from speedstack.runtime.plan import Plan
from speedstack.runtime.plan_backend import formats_of
from speedstack.runtime.resident import Prefetching, arguments_of, compile_options
from speedstack.runtime.shapes import empty_weights
from speedstack.runtime.spec import ModelSpec
from speedstack.runtime.weights import ModelWeights

GPU = "H200"
NUM_PROGRAMS = gpu_named(GPU).num_sms
MAX_CONTEXT = 16384


class WeightLoop(Record):
    """The code of a kernel that multiplies weights (see `speedstack.runtime.kernels.triton.issue`), once through.

    is_loop: false where the compiler has unrolled all of it, and the whole kernel is counted. instructions: of a warp,
    by class. weight_bytes, load_bytes, async_bytes: of a program; weights, all that is asked of global memory, and what
    of that is not waited for. bandwidth_fraction: of an H200's bandwidth, what issue alone leaves possible; latency,
    bank conflicts, activations' way from the L2 cache (up to twice the weights' bytes: see load_bytes), what an item
    does around the loop, and the last items of a phase are left out.
    """

    is_loop: bool
    instructions: dict[str, int]
    weight_bytes: float
    load_bytes: int
    async_bytes: int
    warp_instructions_per_byte: float
    bandwidth_fraction: float


class KernelResources(Record):
    """One kernel at one shape. num_registers, local_bytes: a thread's; a kernel without spills has 0 local bytes."""

    model: str
    expert_format: Literal["mxfp4", "bf16"]
    linear_format: Literal["bf16", "fp8"] = "bf16"
    phase: str
    op: str
    grid: tuple[int, ...]
    tile: int
    num_warps: int
    num_registers: int
    local_bytes: int
    shared_bytes: int
    loops: tuple[WeightLoop, ...] = ()


class KernelResourcesResult(Document):
    """Every distinct kernel of every model."""

    kind: Literal["kernel_resources"] = "kernel_resources"
    environment: Environment
    target: str
    kernels: tuple[KernelResources, ...]


def model_spec(model: str) -> ModelSpec:
    """A released model's shapes, cut to the first layer of every kind."""
    spec = released_spec(model)
    is_new = [layer not in spec.layers[:index] for index, layer in enumerate(spec.layers)]
    return replace(spec, layers=tuple(layer for layer, new in zip(spec.layers, is_new, strict=True) if new))


def compiled_kernels(model: str, is_packed: bool, has_fp8: bool = False) -> Iterator[KernelResources]:
    """Compiles a model's kernels, those of the same shape once."""
    from speedstack.runtime.kernels.triton.resources import compile_launch
    from speedstack.runtime.launches import build_launches

    plan, weights, memory = _shapes(model, is_packed, has_fp8)
    seen = set()
    for launch in build_launches(plan, weights, memory):
        if launch.binding.constants in seen:
            continue
        seen.add(launch.binding.constants)
        found = compile_launch(launch)
        yield KernelResources(
            model=model,
            expert_format="mxfp4" if is_packed else "bf16",
            linear_format="fp8" if has_fp8 else "bf16",
            phase=launch.phase.name,
            op=launch.phase.op,
            grid=launch.grid,
            tile=launch.phase.tile,
            num_warps=launch.options(is_dependent=True)["num_warps"],
            num_registers=found.registers,
            local_bytes=found.local_bytes,
            shared_bytes=found.shared_bytes,
            loops=tuple(
                WeightLoop(
                    is_loop=one.is_loop,
                    instructions=dict(one.counts),
                    weight_bytes=one.weight_bytes,
                    load_bytes=one.load_bytes,
                    async_bytes=one.async_bytes,
                    warp_instructions_per_byte=one.warp_instructions_per_byte,
                    bandwidth_fraction=one.bandwidth_fraction(gpu_named(GPU)),
                )
                for one in found.issues
            ),
        )


def compiled_resident(
    model: str, is_packed: bool, prefetch: Prefetching = "own", has_fp8: bool = False
) -> tuple[KernelResources, Any]:
    """The kernel of a whole step; and what Triton compiled, for its code."""
    from speedstack.runtime.bindings import bind
    from speedstack.runtime.kernels.triton.resident import resident_kernel
    from speedstack.runtime.kernels.triton.resources import compile_kernel, resources_of
    from speedstack.runtime.tasks import build_tasks

    plan, weights, memory = _shapes(model, is_packed, has_fp8)
    tasks = build_tasks(plan, bind(plan, weights, memory), torch.device("cpu"))
    word = torch.zeros(1, dtype=torch.int32)
    changing: dict[str, Any] = {"counters_ptr": word, "dump_ptr": word, "failed_ptr": word}
    changing |= {"num_made_ptr": word, "sequences_ptr": word}
    changing |= {"first_step": 0, "num_steps": 1, "max_polls": 1}
    options = compile_options()
    compiled = compile_kernel(resident_kernel, arguments_of(plan, tasks, prefetch) | changing, options)
    found = resources_of(compiled)
    kernel = KernelResources(
        model=model,
        expert_format="mxfp4" if is_packed else "bf16",
        linear_format="fp8" if has_fp8 else "bf16",
        phase="whole step",
        op="resident",
        grid=(plan.num_programs,),
        tile=0,
        num_warps=options["num_warps"],
        num_registers=found.registers,
        local_bytes=found.local_bytes,
        shared_bytes=found.shared_bytes,
    )
    return kernel, compiled


def _shapes(model: str, is_packed: bool, has_fp8: bool) -> tuple[Plan, ModelWeights, Memory]:
    weights = empty_weights(model_spec(model), torch.bfloat16, torch.device("meta"), is_packed, has_fp8)
    plan = build_plan(weights.spec, formats_of(weights), NUM_PROGRAMS, max_context=MAX_CONTEXT, has_look_up=True)
    return plan, weights, Memory(plan, weights, 8, MAX_CONTEXT)


def main() -> None:
    """Compile, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("result", nargs="?", type=Path, default=Path("runs/bench/kernel-resources.json"))
    path = parser.parse_args().result
    kernels = []
    for model in MODELS:
        for is_packed, has_fp8 in ((True, False), (False, False), (True, True)):
            resident, _ = compiled_resident(model, is_packed, has_fp8=has_fp8)
            for kernel in (*compiled_kernels(model, is_packed, has_fp8), resident):
                kernels.append(kernel)
                print(
                    f"{model} {kernel.expert_format} {kernel.linear_format} {kernel.phase}: "
                    f"{kernel.num_registers} registers, {kernel.local_bytes} bytes spilled, "
                    f"{kernel.shared_bytes / 1024:.1f} KiB shared"
                    + "".join(f", issue allows {loop.bandwidth_fraction:.2f} of {GPU}" for loop in kernel.loops),
                    flush=True,
                )
    result = KernelResourcesResult(environment=describe_environment(), target="sm_90a", kernels=tuple(kernels))
    print(f"written: {result.save(path)}")


if __name__ == "__main__":
    main()
