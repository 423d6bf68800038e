"""What the decode kernels take of a GPU's multiprocessor: `python -m speedstack.eval.kernel_resources [RESULT.json]`.

Compiles every kernel of a decode step for sm_90a at the shapes of released models, weights in bfloat16 and experts in
MXFP4 or bfloat16, and records registers, spilled bytes and shared memory. Needs Triton, and no GPU.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from speedstack.eval.environment import describe_environment
from speedstack.eval.released import MODELS, released_spec
from speedstack.eval.results import Document, Environment, Record
from speedstack.runtime.graph import formats_of
from speedstack.runtime.phases import build_plan
from speedstack.runtime.shapes import empty_weights
from speedstack.runtime.spec import ModelSpec

NUM_PROGRAMS = 132  # multiprocessors of an H200
MAX_CONTEXT = 16384


class KernelResources(Record):
    """One kernel at one shape. num_registers, local_bytes: a thread's; a kernel without spills has 0 local bytes."""

    model: str
    expert_format: Literal["mxfp4", "bf16"]
    phase: str
    op: str
    grid: tuple[int, ...]
    tile: int
    num_warps: int
    num_registers: int
    local_bytes: int
    shared_bytes: int


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


def compiled_kernels(model: str, is_packed: bool) -> Iterator[KernelResources]:
    """Compiles a model's kernels, those of the same shape once."""
    from speedstack.runtime.kernels.triton.resources import compile_launch, signature
    from speedstack.runtime.launches import Memory, build_launches

    weights = empty_weights(model_spec(model), torch.bfloat16, torch.device("meta"), is_packed)
    plan = build_plan(weights.spec, formats_of(weights), NUM_PROGRAMS, max_context=MAX_CONTEXT)
    seen = set()
    for launch in build_launches(plan, weights, Memory(plan, weights, 8, MAX_CONTEXT)):
        key = (launch.phase.op, str(signature(launch, is_dependent=True)))
        if key in seen:
            continue
        seen.add(key)
        found = compile_launch(launch)
        yield KernelResources(
            model=model,
            expert_format="mxfp4" if is_packed else "bf16",
            phase=launch.phase.name,
            op=launch.phase.op,
            grid=launch.grid,
            tile=launch.phase.tile,
            num_warps=launch.options(is_dependent=True)["num_warps"],
            num_registers=found.registers,
            local_bytes=found.local_bytes,
            shared_bytes=found.shared_bytes,
        )


def main() -> None:
    """Compile, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("result", nargs="?", type=Path, default=Path("runs/bench/kernel-resources.json"))
    path = parser.parse_args().result
    kernels = []
    for model in MODELS:
        for is_packed in (True, False):
            for kernel in compiled_kernels(model, is_packed):
                kernels.append(kernel)
                print(
                    f"{model} {kernel.expert_format} {kernel.phase}: {kernel.num_registers} registers, "
                    f"{kernel.local_bytes} bytes spilled, {kernel.shared_bytes / 1024:.1f} KiB shared",
                    flush=True,
                )
    result = KernelResourcesResult(environment=describe_environment(), target="sm_90a", kernels=tuple(kernels))
    print(f"written: {result.save(path)}")


if __name__ == "__main__":
    main()
