"""Runs the steps of a store in worker processes: what needs what in order, what does not in parallel.

A worker has a device and a share of the threads for itself, imports once, and makes one step after another. It says in
one line why a step failed, and goes on with another; a worker that is killed fails its step, and is replaced. When this
process ends, however it ends, its workers do too. What they print goes to log files.

An exclusive step is started when no other step can be, and no other is started beside it.
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

# Called with a step that is settled, and why it failed; None if it did not.
OnStep = Callable[[Step, str | None], None]


@dataclass(frozen=True)
class Place:
    """Where a worker runs: variables of its environment, set before it imports torch, and torch's threads."""

    environment: Mapping[str, str]
    num_threads: int


def run_steps(
    store: StepStore, steps: Sequence[Step], runner: str, places: Sequence[Place], logs: Path, on_step: OnStep
) -> dict[str, str]:
    """Make all `steps`, and what they need, that `store` lacks; returns why by name of those that could not be made.

    `runner` is 'module:function', called as `function(step, directories of needed steps, directory to fill)`. There is
    a worker for each of `places`. Raises OSError where the directories cannot be written.
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
            # In the order of closures, needs first: what needs a step that is settled here is settled after it.
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
    """The first step that can be made now."""
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
    """One place of the pool; its process is started with its first step."""

    def __init__(self, store: StepStore, runner: str, place: Place, log: Path) -> None:
        self._arguments = (store, runner, place, log)
        self._process: BaseProcess | None = None
        self.connection: Any = None  # a multiprocessing connection while there is a process
        self.step: Step | None = None

    def start(self, step: Step) -> None:
        # Not forked: CUDA and the thread pools of this process would not work in the child.
        context = multiprocessing.get_context("spawn")
        if self._process is None:
            self.connection, theirs = context.Pipe()
            self._process = context.Process(target=_work, args=(theirs, *self._arguments), daemon=False)
            self._process.start()
            theirs.close()
        self.step = step
        # One that ended while it had nothing to do takes no step; `finish` says so.
        with suppress(BrokenPipeError):
            self.connection.send(step)

    def finish(self) -> tuple[Step, str | None]:
        """The step that was running and why it failed, once `connection` has something to say."""
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
    """A worker's process: steps come in, None goes out for one that is there, else a line."""
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
            # Whatever it is: the other rows of the table do not depend on it, and the log has the traceback.
            traceback.print_exc()
            failure = describe(error)
        connection.send(failure)


def _end_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def describe(error: BaseException) -> str:
    """An exception in one line: what it says, with its type where that is more than a user's mistake."""
    text = " ".join(str(error).split())[:300] or type(error).__name__
    return text if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text}"
