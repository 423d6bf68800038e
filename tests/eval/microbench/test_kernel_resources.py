"""Every decode kernel compiles for Hopper without a GPU, in registers and within the shared memory there is."""

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed: its kernels are not compiled")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

import triton

from speedstack.eval.microbench.compiled_resources import MAX_SHARED_BYTES
from speedstack.eval.microbench.kernel_resources import (
    KernelResources,
    KernelResourcesResult,
    compiled_kernels,
    compiled_resident,
    launches,
    model_spec,
)
from speedstack.runtime.model.released_models import MODELS

OPS = {"embed", "qkv", "attention", "combine", "o_proj", "router", "expert_gate_up", "expert_down", "lm_head"}
OPS |= {"draft", "logit_histogram", "sample", "accept"}
WEIGHT_OPS = {"qkv", "o_proj", "expert_gate_up", "expert_down", "lm_head"}

# Bytes of a thread: with 3.6.0 of the one kernel that has all 255 registers, with later versions what the loops of
# `draft`, and of top-k and top-p, begin with.
KNOWN_SPILLS = {("mimo-v2-flash", "resident"): 8}
if not triton.__version__.startswith("3.6."):
    KNOWN_SPILLS = {(model, op): num_bytes for model in MODELS for op, num_bytes in (("draft", 8), ("sample", 16))}
# Of an H200's bandwidth: what issue has to leave possible in loops that multiply weights. An expert's 768 columns of
# qwen3 are three quarters of one round: a quarter decodes zeros, and what a round takes besides, few weights share.
LEAST_FRACTION = 0.7
KNOWN_FRACTIONS = {("qwen3-30b-a3b", "expert_down"): 0.5}


def check(kernel: KernelResources) -> None:
    assert kernel.local_bytes <= KNOWN_SPILLS.get((kernel.model, kernel.op), 0), (
        f"{kernel.phase} of {kernel.model} spills {kernel.local_bytes} bytes"
    )
    assert kernel.shared_bytes <= MAX_SHARED_BYTES, f"{kernel.phase} of {kernel.model}: {kernel.shared_bytes} bytes"
    for loop in kernel.loops:
        least = KNOWN_FRACTIONS.get((kernel.model, kernel.op), LEAST_FRACTION)
        assert loop.bandwidth_fraction >= least, f"{kernel.phase} of {kernel.model}: {loop}"
        if least == LEAST_FRACTION:
            # Weights are a quarter to three quarters of what is loaded, and what the rest of a kernel loads an eighth.
            assert loop.async_bytes >= loop.load_bytes * 0.8, "codes are loaded ahead; scales may not be"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("model", MODELS)
def test_no_kernel_spills(model: str) -> None:
    kernels = list(compiled_kernels(model, is_packed=True))
    for kernel in kernels:
        check(kernel)
    dense = {"dense_gate_up", "dense_down"} if model == "mimo-v2-flash" else set()
    assert {kernel.op for kernel in kernels} == OPS | dense
    assert {kernel.op for kernel in kernels if kernel.loops} == WEIGHT_OPS | dense


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("model", MODELS)
def test_the_kernel_of_a_whole_step_does_not_spill(model: str) -> None:
    kernel, _ = compiled_resident(model, is_packed=True)
    check(kernel)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_drafters_kernels_do_not_spill() -> None:
    """Of `fuse` and `context`, too, issue leaves the bandwidth to the weights."""
    kernels = list(compiled_kernels("qwen3-30b-a3b", is_packed=True, has_drafter=True))
    for kernel in kernels:
        check(kernel)
    own = {"block", "pick", "fuse", "context", "append"}
    assert {"qkv", "attention", "dense_gate_up", "dense_down", "lm_head"} | own <= {kernel.op for kernel in kernels}
    assert {"fuse", "context"} <= {kernel.op for kernel in kernels if kernel.loops}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("model", "allowed"), [("mimo-v2-flash", {"lm_head": 8}), ("qwen3-30b-a3b", {"qkv": 8})])
def test_fp8_is_decoded_in_registers(model: str, allowed: dict[str, int]) -> None:
    """Two weights an instruction on Hopper, rounded two at a time; what takes no FP8 is the same kernel as before.

    The assembler gives a kernel of each model 80 registers, where one or two more do not fit with one of the Tritons.
    """
    from speedstack.eval.microbench.compiled_resources import resources_of
    from speedstack.runtime.backends.gpu.kernels.aot_compile import compile_kernel
    from speedstack.runtime.backends.gpu.kernels.single_op import phase_kernel

    constants = {launch.binding.constants for launch in launches(model, True)}
    ops = set()
    for launch in launches(model, True, True):
        if launch.binding.constants in constants or launch.phase.op in ops:
            continue
        ops.add(launch.phase.op)
        assert launch.binding.constants.FP8_ROWS > 1, "no scale a row at these shapes"
        built = compile_kernel(phase_kernel, launch.arguments(True), launch.options(True))
        assert built.asm["ptx"].count("cvt.rn.f16x2.e4m3x2") >= 16 <= built.asm["ptx"].count("cvt.rn.bf16x2.f32")
        found = resources_of(built)
        assert found.local_bytes <= allowed.get(launch.phase.op, 0) and found.shared_bytes <= MAX_SHARED_BYTES
    assert ops == {"qkv", "o_proj", "lm_head"} | ({"dense_gate_up", "dense_down"} if "mimo" in model else set())


def test_zeros_behind_the_end_of_an_axis_are_no_weights() -> None:
    """Stretches of 512 elements, or of 1024 of MXFP4: 2880 fill neither, 768 three quarters of the one there is."""
    from speedstack.eval.microbench.compiled_resources import share_of_stretches, weight_bits

    def shares(model: str) -> dict[str, float]:
        return {each.phase.op: share_of_stretches(each) for each in launches(model, True) if weight_bits(each)}

    cut = 2880 / 3072
    assert shares("gpt-oss-20b") == dict.fromkeys(WEIGHT_OPS, cut) | {"o_proj": 1.0}
    assert shares("qwen3-30b-a3b") == dict.fromkeys(WEIGHT_OPS, 1.0) | {"expert_down": 0.75}


def test_a_spill_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same kernel with a third of its registers; and the result reads back."""
    from speedstack.eval.microbench import compiled_resources
    from speedstack.runtime.backends.gpu.op_launch import Launch

    options = Launch.options

    def starved(launch: Launch, is_dependent: bool) -> dict[str, Any]:
        return options(launch, is_dependent) | {"maxnreg": 32}

    monkeypatch.setattr(Launch, "options", starved)
    compiled = compiled_resources.compile_launch

    def only_qkv(launch: Launch) -> compiled_resources.Resources:
        return compiled(launch) if launch.phase.op == "qkv" else compiled_resources.Resources(1, 0, 0)

    monkeypatch.setattr(compiled_resources, "compile_launch", only_qkv)
    kernels = list(compiled_kernels("qwen3-30b-a3b", is_packed=True))
    (qkv,) = [kernel for kernel in kernels if kernel.op == "qkv"]
    assert qkv.num_registers <= 32 and qkv.local_bytes > 0
    with pytest.raises(AssertionError, match="spills"):
        check(qkv)
    from speedstack.eval.results.environment import describe_environment

    result = KernelResourcesResult(environment=describe_environment(), target="sm_90a", kernels=tuple(kernels))
    assert KernelResourcesResult.load(result.save(tmp_path / "kernels.json")) == result


def test_an_unknown_model_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'gpt-2'; known: gpt-oss-20b, mimo-v2-flash, qwen3-30b-a3b"):
        model_spec("gpt-2")
