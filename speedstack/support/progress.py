"""Progress bars: one for a piece of work; for a job of stages, one per stage with the time left.

Each stage has an expected time, scaled by this machine's pace on finished stages; once a stage has made some way, its
own pace replaces it. rich draws the bars on a terminal; elsewhere (a log, CI) a line appears at each tenth of a stage.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TaskProgressColumn, TextColumn
from rich.text import Text
from tqdm import tqdm

# Share of its work after which a stage's own pace is trusted; before, one slow first step would dominate.
_TRUSTED_SHARE = 0.05
_LOG_EVERY = 0.1
# A first stage of a few seconds, mostly imports, says little about the minutes to come.
_PRIOR_SECONDS = 60.0

# Called with (work done, total work) and, optionally, a few words such as "loss 3.21".
Advance = Callable[..., None]


@contextmanager
def counting_bar(description: str, unit: str, is_shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, removed at the end; yields a function to call with (done, total)."""
    with tqdm(desc=description, unit=unit, leave=False, dynamic_ncols=True, disable=not is_shown) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


class _TimeLeft(ProgressColumn):
    def __init__(self, seconds_left: Callable[[TaskID], float | None]) -> None:
        super().__init__()
        self._seconds_left = seconds_left

    def render(self, task: Task) -> Text:
        seconds = None if task.finished else self._seconds_left(task.id)
        return Text("" if seconds is None else f"{format_seconds(seconds)} left", style="progress.remaining")


class _Elapsed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(format_seconds(task.fields.get("seconds") or task.elapsed or 0.0), style="progress.elapsed")


class StageProgress:
    """Draws the stages in `expected_seconds` (name -> seconds, in order). Use as a context manager."""

    def __init__(self, console: Console, expected_seconds: Mapping[str, float], total_name: str = "total") -> None:
        self._console = console
        self._expected = dict(expected_seconds)
        self._pending = list(expected_seconds)
        self._total_name = total_name
        self._running: str | None = None
        self._started = 0.0
        self._share = 0.0
        self._first_share: float | None = None
        self._finished_seconds = 0.0
        self._finished_expected = 0.0
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            _Elapsed(),
            _TimeLeft(self._seconds_left_of_task),
            TextColumn("{task.fields[note]}", style="dim"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._total: TaskID | None = None

    def __enter__(self) -> StageProgress:
        self._bars.start()
        self._total = self._bars.add_task(self._total_name, total=sum(self._expected.values()), note="")
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def skip(self, name: str, seconds: float) -> None:
        """Mark a stage that an earlier process finished in `seconds`."""
        self._pending.remove(name)
        self._bars.add_task(name, total=1, completed=1, note="done before", seconds=seconds)
        self._log(f"{self._label(name)} done before ({format_seconds(seconds)})")
        self._advance_total(0.0)

    @contextmanager
    def stage(self, name: str) -> Iterator[Advance]:
        """Run a stage; yields a function to call with (done, total, note="")."""
        self._pending.remove(name)
        started = time.monotonic()
        self._running, self._started = name, started
        self._share, self._first_share = 0.0, None
        self._task = self._bars.add_task(name, total=None, note="")
        self._log(f"{self._label(name)} started, about {format_seconds(self.stage_seconds_left())}")
        logged = 0.0

        def advance(done: int, total: int, note: str = "") -> None:
            nonlocal logged
            assert self._task is not None
            self._share = done / max(total, 1)
            if self._first_share is None:
                # An earlier process did the first share of a resumed stage.
                self._first_share = self._share if done < total else 0.0
                self._started = time.monotonic() if self._share else self._started
            self._bars.update(self._task, completed=done, total=total, note=note)
            self._advance_total(self._share * self._expected[name])
            if self._share - logged >= _LOG_EVERY and done < total:
                logged = self._share
                text = f"{self._label(name)} {self._share:.0%} {note}".rstrip()
                self._log(
                    f"{text}, {format_seconds(self.stage_seconds_left())} left, "
                    f"{self._total_name} {format_seconds(self.total_seconds_left())} left"
                )

        yield advance
        seconds = time.monotonic() - started
        if (self._first_share or 0.0) < _LOG_EVERY:
            self._finished_seconds += seconds
            self._finished_expected += self._expected[name]
        self._running = None
        self._bars.update(self._task, total=1, completed=1, note="", seconds=seconds)
        self._advance_total(0.0)
        self._log(f"{self._label(name)} done in {format_seconds(seconds)}")

    def stage_seconds_left(self) -> float:
        """Expected remaining seconds of the running stage; 0 between stages."""
        if self._running is None:
            return 0.0
        elapsed = time.monotonic() - self._started
        first = self._first_share or 0.0
        if self._share - first > _TRUSTED_SHARE:
            return elapsed / (self._share - first) * (1 - self._share)
        return max(0.0, self._expected[self._running] * self._pace() * (1 - first) - elapsed)

    def total_seconds_left(self) -> float:
        """Expected remaining seconds of all stages."""
        return self.stage_seconds_left() + self._pace() * sum(self._expected[name] for name in self._pending)

    def _pace(self) -> float:
        """Seconds per expected second; 1 until the finished stages outweigh the prior."""
        return (self._finished_seconds + _PRIOR_SECONDS) / (self._finished_expected + _PRIOR_SECONDS)

    def _seconds_left_of_task(self, task: TaskID) -> float | None:
        if task == self._total:
            return self.total_seconds_left()
        return self.stage_seconds_left() if task == self._task else None

    def _advance_total(self, running: float) -> None:
        if self._total is not None:
            waiting = sum(self._expected[name] for name in self._pending)
            current = self._expected[self._running] if self._running else 0.0
            done = sum(self._expected.values()) - waiting - current + running
            self._bars.update(self._total, completed=done)

    def _label(self, name: str) -> str:
        return f"[{list(self._expected).index(name) + 1}/{len(self._expected)}] {name}"

    def _log(self, line: str) -> None:
        if not self._console.is_terminal:
            # No markup: the label's brackets are literal.
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def format_seconds(seconds: float) -> str:
    """'0:07', '12:30' or '1:02:03'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
