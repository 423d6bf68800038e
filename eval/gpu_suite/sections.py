"""The suite's sections but speed: the machine, correctness, and the MXFP4 kernels."""

import random
import time
from typing import Any

from speedstack.eval.gpu_suite.correctness import Checker
from speedstack.eval.gpu_suite.kernels import KernelCompiler, Kernels, all_jobs, check_jobs
from speedstack.eval.gpu_suite.machine import Machine
from speedstack.eval.gpu_suite.quant import QuantKernels
from speedstack.eval.gpu_suite.scale import MODEL_SHARES, PEER
from speedstack.eval.gpu_suite.suite import OutOfTime, Suite
from speedstack.eval.results.environment import command_line
from speedstack.eval.speed.worker import NEVER_BEGAN, Worker, WorkerFailed, call
from speedstack.runtime.backends.gpu.base import Target

CHECKS = ("check_buffers", "check_row_invariance", "check_text", "check_sampling")
CHECKS_OF = {
    "gpt-oss-20b": (*CHECKS, "check_edges"),
    "mimo-v2-flash": (*CHECKS, "check_fp8"),
    "qwen3-30b-a3b": (*CHECKS, "check_prompt_lookup", "check_drafter"),
}
NOT_AVAILABLE = "not available"
CORES_LEFT = 4  # not used by kernel compilation: for three contestants, whose peer compiles as well, and the suite


def run_environment(suite: Suite, result: dict[str, Any], deadline: float) -> None:
    """Describe the machine and measure its copy bandwidth."""
    worker = suite.start(Machine, suite.scale)
    try:
        result["machine"] = call(worker, deadline, "describe")
        result["machine"]["software"]["command"] = command_line()  # a worker has none of its own
        suite.save()
        if suite.scale.device == "cuda":
            compile_ahead(suite, result["machine"])
        result["copy"] = call(worker, deadline, "copy_bandwidth")
    finally:
        worker.close()


def compile_ahead(suite: Suite, machine: dict[str, Any]) -> None:
    """Start compiling every kernel of the sections for this machine, on all cores but CORES_LEFT."""
    target = Target(tuple(machine["capability"]), machine["num_programs"])
    models = [model for model in MODEL_SHARES if model in suite.models]
    jobs = all_jobs(suite.scale, models, suite.contestants, suite.names)
    num_processes = max(1, machine["software"]["num_cores"] - CORES_LEFT)
    suite.kernels = Kernels(
        suite.start, KernelCompiler, (suite.scale, target), jobs, num_processes, suite.end
    )  # fmt: skip
    suite.closing.callback(suite.kernels.close)


def why_not(suite: Suite, contestant: str) -> str | None:
    """Why a backend cannot run here, or None."""
    from speedstack.runtime.backends.select import BACKENDS

    if contestant != PEER and contestant not in BACKENDS:
        return f"the engine has no backend {contestant!r}"
    return None


def run_correctness(suite: Suite, result: dict[str, Any], deadline: float) -> None:
    """Every check of every backend on every family, one isolated worker per pair.

    Workers prepare in parallel and check in turn. Raises RuntimeError at the end if a check failed, OutOfTime if one
    could not begin.
    """
    failed, late = list[str](), list[str]()
    backends = [name for name in suite.contestants if name != PEER]
    workers: dict[tuple[str, str], Worker] = {}
    for backend in backends:
        found = result[backend] = dict[str, Any]()
        reason = why_not(suite, backend)
        if reason is not None:
            found[NOT_AVAILABLE] = reason
            continue
        for model in suite.models:
            worker = workers[backend, model] = suite.start(Checker, suite.scale, model, backend)
            worker.begin("load")
    try:
        for number, ((backend, model), worker) in enumerate(workers.items()):
            checks = result[backend][model] = dict[str, Any]()
            # A kernel that compiles slowly or hangs uses its own share of the time.
            num_left = len(workers) - number
            if suite.kernels is not None:
                now = time.monotonic()
                suite.kernels.wait(check_jobs(suite.scale, model, backend), now + (deadline - now) / num_left)
            end = time.monotonic() + (deadline - time.monotonic()) / num_left
            is_loaded = False
            for check in CHECKS_OF.get(model, CHECKS):
                where = f"{check} of {backend} on {model}"
                if not worker.is_alive:
                    checks[check] = {"passed": None, "error": "not run: its process had ended"}
                    continue
                try:
                    if not is_loaded:
                        worker.finish(end)
                        is_loaded = True
                    began = time.monotonic()
                    checks[check] = {"passed": True} | call(worker, end, check)
                    checks[check]["seconds"] = round(time.monotonic() - began, 2)
                except WorkerFailed as error:
                    is_late = str(error) == NEVER_BEGAN
                    (late if is_late else failed).append(f"{where}: {error}")
                    checks[check] = {"passed": None if is_late else False, "error": str(error)}
                    if not is_loaded:
                        worker.close()
                suite.save()
            worker.close()
    finally:
        for worker in workers.values():
            worker.close()
    if failed:
        raise RuntimeError(f"{len(failed)} checks failed, first {failed[0]}")
    if late:
        raise OutOfTime(f"{len(late)} checks did not begin")


def run_quant(suite: Suite, result: dict[str, Any], deadline: float) -> None:
    """Compare MXFP4 quantization, dequantization and fake quantization with a copy of the weights."""
    worker = suite.start(QuantKernels, suite.scale)
    try:
        result["timings"] = call(worker, deadline, "measure", random.Random(suite.seed).randrange(2**31))
    finally:
        worker.close()
