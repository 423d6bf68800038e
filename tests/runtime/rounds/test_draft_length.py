"""Budgets: as many drafts as pay, and none where none do."""

from speedstack.runtime.rounds.draft_length import COMPILED, IN_PYTORCH, DraftBudget, DraftHistory, RoundCost, num_worth

COST = COMPILED
SURE, DOUBTFUL = [0.99] * 7, [0.05] * 7


def play(budget: DraftBudget, probabilities: list[float], num_right: int, num_rounds: int) -> list[int]:
    """Plays rounds in which `num_right` proposals would be accepted; how many were drafted in each."""
    drafted = []
    for _ in range(num_rounds):
        count = budget.num_to_draft()
        drafted.append(count)
        verified = budget.num_to_verify(probabilities[:count]) if count else 0
        budget.record(verified, min(verified, num_right))
    return drafted


def test_proposals_are_worth_what_they_bring() -> None:
    assert num_worth([1.0] * 7, base_cost=0.5, token_cost=0.28) == 7
    assert num_worth([0.0] * 7, base_cost=0.5, token_cost=0.28) == 0
    # After two sure proposals a third that is right one time in ten costs more than it brings.
    assert num_worth([1.0, 1.0, 0.1, 1.0, 1.0], base_cost=0.0, token_cost=0.25) == 2
    # Where rows are free everything is verified; where drafting costs three steps, nothing is drafted.
    assert num_worth([0.5, 0.01, 0.01], base_cost=0.0, token_cost=0.0) == 3
    assert num_worth([0.9, 0.9, 0.9], base_cost=3.0, token_cost=0.25) == 0


def test_budget_follows_the_text() -> None:
    budget = DraftBudget(7, COST)
    assert play(budget, SURE, num_right=7, num_rounds=8)[-1] == 7
    assert play(budget, SURE, num_right=0, num_rounds=20)[8:].count(0) > 8


def test_drafts_that_are_thrown_away_count_as_wrong() -> None:
    drafted = play(DraftBudget(7, COST), DOUBTFUL, num_right=7, num_rounds=40)
    assert 0 < sum(count > 0 for count in drafted) < 12


def test_tries_become_rarer_until_one_is_right() -> None:
    history = DraftHistory()
    drafted = play(DraftBudget(7, COST, history), SURE, num_right=0, num_rounds=600)
    gaps = [len(gap) for gap in "".join("d" if count else "-" for count in drafted).strip("d").split("d") if gap]
    assert gaps[:6] == [8, 16, 32, 64, 128, 128]
    # Another text begins with what this one taught, and is tried as seldom until drafts are right.
    assert play(DraftBudget(7, COST, history), SURE, num_right=0, num_rounds=100) == [0] * 100
    assert play(DraftBudget(7, COST, history), SURE, num_right=7, num_rounds=200)[-1] == 7
    assert history.rounds_to_retry == 8


def test_a_sequence_begins_with_what_others_taught() -> None:
    history = DraftHistory()
    first = DraftBudget(7, COST, history).num_to_draft()
    play(DraftBudget(7, COST, history), SURE, num_right=7, num_rounds=50)
    assert DraftBudget(7, COST, history).num_to_draft() == 7 > first
    assert DraftBudget(7, COST).num_to_draft() == first


def test_doubtful_proposals_are_not_verified() -> None:
    budget = DraftBudget(7, COST)
    assert budget.num_to_verify([0.99, 0.98, 0.1, 0.9]) == 2
    assert budget.num_to_verify([0.1, 0.99]) == 0


def test_what_is_drafted_follows_the_cost() -> None:
    """A dear drafter is asked for easy text alone, a cheap one always; dearer proposals make shorter drafts."""

    def first(draft: float, token: float) -> int:
        return DraftBudget(7, RoundCost(draft, token, 0.2)).num_to_draft()

    assert [first(0.1, 0.08), first(0.45, 0.08), first(0.45, 0.28), first(2.0, 0.08)] == [3, 4, 3, 0]
    assert DraftBudget(7, IN_PYTORCH).num_to_draft() == 7
    assert play(DraftBudget(7, RoundCost(3.3, 0.34, 0.2)), SURE, num_right=7, num_rounds=40).count(0) > 30
    assert play(DraftBudget(7, COST), SURE, num_right=7, num_rounds=40).count(0) == 0
    assert DraftBudget(7, COST.of_prompt_lookup).num_to_draft() == 4
