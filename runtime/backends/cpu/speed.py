"""How fast the CPU kernels are on this machine: how many threads help a step, and what a round of drafts costs.

Both are measured on the model at hand, when the backend is made. Other work on the machine changes how many threads
help: when steps become much slower or faster than they were, the numbers are tried again, on the steps that are asked
for anyway.
None of it changes a bit of what is computed.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from speedstack.runtime.rounds.draft_length import RoundCost

# Rows of a step that is called small: a sequence's newest token and a block of drafts. Larger ones take all threads.
SMALL_STEP_ROWS = 8
_TRIALS = 3
# More threads have to save so much of a step's time: beside other work each is one more that may have to be waited for.
_WORTH = 0.05
_CHANGE, _RECENT_STEPS = 1.5, 16


def thread_counts(most: int) -> list[int]:
    """Powers of two below `most`, and `most`."""
    return [1 << n for n in range((most - 1).bit_length())] + [most]


class ThreadChoice:
    """How many threads, at most `most`, a small step gets.

    `row_cost`: what a row beside the first adds to a step, in steps of a single row, so that steps of different numbers
    of rows can be compared.
    """

    def __init__(self, most: int) -> None:
        self.most, self.chosen, self.row_cost = most, most, 0.0
        self._counts = thread_counts(most)
        self._waiting: list[int] = []
        self._times: dict[int, list[float]] = {}
        self._recent: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._usual = float("inf")

    def trials(self) -> Iterator[int]:
        """The numbers to try, each several times and in turn; `record` takes what each of them took."""
        if len(self._counts) > 1:
            self._begin()
        while self._waiting:
            yield self._waiting[-1]

    def next(self, num_rows: int) -> int:
        """Threads for the step that comes."""
        if num_rows > SMALL_STEP_ROWS:
            return self.most
        return self._waiting[-1] if self._waiting else self.chosen

    def record(self, num_rows: int, seconds: float) -> None:
        """What the step took for which `next` was asked."""
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
    """What each action takes: the median of a few times, in turn, after one that is not counted."""
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
        draft: seconds of a draft of one proposal, and of `num_drafts`; empty where nothing drafts.
        num_drafts: the most proposals of a draft.
    """
    one, several = step
    row = max(0.0, several / one - 1.0) / (SMALL_STEP_ROWS - 1)
    if not draft:
        return RoundCost(0.0, 0.0, row)
    shortest, longest = draft
    token = max(0.0, longest - shortest) / one / max(1, num_drafts - 1)
    return RoundCost(max(0.0, shortest / one - token), token, row)
