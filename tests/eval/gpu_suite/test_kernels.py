"""Which kernels are compiled ahead of time, in which order; and that those are the ones that the suite launches."""

import os
import threading
import time
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed: its kernels are not compiled")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from speedstack.eval.gpu_suite import backends, correctness, kernels
from speedstack.eval.gpu_suite.backends import BackendContestant
from speedstack.eval.gpu_suite.correctness import Checker
from speedstack.eval.gpu_suite.kernels import Job, KernelCompiler, Kernels, all_jobs, backend_for, check_jobs
from speedstack.eval.gpu_suite.scale import CONTESTANTS, MODEL_SHARES, Scale, scale_for
from speedstack.eval.gpu_suite.sections import CHECKS, CHECKS_OF
from speedstack.eval.speed.worker import LocalWorker, ProcessWorker, WorkerFailed
from speedstack.runtime.backends.gpu.base import Target
from speedstack.runtime.backends.gpu.resident import ResidentBackend

HOPPER = Target((9, 0), 132)
MODELS = tuple(MODEL_SHARES)


class OnCpu(Scale):
    """The scale of a GPU, whose weights are drawn on a CPU."""

    dtype = "bfloat16"  # type: ignore[assignment]


def gpu_scale_on_a_cpu() -> Scale:
    return replace(OnCpu(**vars(scale_for("cuda"))), device="cpu")


def compiled_from(backend: Any) -> set[Any]:
    """What kernels are compiled for: constants, types of arguments, how far behind sixteen bytes they lie."""
    bindings = backend.bindings if isinstance(backend, ResidentBackend) else [one.binding for one in backend.launches]
    whole = [("whole", backend.tasks.variants)] if isinstance(backend, ResidentBackend) else []
    return {
        (each.constants, tuple((p.dtype, p.storage_offset() * p.element_size() % 16) for p in each.pointers))
        for each in bindings
    } | set(whole)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Backends that the suite makes, each for a GPU that is not there, and after each change of its plan."""
    found: list[Any] = []

    def make(name: str, *arguments: Any) -> Any:
        kind = {"graph": kernels.GraphBackend, "resident": ResidentBackend}[name]
        found.append(kind(*arguments[:4], target=HOPPER))
        return found[-1]

    monkeypatch.setattr(correctness, "make_backend", make)
    monkeypatch.setattr("speedstack.runtime.engine.make_backend", make)
    return found


@pytest.mark.parametrize("backend", ["resident", "graph"])
@pytest.mark.parametrize("model", MODELS)
def test_checks_launch_what_was_compiled_for_them(model: str, backend: str, made: list[Any]) -> None:
    """Every check gets as far as its first step, with the plan that it will run."""
    scale = gpu_scale_on_a_cpu()
    ahead = [compiled_from(backend_for(job, scale, HOPPER)) for job in check_jobs(scale, model, backend)]
    checker = Checker(scale, model, backend)
    for check in CHECKS_OF.get(model, CHECKS):
        if check == "check_sampling" and backend == "graph":
            continue  # the host draws
        made.clear()
        with pytest.raises(AssertionError, match="computes nothing"):
            getattr(checker, check)()
        assert made and compiled_from(made[-1]) in ahead, check


@pytest.mark.parametrize("backend", ["resident", "graph"])
def test_cells_launch_what_was_compiled_for_them(
    backend: str, made: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a released model's first layer: more of them are more of the same kernels."""
    scale = gpu_scale_on_a_cpu()
    model = "gpt-oss-20b"
    monkeypatch.setattr(
        backends, "random_weights", lambda s, dtype, d, **kw: kernels.empty_weights(s, dtype, kernels.META, True)
    )
    contestant = BackendContestant(scale, model, backend, 2, seed=0)
    for cell in scale.cells[::2]:
        with pytest.raises(AssertionError, match="computes nothing"):
            contestant.prepare(cell)
        (job,) = kernels.speed_jobs(scale, model, backend, cell.context)
        assert compiled_from(made[-1]) == compiled_from(backend_for(job, scale, HOPPER))


def test_what_is_needed_first_comes_first() -> None:
    scale = scale_for("cuda")
    jobs = all_jobs(scale, MODELS, CONTESTANTS, ["environment", "headline", "correctness", "speed"])
    assert len(set(jobs)) == len(jobs) == 28
    headline = [Job(False, "qwen3-30b-a3b", name, 1024 + 160) for name in ("resident", "graph")]
    assert jobs[:2] == headline and jobs[2] == Job(True, "qwen3-30b-a3b", "resident", 562, "drafter")
    checks = [job for job in jobs if job.is_check]
    assert jobs[2 : 2 + len(checks)] == checks and len(checks) == 13
    assert all_jobs(scale, MODELS, CONTESTANTS, ["correctness"]) == checks
    assert all_jobs(scale, MODELS, ["transformers"], ["headline", "correctness", "speed"]) == []
    assert all_jobs(scale, MODELS, ["graph"], ["headline"]) == headline[1:]


class Compiler:
    """Takes as long as a job says it is; `broken` models fail."""

    def compile(self, job: Job) -> int:
        if job.model == "broken":
            raise ValueError("no such shape")
        time.sleep(job.length)
        return 3


def soon(seconds: float = 60.0) -> float:
    return time.monotonic() + seconds


def test_jobs_are_compiled_side_by_side_and_errors_are_kept() -> None:
    jobs = [Job(True, "broken", "graph", 0), Job(True, "good", "graph", 0), Job(True, "slow", "graph", 600)]
    pool = Kernels(ProcessWorker, Compiler, (), jobs, 2, soon())
    try:
        pool.wait(jobs[:2], soon())
        records = {record["model"]: record for record in pool.records()}
        assert records["good"]["num_kernels"] == 3 and records["good"]["error"] is None
        assert records["broken"]["error"].startswith("ValueError: no such shape") and "slow" not in records
        assert pool.wait([jobs[2]], soon(0.2)) < 30, "until the deadline"
        assert pool.wait([Job(True, "unknown", "graph", 0)], soon()) < 1, "nobody compiles it"
    finally:
        started = time.monotonic()
        pool.close()
    assert time.monotonic() - started < 30 and not [each for each in pool._threads if each.is_alive()]


def test_a_worker_that_is_lost_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mortal(LocalWorker):
        def finish(self, deadline: float) -> Any:
            if self._call is not None and self._call[1][0].model == "deadly":
                self.close()
                raise WorkerFailed("its process died (exit code -9)")
            return super().finish(deadline)

    jobs = [Job(True, "deadly", "graph", 0), Job(True, "good", "graph", 0)]
    pool = Kernels(Mortal, Compiler, (), jobs, 1, soon())
    pool.wait(jobs, soon())
    pool.close()
    assert [record["error"] for record in pool.records()] == ["its process died (exit code -9)", None]


def test_a_worker_that_cannot_be_started_is_an_error_of_its_jobs() -> None:
    def start(*arguments: Any) -> Any:
        raise OSError("no more processes")

    pool = Kernels(start, Compiler, (), [Job(True, "good", "graph", 0)], 1, soon())
    assert pool.wait([Job(True, "good", "graph", 0)], soon()) < 30
    assert [record["error"] for record in pool.records()] == ["OSError: no more processes"]
    pool.close()


def test_closing_wakes_those_who_wait() -> None:
    pool = Kernels(ProcessWorker, Compiler, (), [Job(True, "slow", "graph", 600)], 1, soon())
    waited: list[float] = []
    thread = threading.Thread(target=lambda: waited.append(pool.wait([Job(True, "slow", "graph", 600)], soon(300))))
    thread.start()
    pool.close()
    thread.join(30)
    assert len(waited) == 1 and not pool.records()


def test_a_job_is_all_kernels_of_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apart from each other where phases are timed apart."""
    calls: list[tuple[Any, ...]] = []

    def compile_none(self: Any, **options: Any) -> list[Any]:
        calls.append((self.name, options, self.plan.phases[0].op))
        return [None] * len(self.plan.phases)

    for kind in (kernels.GraphBackend, ResidentBackend):
        monkeypatch.setattr(kind, "compile", compile_none)
    scale = scale_for("cuda")
    compiler = KernelCompiler(scale, HOPPER)
    jobs = [*check_jobs(scale, "qwen3-30b-a3b", "resident"), *kernels.phase_jobs(scale, "gpt-oss-20b", "graph")]
    assert all(compiler.compile(job) > 10 for job in jobs)
    assert calls == [
        ("resident", {}, "block"),  # a drafter's blocks
        ("resident", {}, "draft"),  # prompt lookup
        ("resident", {}, "embed"),
        ("graph", {"is_dependent": False}, "embed"),
    ]
