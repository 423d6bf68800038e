"""What benchmarks of single parts share: turns, clocks, peak memory, processes of their own, peers.

Contestants take turns, so that a machine's drift (heat, neighbours) falls on all of them alike. The GPU suite uses this
too, on machines without pydantic: nothing here imports it.
"""

import multiprocessing
import random
import time
from collections.abc import Callable, Iterable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from speedstack.eval.results.failures import PEER_ERRORS, one_line

K = TypeVar("K")
T = TypeVar("T")


class Stopwatch:
    """A context that is timed: milliseconds by the clock, and of processor time of all threads."""

    wall_ms = cpu_ms = 0.0

    def __enter__(self) -> Self:
        self._started = time.perf_counter(), time.process_time()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        wall, cpu = self._started
        self.cpu_ms = 1e3 * (time.process_time() - cpu)
        self.wall_ms = 1e3 * (time.perf_counter() - wall)


def in_turns(
    contestants: Iterable[K],
    run: Callable[[K, int], T],
    num_repeats: int,
    num_warmups: int = 1,
    orders: random.Random | None = None,
) -> dict[K, list[T]]:
    """What `run(contestant, turn)` returned, in every turn but the first `num_warmups`.

    Everybody runs once a turn, in an order drawn anew from `orders`, or in the order given.
    """
    given: dict[K, list[T]] = {contestant: [] for contestant in contestants}
    for turn in range(num_warmups + num_repeats):
        for contestant in orders.sample(list(given), len(given)) if orders is not None else given:
            result = run(contestant, turn)
            if turn >= num_warmups:
                given[contestant].append(result)
    return given


def in_own_process(name: str, work: Callable[..., T], *arguments: Any) -> T:
    """What `work(*arguments)` returns in a new process: memory that a process has freed still counts as its own.

    Raises RuntimeError, with `name`, when it fails; its error goes to standard error.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, work, arguments))
    process.start()
    sender.close()
    try:
        result: T = receiver.recv()
    except EOFError as error:
        raise RuntimeError(f"{name} failed: its error is above") from error
    finally:
        process.join()
    return result


def _send(sender: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    sender.send(work(*arguments))


class PeakMemory:
    """Resident memory of this process, in bytes above what it holds when this is made: heap, stacks and every touched
    page of a mapped file; the page cache is none of it.
    """

    def __init__(self) -> None:
        check_peak_memory()
        _CLEAR_REFS.write_text("5")
        self._before = _status_bytes("VmRSS")

    def now_bytes(self) -> int:
        """Now."""
        return _status_bytes("VmRSS") - self._before

    def peak_bytes(self) -> int:
        """At its highest since."""
        return _status_bytes("VmHWM") - self._before


_CLEAR_REFS = Path("/proc/self/clear_refs")


def check_peak_memory() -> None:
    """Raises ValueError where the kernel keeps no peak that can be reset: off Linux."""
    if not _CLEAR_REFS.exists():
        raise ValueError("peak memory is read from /proc, which this system does not have")


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def available(peers: Mapping[str, Callable[[], T]]) -> tuple[dict[str, T], dict[str, str]]:
    """What each peer's function returns; and the reason, a line, of every peer whose function fails."""
    found, reasons = dict[str, T](), dict[str, str]()
    for name, make in peers.items():
        try:
            found[name] = make()
        except PEER_ERRORS as error:
            reasons[name] = one_line(error)
    return found, reasons
