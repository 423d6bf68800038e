"""How many tokens to draft in a round, and how many proposals to verify.

A proposal counts only if all before it are right, so long drafts pay on easy text only. Two estimates maximize expected
tokens per unit of time: before drafting, the sequence's recent acceptance; after it, the drafter's probabilities. The
backend gives the cost of a round, possibly measured on this machine. The choice never changes the text.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RoundCost:
    """Cost in steps of a single row: a draft of k tokens is `draft + draft_token * k`, a step of R rows `1 + row * (R -
    1)`.
    """

    draft: float
    draft_token: float
    row: float

    @property
    def of_prompt_lookup(self) -> "RoundCost":
        """The same cost with free drafting."""
        return RoundCost(0.0, 0.0, self.row)


# Measured on a 12M-parameter model and a two-layer drafter. In PyTorch, call overhead dominates a step whatever its
# rows, and a draft has few calls. With compiled kernels bytes dominate; GPU plans, which nobody has timed, assume that.
IN_PYTORCH = RoundCost(draft=0.05, draft_token=0.004, row=0.012)
COMPILED = RoundCost(draft=0.45, draft_token=0.08, row=0.2)


# Weight of past rounds after one more: about the last five count for a sequence, the last fifty over all sequences.
_MEMORY, _LONG_MEMORY = 0.8, 0.98
# Prior before the first round: four of five proposals right, worth two observations.
_PRIOR_RIGHT, _PRIOR_WRONG = 1.6, 0.4
# Rounds without a draft before the next try, because the text may have become easy. The interval doubles after every
# failed try, so that drafts that never pay cost almost nothing.
_ROUNDS_TO_RETRY, _MOST_ROUNDS_TO_RETRY = 8, 128


def num_worth(chances: Sequence[float], base_cost: float, token_cost: float) -> int:
    """The number of leading proposals, 0 to all, that maximizes expected tokens over time.

    Args:
        chances: probability that each proposal is right if those before it are.
        base_cost: of taking any proposal, in addition to a step of one row.
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
    """Acceptance over all sequences with the same sampling parameters; the prior of a new sequence."""

    def __init__(self) -> None:
        self.right, self.wrong = _PRIOR_RIGHT, _PRIOR_WRONG
        self.rounds_to_retry = _ROUNDS_TO_RETRY

    @property
    def chance(self) -> float:
        """Fraction of proposals that were right, given that those before them were."""
        return self.right / (self.right + self.wrong)

    def record(self, num_right: int, is_wrong: bool) -> None:
        self.right = self.right * _LONG_MEMORY + num_right
        self.wrong = self.wrong * _LONG_MEMORY + is_wrong


class DraftBudget:
    """One sequence's choice of how much to draft and verify; `limit`: the most that the drafter proposes."""

    def __init__(self, limit: int, cost: RoundCost, history: DraftHistory | None = None) -> None:
        self._limit, self._cost, self._history = limit, cost, history or DraftHistory()
        believed = _PRIOR_RIGHT + _PRIOR_WRONG
        self._right, self._wrong = believed * self._history.chance, believed * (1.0 - self._history.chance)
        self._num_skipped = 0
        self._has_drafted = self._is_retry = False

    def num_to_draft(self) -> int:
        """Proposals worth asking for, by recent acceptance."""
        count = self._num_that_pay()
        self._is_retry = count == 0 and self._num_skipped >= self._history.rounds_to_retry
        return (self._limit + 1) // 2 if self._is_retry else count

    def _num_that_pay(self) -> int:
        chance = self._right / (self._right + self._wrong)
        return num_worth([chance] * self._limit, self._cost.draft, self._cost.draft_token + self._cost.row)

    def num_to_verify(self, probabilities: Sequence[float]) -> int:
        """Leading proposals worth verifying, by the drafter's probabilities; drafting is already paid for."""
        self._has_drafted = True
        return num_worth(probabilities, base_cost=0.0, token_cost=self._cost.row)

    def record(self, num_verified: int, num_accepted: int) -> None:
        """Records a round; 0 verified means no draft, or a draft not worth a row."""
        has_drafted, self._has_drafted = self._has_drafted, False
        if not has_drafted:
            self._num_skipped += 1
            return
        self._num_skipped = 0
        # A draft that was not worth verifying still cost time: it counts as wrong.
        is_wrong = num_accepted < num_verified or num_verified == 0
        self._right = self._right * _MEMORY + num_accepted
        self._wrong = self._wrong * _MEMORY + is_wrong
        history = self._history
        history.record(num_accepted, is_wrong)
        if self._num_that_pay():
            history.rounds_to_retry = _ROUNDS_TO_RETRY
        elif self._is_retry:
            history.rounds_to_retry = min(2 * history.rounds_to_retry, _MOST_ROUNDS_TO_RETRY)
