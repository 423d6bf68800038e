"""Resources of the decode kernels: `python -m speedstack.eval.microbench.kernel_resources [RESULT.json]`.

Compiles the kernels of the `graph` and `resident` backends for sm_90a at the shapes of released models, with bfloat16
or FP8 weights, MXFP4 or bfloat16 experts, and a DFlash drafter's phases. Records registers, spills, shared memory, and
instructions per byte of weights. Needs Triton, but no GPU.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from speedstack.dflash.model import DFlashDraftModel
from speedstack.eval.results.environment import describe_environment
from speedstack.eval.results.microbench import KernelResources, KernelResourcesResult, WeightLoop
from speedstack.runtime.backends.gpu.base import Target
from speedstack.runtime.backends.gpu.resident import Prefetching, ResidentBackend, compile_options
from speedstack.runtime.model.released_models import MODELS, drafter_config, released_spec
from speedstack.runtime.model.spec import ModelSpec
from speedstack.runtime.model.synthetic_weights import empty_weights
from speedstack.runtime.perf.gpus import gpu_named
from speedstack.support.command import module_command, module_parser

if TYPE_CHECKING:
    from speedstack.runtime.backends.gpu.op_launch import Launch

GPU = "H200"
TARGET = Target((9, 0), gpu_named(GPU).num_sms)
NUM_SLOTS, MAX_CONTEXT = 8, 16384
META = torch.device("meta")
# Experts packed, the rest in FP8, with a drafter.
KINDS = ((True, False, False), (False, False, False), (True, True, False), (True, False, True))


def model_spec(model: str) -> ModelSpec:
    """A released model's shapes, cut to the first layer of every kind."""
    spec = released_spec(model)
    is_new = [layer not in spec.layers[:index] for index, layer in enumerate(spec.layers)]
    return replace(spec, layers=tuple(layer for layer, new in zip(spec.layers, is_new, strict=True) if new))


def compiled_kernels(
    model: str, is_packed: bool, has_fp8: bool = False, has_drafter: bool = False
) -> Iterator[KernelResources]:
    """The distinct kernels of a model's phases, or of its drafter's."""
    from speedstack.eval.microbench.compiled_resources import compile_launch

    seen = {each.binding.constants for each in launches(model, is_packed)} if has_drafter else set()
    for launch in launches(model, is_packed, has_fp8, has_drafter):
        if launch.binding.constants in seen:
            continue
        seen.add(launch.binding.constants)
        found = compile_launch(launch)
        yield KernelResources(
            model=model,
            expert_format="mxfp4" if is_packed else "bf16",
            linear_format="fp8" if has_fp8 else "bf16",
            has_drafter=has_drafter,
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
    model: str, is_packed: bool, prefetch: Prefetching = "own", has_fp8: bool = False, has_drafter: bool = False
) -> tuple[KernelResources, Any]:
    """The kernel of a whole step, and Triton's compiled object."""
    from speedstack.eval.microbench.compiled_resources import resources_of

    backend = _backend(model, is_packed, has_fp8, has_drafter, prefetch)
    (compiled,) = backend.compile()
    found = resources_of(compiled)
    kernel = KernelResources(
        model=model,
        expert_format="mxfp4" if is_packed else "bf16",
        linear_format="fp8" if has_fp8 else "bf16",
        has_drafter=has_drafter,
        phase="whole step",
        op="resident",
        grid=(TARGET.num_sms,),
        tile=0,
        num_warps=compile_options()["num_warps"],
        num_registers=found.registers,
        local_bytes=found.local_bytes,
        shared_bytes=found.shared_bytes,
    )
    return kernel, compiled


def launches(model: str, is_packed: bool, has_fp8: bool = False, has_drafter: bool = False) -> "list[Launch]":
    """The phases of a step as the `graph` backend launches them."""
    from speedstack.runtime.backends.gpu.op_launch import Launch

    return [Launch(binding) for binding in _backend(model, is_packed, has_fp8, has_drafter).bindings]


def _backend(
    model: str, is_packed: bool, has_fp8: bool, has_drafter: bool, prefetch: Prefetching = "own"
) -> ResidentBackend:
    spec, drafter = model_spec(model), None
    if has_drafter:
        with META:
            drafter = DFlashDraftModel(drafter_config(spec)).to(torch.bfloat16)
    weights = empty_weights(spec, torch.bfloat16, META, is_packed, has_fp8)
    backend = ResidentBackend(weights, drafter, NUM_SLOTS, MAX_CONTEXT, prefetch=prefetch, target=TARGET)
    backend.set_prompt_lookup(not has_drafter)
    return backend


@module_command
def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: compile, print, write JSON."""
    parser = module_parser(__spec__, __doc__, out=None)
    parser.add_argument("result", nargs="?", type=Path, default=Path("runs/bench/kernel-resources.json"))
    path = parser.parse_args(arguments).result
    kernels = []
    for model in MODELS:
        for is_packed, has_fp8, has_drafter in KINDS:
            resident, _ = compiled_resident(model, is_packed, has_fp8=has_fp8, has_drafter=has_drafter)
            for kernel in (*compiled_kernels(model, is_packed, has_fp8, has_drafter), resident):
                kernels.append(kernel)
                print(
                    f"{model} {kernel.expert_format} {kernel.linear_format}{' drafter' if has_drafter else ''} "
                    f"{kernel.phase}: {kernel.num_registers} registers, {kernel.local_bytes} bytes spilled, "
                    f"{kernel.shared_bytes / 1024:.1f} KiB shared"
                    + "".join(f", issue allows {loop.bandwidth_fraction:.2f} of {GPU}" for loop in kernel.loops),
                    flush=True,
                )
    result = KernelResourcesResult(environment=describe_environment(), target="sm_90a", kernels=tuple(kernels))
    print(f"written: {result.save(path)}")


if __name__ == "__main__":
    sys.exit(main())
