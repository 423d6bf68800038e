"""How many tokens to draft in a round, and how many of the proposals to verify.

Drafting and verifying rows cost time, and a proposal brings a token only if all before it are right as well. Where text
is easy a whole block pays; where it is hard one step a token is faster than any draft. Two estimates decide: before
drafting, how often this sequence's recent proposals were right; after it, the drafter's own probabilities. Each time
the number with the most expected tokens a unit of time is taken. Whatever is chosen, the text is the same: only rows
that would be thrown away are saved.

What a round costs is the backend's to say, for the drafter it has. One that measures it on the running machine makes
other rounds on another; the text is the same on all.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RoundCost:
    """What drafting and verifying take, in steps of a single row: a draft of k tokens `draft + draft_token * k`, a step
    of R rows `1 + row * (R - 1)`.
    """

    draft: float
    draft_token: float
    row: float

    @property
    def of_prompt_lookup(self) -> "RoundCost":
        """The same where proposals cost nothing before they are verified."""
        return RoundCost(0.0, 0.0, self.row)


# Measured on a 12M-parameter model and a two-layer drafter. Where all is PyTorch, calls are most of a step whatever its
# rows are, and a draft has few of them. With compiled kernels bytes decide; that is what plans for GPUs, which nobody
# has timed, take for granted.
IN_PYTORCH = RoundCost(draft=0.05, draft_token=0.004, row=0.012)
COMPILED = RoundCost(draft=0.45, draft_token=0.08, row=0.2)


# Weight of a sequence's past rounds after one more round: about the last five count. Of all sequences': the last fifty.
_MEMORY, _LONG_MEMORY = 0.8, 0.98
# What is believed before the first round of all: four proposals in five right, worth two observations.
_PRIOR_RIGHT, _PRIOR_WRONG = 1.6, 0.4
# After so many rounds without a draft the text may have become easy again: try. Twice as many after every try that
# says no, so that where drafts never pay they cost next to nothing.
_ROUNDS_TO_RETRY, _MOST_ROUNDS_TO_RETRY = 8, 128


def num_worth(chances: Sequence[float], base_cost: float, token_cost: float) -> int:
    """The number of leading proposals, 0 to all, that maximizes expected tokens over time.

    Args:
        chances: probability of each proposal to be right if those before it are.
        base_cost: of taking any proposal at all, beside the step of one row.
        token_cost: of each proposal.
    """
    best, best_rate = 0, 1.0
    expected, all_right = 1.0, 1.0
    for count, chance in enumerate(chances, start=1):
        all_right *= chance
        expected += all_right
        rate = expected / (1.0 + base_cost + token_cost * count)
        if rate > best_rate:
            best, best_rate = count, rate
    return best


class DraftHistory:
    """What rounds of all sequences that are sampled alike taught of a drafter; a new sequence begins with it."""

    def __init__(self) -> None:
        self.right, self.wrong = _PRIOR_RIGHT, _PRIOR_WRONG
        self.rounds_to_retry = _ROUNDS_TO_RETRY

    @property
    def chance(self) -> float:
        """How often a proposal was right if those before it were."""
        return self.right / (self.right + self.wrong)

    def record(self, num_right: int, is_wrong: bool) -> None:
        self.right = self.right * _LONG_MEMORY + num_right
        self.wrong = self.wrong * _LONG_MEMORY + is_wrong


class DraftBudget:
    """One sequence's choice of how much to draft and verify; `limit` is the most that the drafter proposes."""

    def __init__(self, limit: int, cost: RoundCost, history: DraftHistory | None = None) -> None:
        self._limit, self._cost, self._history = limit, cost, history or DraftHistory()
        believed = _PRIOR_RIGHT + _PRIOR_WRONG
        self._right, self._wrong = believed * self._history.chance, believed * (1.0 - self._history.chance)
        self._num_skipped = 0
        self._has_drafted = self._is_retry = False

    def num_to_draft(self) -> int:
        """Proposals worth asking for, judged by what was right lately."""
        count = self._num_that_pay()
        self._is_retry = count == 0 and self._num_skipped >= self._history.rounds_to_retry
        return (self._limit + 1) // 2 if self._is_retry else count

    def _num_that_pay(self) -> int:
        chance = self._right / (self._right + self._wrong)
        return num_worth([chance] * self._limit, self._cost.draft, self._cost.draft_token + self._cost.row)

    def num_to_verify(self, probabilities: Sequence[float]) -> int:
        """Leading proposals worth verifying, judged by the drafter's probabilities; drafting is paid for by now."""
        self._has_drafted = True
        return num_worth(probabilities, base_cost=0.0, token_cost=self._cost.row)

    def record(self, num_verified: int, num_accepted: int) -> None:
        """Remembers a round; 0 verified is a round without a draft, or one whose drafts were not worth a row."""
        has_drafted, self._has_drafted = self._has_drafted, False
        if not has_drafted:
            self._num_skipped += 1
            return
        self._num_skipped = 0
        # A draft that was not worth verifying was paid for as well: it counts as wrong.
        is_wrong = num_accepted < num_verified or num_verified == 0
        self._right = self._right * _MEMORY + num_accepted
        self._wrong = self._wrong * _MEMORY + is_wrong
        history = self._history
        history.record(num_accepted, is_wrong)
        if self._num_that_pay():
            history.rounds_to_retry = _ROUNDS_TO_RETRY
        elif self._is_retry:
            history.rounds_to_retry = min(2 * history.rounds_to_retry, _MOST_ROUNDS_TO_RETRY)
