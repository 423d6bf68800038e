"""Compiles every kernel of the suite ahead of its first launch, in processes that need no GPU.

A whole step as one kernel compiles for half a minute, its phases for ten seconds, and there are a dozen of each. One
process per core compiles them, while weights are made and the peer compiles, into Triton's disk cache
(`speedstack.runtime.backends.gpu.kernels.aot_compile`). Missing kernels are compiled at launch.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from speedstack.dflash.model import DFlashDraftModel
from speedstack.eval.gpu_suite.edges import edge_weights
from speedstack.eval.gpu_suite.scale import PEER, Scale
from speedstack.eval.results.failures import one_line
from speedstack.eval.speed.worker import StartWorker, Worker, WorkerFailed
from speedstack.runtime.backends.gpu.base import Target
from speedstack.runtime.backends.gpu.graph import GraphBackend
from speedstack.runtime.backends.gpu.resident import ResidentBackend
from speedstack.runtime.model.device import DTYPES
from speedstack.runtime.model.families.registry import spec_from_config
from speedstack.runtime.model.released_models import drafter_config, released_spec, tiny_config
from speedstack.runtime.model.synthetic_weights import empty_weights

META = torch.device("meta")
PLAIN, FP8, LOOK_UP, DRAFTER, EDGES, APART = "plain", "fp8", "look-up", "drafter", "edges", "apart"
# Additional kernels of a model's checks.
FLAVOURS = {"gpt-oss-20b": (EDGES,), "mimo-v2-flash": (FP8,), "qwen3-30b-a3b": (DRAFTER, LOOK_UP)}


@dataclass(frozen=True)
class Job:
    """The kernels of one plan. is_check: of a family's tiny model, else of the released one.

    length: positions of a sequence's buffers. flavour: plain, FP8 weights, prompt lookup, phases for a drafter, the
    model of `edges`, or apart: each kernel as launched without overlap.
    """

    is_check: bool
    model: str
    backend: str
    length: int
    flavour: str = PLAIN

    def __str__(self) -> str:
        what = "check" if self.is_check else f"{self.length} positions"
        return f"{self.backend}, {self.model}, {what}, {self.flavour}"


def check_jobs(scale: Scale, model: str, backend: str) -> list[Job]:
    """Kernels that the checks of a backend launch on a model, the longest to compile first."""
    flavours = [*FLAVOURS.get(model, ()), PLAIN]
    if backend != ResidentBackend.name:
        flavours = [each for each in flavours if each != LOOK_UP]  # its lookup runs on the host
    return [Job(True, model, backend, scale.check_length, flavour) for flavour in flavours]


def speed_jobs(scale: Scale, model: str, backend: str, context: int) -> list[Job]:
    """Kernels that a cell with this context launches."""
    return [Job(False, model, backend, scale.cell_length(context))]


def phase_jobs(scale: Scale, model: str, backend: str) -> list[Job]:
    """Additional kernels for timing the phases of the first cell."""
    length = scale.cell_length(scale.cells[0].context)
    return [Job(False, model, backend, length, APART)] if backend == GraphBackend.name else []


def all_jobs(scale: Scale, models: Sequence[str], contestants: Iterable[str], sections: Iterable[str]) -> list[Job]:
    """Every job of the sections, in order of need. models: in timing order."""
    backends, known = [name for name in contestants if name != PEER], set(sections)
    contexts = list(dict.fromkeys(cell.context for cell in scale.cells))
    jobs = list[Job]()
    if known & {"headline", "speed"}:
        jobs += [job for name in backends for job in speed_jobs(scale, models[0], name, contexts[0])]
    if "correctness" in known:
        jobs += [job for name in backends for model in models for job in check_jobs(scale, model, name)]
    if "speed" in known:
        for model in models:
            jobs += [job for at in contexts for name in backends for job in speed_jobs(scale, model, name, at)]
            jobs += [job for name in backends for job in phase_jobs(scale, model, name)]
    return list(dict.fromkeys(jobs))


def backend_for(job: Job, scale: Scale, target: Target) -> GraphBackend | ResidentBackend:
    """A backend with the suite's shapes, which compiles what it launches."""
    kind = {each.name: each for each in (GraphBackend, ResidentBackend)}[job.backend]
    spec = spec_from_config(tiny_config(job.model)) if job.is_check or scale.is_tiny else released_spec(job.model)
    weights = empty_weights(spec, DTYPES[scale.dtype], META, is_packed=True, has_fp8=job.flavour == FP8)
    if job.flavour == EDGES:  # how scales are decoded depends on their values
        weights = edge_weights(scale, DTYPES[scale.dtype], torch.device("cpu"))
    drafter = None
    if job.flavour == DRAFTER:
        with META:
            drafter = DFlashDraftModel(drafter_config(spec)).to(DTYPES[scale.dtype])
    backend = kind(weights, drafter, scale.check_rows if job.is_check else 1, job.length, target=target)
    if job.flavour == LOOK_UP:
        assert isinstance(backend, ResidentBackend)
        backend.set_prompt_lookup(True)
    return backend


class KernelCompiler:
    """Made in a worker."""

    def __init__(self, scale: Scale, target: Target) -> None:
        self.scale, self.target = scale, target
        torch.set_num_threads(1)

    def compile(self, job: Job) -> int:
        """Compile a job; returns the number of kernels."""
        backend = backend_for(job, self.scale, self.target)
        if job.flavour == APART:
            assert isinstance(backend, GraphBackend)
            return len(backend.compile(is_dependent=False))
        return len(backend.compile())


class Kernels:
    """Compiles jobs in order, `num_processes` at a time, from construction on."""

    def __init__(
        self, start: StartWorker, factory: Callable[..., Any], arguments: Sequence[Any], jobs: Sequence[Job],
        num_processes: int, deadline: float,
    ) -> None:  # fmt: skip
        """factory(*arguments) makes the compiler. deadline: a `time.monotonic` moment that ends everything."""
        self._start, self._factory, self._arguments, self._deadline = start, factory, arguments, deadline
        self._left, self._jobs = deque(jobs), frozenset(jobs)
        self._began = time.monotonic()
        self._records: dict[Job, dict[str, Any]] = {}
        self._changed = threading.Condition()
        self._is_closed = False
        self._workers: list[Worker] = []
        self._threads = [
            threading.Thread(target=self._work, daemon=True) for _ in range(min(num_processes, len(jobs)))
        ]  # fmt: skip
        for thread in self._threads:
            thread.start()

    def wait(self, jobs: Iterable[Job], deadline: float) -> float:
        """Wait until these jobs are compiled or have failed, or the deadline; returns the seconds."""
        started, wanted = time.monotonic(), self._jobs.intersection(jobs)
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_closed or wanted <= self._records.keys(), max(0.0, deadline - started)
            )
        return time.monotonic() - started

    def records(self) -> list[dict[str, Any]]:
        """One record per ended job: description, seconds, end time, and number of kernels or error."""
        with self._changed:
            return [asdict(job) | record for job, record in self._records.items()]

    def close(self) -> None:
        """End running compilations."""
        with self._changed:
            self._is_closed = True
            self._left.clear()
            self._changed.notify_all()
            workers = list(self._workers)
        for worker in workers:
            worker.kill()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        worker: Worker | None = None
        while True:
            with self._changed:
                if self._is_closed or not self._left:
                    break
                job = self._left.popleft()
            started = time.monotonic()
            try:
                with self._changed:
                    if self._is_closed:
                        break
                    if worker is None or not worker.is_alive:
                        worker = self._start(self._factory, *self._arguments)
                        self._workers.append(worker)
                worker.begin("compile", job)
                record = {"num_kernels": worker.finish(self._deadline), "error": None}
            except Exception as error:
                # Whatever the error, waiters for the job must be told.
                is_told = isinstance(error, WorkerFailed)
                record = {"num_kernels": 0, "error": str(error) if is_told else one_line(error)}
            ended = time.monotonic()
            record |= {"seconds": round(ended - started, 2), "ended": round(ended - self._began, 2)}
            with self._changed:
                if not self._is_closed:
                    self._records[job] = record
                self._changed.notify_all()
        if worker is not None:
            worker.close()
