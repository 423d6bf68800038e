"""Objects in processes of their own, called with deadlines.

A kernel that reads outside its memory breaks its process' CUDA context for good, and one that never ends blocks every
later call: neither can be caught where it happens. So each contestant lives in a process; whoever misses a deadline is
killed. Calls may overlap: `begin` on several workers, then `finish` on each.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, Protocol

from speedstack.eval.results.failures import one_line

INTERPRET = "TRITON_INTERPRET"
KILLED = "killed: no answer in"
NEVER_BEGAN = "the time was up before it began"


class WorkerFailed(RuntimeError):
    """A call raised, its process died, or it missed its deadline. One line."""


class Worker(Protocol):
    """An object that lives elsewhere. `is_alive`: it can still be called."""

    is_alive: bool

    def begin(self, method: str, *arguments: Any) -> None:
        """Starts a call; `finish` comes before the next one."""
        ...

    def finish(self, deadline: float) -> Any:
        """What the call returned. `deadline`: a moment of `time.monotonic`. Raises WorkerFailed."""
        ...

    def close(self) -> None:
        """Ends it, whatever it is doing."""
        ...

    def kill(self) -> None:
        """From another thread than the one that waits in `finish`, which then raises."""
        ...


# Makes a worker around `factory(*arguments)`.
StartWorker = Callable[..., Worker]


def call(worker: Worker, deadline: float, method: str, *arguments: Any) -> Any:
    """Begins and finishes one call; past the deadline it does not begin one."""
    if deadline <= time.monotonic():
        worker.close()
        raise WorkerFailed(NEVER_BEGAN)
    worker.begin(method, *arguments)
    return worker.finish(deadline)


class ProcessWorker:
    """A worker in a process that is started afresh, not forked: CUDA does not survive a fork."""

    def __init__(self, factory: Callable[..., Any], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, factory, arguments))
        self._process.start()
        theirs.close()
        self.is_alive = True

    def begin(self, method: str, *arguments: Any) -> None:
        # A process that died is noticed by `finish`.
        with contextlib.suppress(OSError):
            self._connection.send((method, arguments))

    def finish(self, deadline: float) -> Any:
        allowed = deadline - time.monotonic()
        try:
            if not self._connection.poll(max(allowed, 0.0)):
                self.close()
                raise WorkerFailed(f"{KILLED} {allowed:.0f} s" if allowed > 0 else NEVER_BEGAN)
            is_good, answer = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(5)
            code = self._process.exitcode
            self.close()
            raise WorkerFailed(f"its process died (exit code {code})") from None
        if not is_good:
            raise WorkerFailed(answer)
        return answer

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        self.is_alive = False
        self._process.kill()
        self._process.join()
        self._connection.close()


class InterpretedWorker(ProcessWorker):
    """A process in which Triton's kernels are interpreted, whatever they are in this one."""

    def __init__(self, factory: Callable[..., Any], *arguments: Any) -> None:
        before = os.environ.get(INTERPRET)
        # Kernels are made for one or the other when they are imported: it has to be known before the process starts.
        os.environ[INTERPRET] = "1"
        try:
            super().__init__(factory, *arguments)
        finally:
            if before is None:
                del os.environ[INTERPRET]
            else:
                os.environ[INTERPRET] = before


def _serve(connection: multiprocessing.connection.Connection, factory: Callable[..., Any], arguments: Any) -> None:
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.dup2(2, 1)  # what libraries print is no result
    target: Any = None
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            method, values = connection.recv()
            try:
                if target is None:
                    target = factory(*arguments)
                answer = True, getattr(target, method)(*values)
            except Exception as error:
                traceback.print_exc()
                answer = False, one_line(error)
            connection.send(answer)


def _die_with_parent() -> None:
    """Whoever kills the suite does not leave a GPU busy behind, however stuck the main thread is."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class LocalWorker:
    """A worker in this process, for tests and small machines: nothing can stop it, so deadlines are checked after."""

    def __init__(self, factory: Callable[..., Any], *arguments: Any) -> None:
        self._make = lambda: factory(*arguments)
        self._target: Any = None
        self._call: tuple[str, tuple[Any, ...]] | None = None
        self.is_alive = True

    def begin(self, method: str, *arguments: Any) -> None:
        self._call = method, arguments

    def finish(self, deadline: float) -> Any:
        assert self._call is not None
        if time.monotonic() > deadline:
            self.close()
            raise WorkerFailed(NEVER_BEGAN)
        (method, arguments), self._call = self._call, None
        try:
            if self._target is None:
                self._target = self._make()
            return getattr(self._target, method)(*arguments)
        except Exception as error:
            traceback.print_exc()
            raise WorkerFailed(one_line(error)) from error

    def kill(self) -> None:
        pass

    def close(self) -> None:
        self.is_alive = False
        self._target = None
