"""What is compiled from shapes alone is what a launch looks for: Triton takes it from its cache on disk."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: its kernels are not compiled")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

import triton

from speedstack.dflash.model import DFlashDraftModel
from speedstack.runtime.backends.gpu import task_table
from speedstack.runtime.backends.gpu.base import Target
from speedstack.runtime.backends.gpu.graph import GraphBackend
from speedstack.runtime.backends.gpu.kernels import aot_compile
from speedstack.runtime.backends.gpu.kernels.resident import resident_kernel
from speedstack.runtime.backends.gpu.kernels.single_op import phase_kernel
from speedstack.runtime.backends.gpu.resident import MAX_STEPS, ResidentBackend
from speedstack.runtime.model.released_models import drafter_config
from speedstack.runtime.model.spec import AttentionSpec, DenseSpec, LayerSpec, ModelSpec, MoeSpec
from speedstack.runtime.model.synthetic_weights import empty_weights, random_weights

HOPPER = Target((9, 0), 132)
ATTENTION = AttentionSpec(2, 1, 32, 32, 16, 1e4)
EXPERTS = LayerSpec(ATTENTION, MoeSpec(8, 2, 64, "softmax", False, True))
DENSE = LayerSpec(ATTENTION, DenseSpec(64))  # fewer kinds of phases: a whole step compiles in half the time


class RecordingGpu(aot_compile.AbsentGpu):
    """A GPU whose launches are kept: what Triton's own launcher would be called with. It loads every kernel."""

    def __init__(self) -> None:
        super().__init__(HOPPER.capability)
        self.launched: list[tuple[Any, ...]] = []
        self.utils = self

    def get_current_device(self) -> str:
        return f"recording {id(self)}"  # the JIT has nothing in memory for it

    def get_device_properties(self, device: str) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: str) -> tuple[Any, ...]:
        return object(), len(kernel), 255, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        # Triton writes a launcher in C for the types of the arguments, and fails for those it does not know.
        if triton.__version__.startswith("3.6."):
            from triton.backends.nvidia.driver import make_launcher

            assert "_launch(" in make_launcher({}, source.signature, None)
        return lambda *arguments: self.launched.append((metadata, *arguments))


@pytest.fixture
def hits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every kernel that Triton is asked to compile, whether it lay in the cache, which is empty at first."""
    found: list[bool] = []
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **what: found.append(what["cache_hit"]))
    for kernel in (phase_kernel, resident_kernel):
        kernel.device_caches.pop(aot_compile.AbsentGpu(HOPPER.capability).get_current_device(), None)
    return found


def backend_of(kind: Any, num_layers: int, is_real: bool) -> Any:
    """One whose weights are shapes, or values that lie somewhere."""
    layer = EXPERTS if kind is GraphBackend else DENSE
    spec = ModelSpec("test", 64, 64, 1e-5, 512, (), (layer,) * num_layers)
    make = random_weights if is_real else empty_weights
    weights = make(spec, torch.bfloat16, torch.device("cpu" if is_real else "meta"), True)
    return kind(weights, None, 2, 512, target=HOPPER)


@pytest.mark.slow
def test_launches_of_phases_hit_the_cache_of_compiled_kernels(hits: list[bool]) -> None:
    shapes = backend_of(GraphBackend, 1, is_real=False)
    with aot_compile.compilations() as compiled:
        built = shapes.compile()
    assert compiled == ["phase_kernel"] * len(built)
    assert len(built) == len({launch.binding.constants for launch in shapes.launches}) and hits == [False] * len(built)
    hits.clear()
    gpu, backend = RecordingGpu(), backend_of(GraphBackend, 2, is_real=True)
    with aot_compile.driven_by(gpu), aot_compile.compilations() as compiled:
        for index, launch in enumerate(backend.launches):
            launch.run(is_dependent=index > 0)
    assert compiled == [] and hits == [True] * len(built)
    assert [call[1:4] for call in gpu.launched] == [(*each.grid, 1, 1)[:3] for each in backend.launches]
    assert [call[0].launch_pdl for call in gpu.launched] == [False] + [True] * (len(backend.launches) - 1)
    # Whoever lets nothing begin early is another kernel.
    with aot_compile.driven_by(gpu):
        backend.launches[1].run(is_dependent=False)
    assert hits[-1] is False


@pytest.mark.slow
def test_launches_of_whole_steps_hit_the_cache_whatever_their_arguments(
    hits: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a step's number nor how many there are, nor numbers of phases that the JIT might specialize."""
    backend_of(ResidentBackend, 1, is_real=False).compile()
    assert hits == [False]
    gpu, backend = RecordingGpu(), backend_of(ResidentBackend, 1, is_real=True)
    arguments = backend.arguments
    for number in (None, 1, 16):
        numbers = {} if number is None else {"num_phases": number}
        monkeypatch.setattr(backend, "arguments", lambda steps, numbers=numbers: arguments(steps) | numbers)
        with aot_compile.driven_by(gpu):
            for step, num_steps in ((0, 1), (16, MAX_STEPS), (2**31 - 1, 2), (2**32 + 1, 3)):
                backend.next_step = step
                backend._launch(num_steps)
    assert hits == [False, True], "one look at the disk, then the kernel is in memory"
    assert len(gpu.launched) == 12
    metadata, *grid = gpu.launched[0][:4]
    assert metadata.launch_cooperative_grid and tuple(grid) == (HOPPER.num_sms, 1, 1)


@pytest.mark.parametrize("kind", [GraphBackend, ResidentBackend])
def test_pointers_of_kernels_are_aligned_to_sixteen_bytes(kind: Any) -> None:
    """On a GPU an allocation does: what counts is how far behind its beginning a tensor lies."""
    backend = backend_of(kind, 2, is_real=True)
    given = [tensor for binding in _bindings(backend) for tensor in binding.pointers]
    if isinstance(backend, ResidentBackend):
        given += [value for value in backend.arguments(1).values() if isinstance(value, torch.Tensor)]
    assert {each.storage_offset() * each.element_size() % 16 for each in given} == {0}


def test_a_backend_for_another_gpu_computes_nothing() -> None:
    from speedstack.runtime.backends.base import Rows

    for kind in (GraphBackend, ResidentBackend):
        backend = backend_of(kind, 1, is_real=True)
        with pytest.raises(AssertionError, match="computes nothing"):
            backend.step(Rows([1], [0], [0]), [0])


def test_the_host_drafts_where_a_drafter_has_too_many_kinds_of_phases(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = backend_of(ResidentBackend, 2, is_real=True)
    drafter = DFlashDraftModel(drafter_config(plain.weights.spec)).to(torch.bfloat16)
    monkeypatch.setattr(task_table, "MAX_VARIANTS", len(plain.tasks.variants) + 1)
    plain.set_drafter(drafter)
    assert plain.planned_drafter is None and plain.drafter is not None and len(plain.memory.features) == 2
    assert "block" not in {phase.op for phase in plain.plan.phases}
    assert "the host drafts, not the kernel, because backend 'resident' compiles every kind of phase" in caplog.text
    monkeypatch.setattr(task_table, "MAX_VARIANTS", 3)
    with pytest.raises(task_table.TooManyKinds, match="use backend='graph'"):
        plain.set_drafter(None)
    assert plain.drafter is not None, "as it was"


def test_only_the_first_phase_of_a_draft_looks_at_blocks_that_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = backend_of(ResidentBackend, 2, is_real=True)
    backend.set_drafter(DFlashDraftModel(drafter_config(backend.weights.spec)).to(torch.bfloat16))
    undecided = {variant.op for variant in backend.tasks.variants if variant.has_undecided_rows}
    assert undecided == {"qkv"} < {variant.op for variant in backend.tasks.variants if variant.IS_DRAFT}
    monkeypatch.setattr(task_table, "FIRST_OF_A_DRAFT", "o_proj")
    with pytest.raises(AssertionError, match=r"D00\.qkv looks before anything has waited for D\.embed"):
        task_table.check_early_choices(backend.plan)


def test_the_driver_is_restored_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot_compile.driver, "_active", None)
    with pytest.raises(KeyError), aot_compile.driven_by(aot_compile.AbsentGpu((9, 0))):
        assert aot_compile.driver.active.get_current_target().arch == 90
        raise KeyError
    assert aot_compile.driver._active is None


def _bindings(backend: Any) -> Any:
    return backend.bindings if isinstance(backend, ResidentBackend) else [each.binding for each in backend.launches]
