"""Who runs in a race, and what a call of theirs gives: tokens, and the times at which they came."""

from collections.abc import Callable
from dataclasses import dataclass

from speedstack.runtime import GenerationStats


@dataclass(frozen=True)
class Sample:
    """A sequence of a timed call. `arrivals` are the seconds from the call at which its tokens came, and how many each
    time; `total_seconds` is until the call ended. `rounds` are the counts of a contestant that speculates.
    """

    tokens: list[int]
    arrivals: list[tuple[float, int]]
    total_seconds: float
    rounds: GenerationStats | None = None

    @property
    def first_token_seconds(self) -> float:
        """From the call to the first arrival."""
        return self.arrivals[0][0]

    def token_seconds(self) -> list[float]:
        """Every token's share of the wait for it, those of the first arrival left out."""
        return [wait / count for wait, count in self._waits() for _ in range(count)]

    def wait_seconds(self) -> list[float]:
        """Times between arrivals."""
        return [wait for wait, _ in self._waits()]

    def _waits(self) -> list[tuple[float, int]]:
        pairs = zip(self.arrivals, self.arrivals[1:], strict=False)
        return [(now - before, count) for (before, _), (now, count) in pairs]


@dataclass(frozen=True)
class Call:
    """One timed call: the samples of the sequences that were decoded together, and the tokens of their prompts.

    `joules` are None where they are not counted.
    """

    samples: list[Sample]
    num_prompt_tokens: int
    joules: float | None = None

    @property
    def num_tokens(self) -> int:
        """New tokens of all sequences."""
        return sum(len(sample.tokens) for sample in self.samples)

    @property
    def total_seconds(self) -> float:
        """Until the last sequence ended."""
        return max(sample.total_seconds for sample in self.samples)

    @property
    def first_token_seconds(self) -> float:
        """Until every sequence had its first token, which is when all prompts are read."""
        return max(sample.first_token_seconds for sample in self.samples)

    @property
    def num_first_tokens(self) -> int:
        """What had arrived by then."""
        first = self.first_token_seconds
        return sum(count for sample in self.samples for moment, count in sample.arrivals if moment <= first)


@dataclass(frozen=True)
class Contestant:
    """A way of generating: `run(prompt ids, number of new tokens)` decodes greedily, past any end-of-text token.

    `run_batch(prompts, number of new tokens)` decodes several prompts at once; None for who cannot.
    `enter_set` is told, before each call, of which set the prompt is: whoever sizes buffers ahead sizes them by a set.
    What it takes is no part of a call's time; in warm-ups it counts as theirs.
    `identical_to` names the contestant whose tokens these must be compared with; `identity_promised` says that a
    difference is a fault, not a rounding.
    """

    name: str
    description: str
    run: Callable[[list[int], int], Sample]
    run_batch: Callable[[list[list[int]], int], list[Sample]] | None = None
    prepare_seconds: float = 0.0
    enter_set: Callable[[str], None] | None = None
    identical_to: str | None = None
    identity_promised: bool = False
