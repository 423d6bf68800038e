"""Runs the steps of a store in worker processes: dependent steps in order, independent ones in parallel.

A worker has its own device or share of threads, imports once, and makes one step after another; its output goes to a
log file. A failed step returns one line; a killed worker fails its step and is replaced. Workers end with this process.

An exclusive step starts when no other can, and runs alone.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from speedstack.support.steps import Step, StepStore

# Called with a settled step and the reason of its failure, or None.
OnStep = Callable[[Step, str | None], None]


@dataclass(frozen=True)
class Place:
    """A worker's place: environment variables, set before it imports torch, and torch's threads."""

    environment: Mapping[str, str]
    num_threads: int


def run_steps(
    store: StepStore, steps: Sequence[Step], runner: str, places: Sequence[Place], logs: Path, on_step: OnStep
) -> dict[str, str]:
    """Make all `steps` and their needs that `store` lacks; returns the reasons of failed steps by name.

    `runner` is 'module:function', called as `function(step, directories of needed steps, directory to fill)`. Each of
    `places` has a worker. Raises OSError if directories cannot be written.
    """
    todo = {step.name: step for step in store.missing(each for step in steps for each in step.closure())}
    failures: dict[str, str] = {}
    logs.mkdir(parents=True, exist_ok=True)
    store.root.mkdir(parents=True, exist_ok=True)
    workers = [_Worker(store, runner, place, logs / f"worker-{index}.log") for index, place in enumerate(places)]

    def settle(step: Step, failure: str | None) -> None:
        if failure is not None:
            failures[step.name] = failure
        on_step(step, failure)

    try:
        while todo or any(worker.step is not None for worker in workers):
            # Needs come first, so dependents of a step settled here are settled after it.
            for step in list(todo.values()):
                failed = next((need for need in step.needs.values() if need.name in failures), None)
                if failed is not None:
                    del todo[step.name]
                    settle(step, f"{failed.kind} failed: {failures[failed.name]}")
            for worker in workers:
                if worker.step is None and (ready := _next(list(todo.values()), workers)) is not None:
                    del todo[ready.name]
                    worker.start(ready)
            busy = {worker.connection: worker for worker in workers if worker.step is not None}
            for connection in wait(list(busy)) if busy else ():
                settle(*busy[connection].finish())
    finally:
        for worker in workers:
            worker.end()
    return failures


def _next(todo: Sequence[Step], workers: Sequence[_Worker]) -> Step | None:
    """The first step that can start now."""
    running = [worker.step for worker in workers if worker.step is not None]
    if any(step.is_exclusive for step in running):
        return None
    waiting = {step.name for step in (*todo, *running)}
    ready = [step for step in todo if not any(need.name in waiting for need in step.needs.values())]
    shared = next((step for step in ready if not step.is_exclusive), None)
    if shared is not None or running or not ready:
        return shared
    return ready[0]


class _Worker:
    """One place of the pool; its process starts with its first step."""

    def __init__(self, store: StepStore, runner: str, place: Place, log: Path) -> None:
        self._arguments = (store, runner, place, log)
        self._process: BaseProcess | None = None
        self.connection: Any = None  # a multiprocessing connection while the process runs
        self.step: Step | None = None

    def start(self, step: Step) -> None:
        # Not forked: CUDA and this process' thread pools would not work in the child.
        context = multiprocessing.get_context("spawn")
        if self._process is None:
            self.connection, theirs = context.Pipe()
            self._process = context.Process(target=_work, args=(theirs, *self._arguments), daemon=False)
            self._process.start()
            theirs.close()
        self.step = step
        # A worker that ended while idle takes no step; `finish` reports it.
        with suppress(BrokenPipeError):
            self.connection.send(step)

    def finish(self) -> tuple[Step, str | None]:
        """The step that was running and why it failed, once `connection` is readable."""
        assert self.step is not None and self._process is not None
        step, self.step = self.step, None
        try:
            failure: str | None = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode or 0
            how = f"ended by signal {-code}" if code < 0 else f"ended with code {code}"
            failure = f"its process {how}; see {self._arguments[3]}"
            self.connection.close()
            self._process = None
        return step, failure

    def end(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.join()


def _work(connection: Connection, store: StepStore, runner: str, place: Place, log: Path) -> None:
    """A worker's process: receives steps, sends None for a finished one, else a line."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_after, args=(parent.sentinel,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    os.environ.update(place.environment)
    with open(log, "ab", buffering=0) as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    import torch

    torch.set_num_threads(place.num_threads)
    module, _, name = runner.partition(":")
    function = getattr(importlib.import_module(module), name)
    while True:
        try:
            step: Step = connection.recv()
        except EOFError:
            return
        print(f"{step.name}: {step.settings}", flush=True)
        failure = None
        try:
            store.make(step, partial(function, step))
        except Exception as error:
            # Other rows do not depend on this one, and the log has the traceback.
            traceback.print_exc()
            failure = describe(error)
        connection.send(failure)


def _end_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def describe(error: BaseException) -> str:
    """An exception in one line, with its type unless it is a user's mistake."""
    text = " ".join(str(error).split())[:300] or type(error).__name__
    return text if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text}"
