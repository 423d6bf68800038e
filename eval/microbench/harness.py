"""What the microbenchmarks share: turns, clocks, peak memory, fresh processes, optional peers.

Contestants take turns, so that a machine's drift affects all alike. The GPU suite uses this without pydantic.
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
    """A context that is timed: wall time, and processor time of all threads."""

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
    """Return values of `run(contestant, turn)` by contestant, without the first `num_warmups` turns.

    Every contestant runs once per turn, in an order drawn from `orders`, or in the given one.
    """
    given: dict[K, list[T]] = {contestant: [] for contestant in contestants}
    for turn in range(num_warmups + num_repeats):
        for contestant in orders.sample(list(given), len(given)) if orders is not None else given:
            result = run(contestant, turn)
            if turn >= num_warmups:
                given[contestant].append(result)
    return given


def in_own_process(name: str, work: Callable[..., T], *arguments: Any) -> T:
    """The result of `work(*arguments)` in a fresh process, where memory freed before does not count.

    Raises RuntimeError with `name` if it fails; its error goes to standard error.
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
    """Resident memory of this process in bytes, relative to this object's creation. The page cache does not count."""

    def __init__(self) -> None:
        check_peak_memory()
        _CLEAR_REFS.write_text("5")
        self._before = _status_bytes("VmRSS")

    def now_bytes(self) -> int:
        return _status_bytes("VmRSS") - self._before

    def peak_bytes(self) -> int:
        """The highest value since creation."""
        return _status_bytes("VmHWM") - self._before


_CLEAR_REFS = Path("/proc/self/clear_refs")


def check_peak_memory() -> None:
    """Raises ValueError off Linux, where the peak cannot be reset."""
    if not _CLEAR_REFS.exists():
        raise ValueError("peak memory is read from /proc, which this system does not have")


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def available(peers: Mapping[str, Callable[[], T]]) -> tuple[dict[str, T], dict[str, str]]:
    """Each peer's return value; and for failing peers the reason, in one line."""
    found, reasons = dict[str, T](), dict[str, str]()
    for name, make in peers.items():
        try:
            found[name] = make()
        except PEER_ERRORS as error:
            reasons[name] = one_line(error)
    return found, reasons
