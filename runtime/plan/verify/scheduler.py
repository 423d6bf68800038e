"""Runs programs that wait for each other on a CPU: one thread each, scheduled by a seed.

One thread runs at a time and yields before waits, before signals and at pauses. The seed draws the next thread;
`Scheduler.trace` replays the choices without it. If no thread can run, `Deadlock` says who waits for what.

Even seeds choose uniformly. Odd seeds use priorities that drop at a few random moments (Burckhardt et al. 2010, PCT),
so one program runs far ahead or behind, which uniform choice rarely produces.

`backends/gpu/interpreter.py` runs the resident kernel under it; tests run plans with PyTorch semantics.
"""

import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

_PRIORITY_CHANGES = 3  # priority drops of the running program, in a run of odd seed


class Deadlock(RuntimeError):
    """No program can continue. `waiting`: what each unfinished program waits for."""

    def __init__(self, waiting: Mapping[int, str]) -> None:
        self.waiting = dict(waiting)
        lines = "\n".join(f"  program {program}: {what}" for program, what in sorted(self.waiting.items()))
        super().__init__(f"deadlock: {len(self.waiting)} programs wait\n{lines}")


class _Stopped(BaseException):
    """Ends a thread after another one failed."""


@dataclass
class _Program:
    thread: threading.Thread
    turn: threading.Semaphore
    can_go: Callable[[], bool] | None = None
    what: str = "its turn"
    is_done: bool = False


class Scheduler:
    """Threads that take turns. trace: the program chosen at each switch; pass it in to replay a run."""

    def __init__(self, seed: int = 0, trace: Sequence[int] | None = None) -> None:
        self.trace: list[int] = []
        self.on_turn: Callable[[int], None] = lambda program: None
        self._replay = None if trace is None else list(trace)
        self._random = random.Random(seed)
        self._by_priority = seed % 2 == 1
        self._programs: list[_Program] = []
        self._priorities: list[float] = []
        self._changes: set[int] = set()
        self._error: BaseException | None = None
        self._finished = threading.Semaphore(0)

    def run(self, num_programs: int, body: Callable[[int], None]) -> None:
        """Runs `body(program)` for every program. Raises Deadlock, or the first exception of a body."""
        assert not self._programs, "a scheduler runs once"
        for program in range(num_programs):
            thread = threading.Thread(target=self._main, args=(program, body), daemon=True)
            self._programs.append(_Program(thread, threading.Semaphore(0)))
        self._priorities = [self._random.random() for _ in range(num_programs)]
        # About the switches of a small plan; in a longer run all changes come early.
        self._changes = {self._random.randrange(200 * num_programs) for _ in range(_PRIORITY_CHANGES)}
        for state in self._programs:
            state.thread.start()
        self._programs[self._choose()].turn.release()
        self._finished.acquire()
        for state in self._programs:
            state.thread.join()
        if self._error is not None:
            raise self._error

    @property
    def unfinished(self) -> list[int]:
        """Programs that are not done."""
        return [program for program, state in enumerate(self._programs) if not state.is_done]

    def pause(self, program: int) -> None:
        """Lets other programs run."""
        self.wait(program, None, "its turn")

    def wait(self, program: int, can_go: Callable[[], bool] | None, what: str) -> None:
        """Lets other programs run until `can_go()`; `what` describes the wait in a dump."""
        state = self._programs[program]
        state.can_go, state.what = can_go, what
        following = self._choose()
        if following != program:
            self._programs[following].turn.release()
            state.turn.acquire()
            if self._error is not None:
                raise _Stopped
        state.can_go, state.what = None, "its turn"
        self.on_turn(program)

    def _choose(self) -> int:
        ready = [
            program
            for program, state in enumerate(self._programs)
            if not state.is_done and (state.can_go is None or state.can_go())
        ]
        if not ready:
            waiting = {program: state.what for program, state in enumerate(self._programs) if not state.is_done}
            # Kept now: the deadlock may be wrapped on its way up.
            self._error = self._error or Deadlock(waiting)
            raise self._error
        if self._replay is not None:
            chosen = self._replay[len(self.trace)]
            assert chosen in ready, f"the trace does not fit: program {chosen} cannot go on"
        elif self._by_priority:
            if len(self.trace) in self._changes and self.trace:
                self._priorities[self.trace[-1]] = min(self._priorities) - 1
            chosen = max(ready, key=lambda program: self._priorities[program])
        else:
            chosen = self._random.choice(ready)
        self.trace.append(chosen)
        return chosen

    def _main(self, program: int, body: Callable[[int], None]) -> None:
        state = self._programs[program]
        state.turn.acquire()
        try:
            if self._error is None:
                self.on_turn(program)
                body(program)
        except _Stopped:
            pass
        except BaseException as error:  # handed to the caller of `run`
            self._error = self._error or error
        state.is_done = True
        left = [other for other in self._programs if not other.is_done]
        if not left:
            self._finished.release()
        elif self._error is not None:
            left[0].turn.release()
        else:
            try:
                self._programs[self._choose()].turn.release()
            except Deadlock:
                left[0].turn.release()
