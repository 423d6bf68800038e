"""Measures the CPU kernels on this machine and model: the best number of threads and the cost of a round.

Other load changes how many threads help. If steps become much slower or faster, thread counts are tried again on the
steps being served. Results never change.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from speedstack.runtime.rounds.draft_length import RoundCost

# Largest "small" step: an anchor and a block of drafts. Larger steps take all threads.
SMALL_STEP_ROWS = 8
_TRIALS = 3
# Least share of a step's time that more threads must save: under load each may delay the step.
_WORTH = 0.05
_CHANGE, _RECENT_STEPS = 1.5, 16


def thread_counts(most: int) -> list[int]:
    """Powers of two below `most`, and `most`."""
    return [1 << n for n in range((most - 1).bit_length())] + [most]


class ThreadChoice:
    """Chooses a small step's number of threads, at most `most`.

    `row_cost`: cost of each row after the first, in one-row steps, to compare steps of different sizes.
    """

    def __init__(self, most: int) -> None:
        self.most, self.chosen, self.row_cost = most, most, 0.0
        self._counts = thread_counts(most)
        self._waiting: list[int] = []
        self._times: dict[int, list[float]] = {}
        self._recent: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._usual = float("inf")

    def trials(self) -> Iterator[int]:
        """Thread counts to try, repeatedly and interleaved; `record` takes their times."""
        if len(self._counts) > 1:
            self._begin()
        while self._waiting:
            yield self._waiting[-1]

    def next(self, num_rows: int) -> int:
        """Threads for the next step."""
        if num_rows > SMALL_STEP_ROWS:
            return self.most
        return self._waiting[-1] if self._waiting else self.chosen

    def record(self, num_rows: int, seconds: float) -> None:
        """Records the time of the step for which `next` was called."""
        if num_rows > SMALL_STEP_ROWS or len(self._counts) == 1:
            return
        seconds /= 1.0 + self.row_cost * (num_rows - 1)
        if self._waiting:
            self._times[self._waiting.pop()].append(seconds)
            if not self._waiting:
                self._choose()
            return
        self._recent.append(seconds)
        if len(self._recent) == _RECENT_STEPS:
            change = statistics.median(self._recent) / self._usual
            if not 1.0 / _CHANGE < change < _CHANGE:
                self._begin()

    def _begin(self) -> None:
        self._times = {count: [] for count in self._counts}
        self._waiting = self._counts * _TRIALS

    def _choose(self) -> None:
        typical = {count: statistics.median(times) for count, times in self._times.items()}
        best = self._counts[0]
        for count in self._counts[1:]:
            if typical[count] < (1.0 - _WORTH) * typical[best]:
                best = count
        self.chosen, self._usual = best, typical[best]
        self._recent.clear()


def median_seconds(*actions: Callable[[], object]) -> list[float]:
    """Median seconds of each action, measured in turn after a warm-up."""
    times: list[list[float]] = [[] for _ in actions]
    for trial in range(1 + _TRIALS):
        for action, its_times in zip(actions, times, strict=True):
            started = time.perf_counter()
            action()
            if trial:
                its_times.append(time.perf_counter() - started)
    return [statistics.median(its_times) for its_times in times]


def round_cost(step: Sequence[float], draft: Sequence[float], num_drafts: int) -> RoundCost:
    """The cost of a round.

    Args:
        step: seconds of a step of one row, and of `SMALL_STEP_ROWS`.
        draft: seconds of a draft of one proposal, and of `num_drafts`; empty without a drafter.
        num_drafts: the most proposals of a draft.
    """
    one, several = step
    row = max(0.0, several / one - 1.0) / (SMALL_STEP_ROWS - 1)
    if not draft:
        return RoundCost(0.0, 0.0, row)
    shortest, longest = draft
    token = max(0.0, longest - shortest) / one / max(1, num_drafts - 1)
    return RoundCost(max(0.0, shortest / one - token), token, row)
