"""How an engine speculates: how many proposals a round, from which noise, in a chain or a tree.

None of it changes the text. It changes how many rows are drafted and verified for it.
"""

from dataclasses import dataclass
from typing import Literal

from speedstack.dflash.model import DFlashDraftModel
from speedstack.runtime.model.kv_ring import MAX_ROWS

NGRAM: Literal["ngram"] = "ngram"  # in the place of a drafter's path: prompt look-up
DEFAULT_NUM_NGRAM_DRAFTS = 7


@dataclass(frozen=True)
class DraftStrategy:
    """Options of speculation.

    `num_drafts`: proposals a round, or the depth of a tree; None takes all that the drafter makes, `adaptive` drafts
    and verifies as many as are worth their cost.
    `noise`: `none` proposes the drafter's most probable tokens. `shared` proposes what the drafter would sample with
    the very noise, temperature, top-k and top-p that the target samples with at that position; where the target is
    greedy there is no noise, and both are the same.
    `tree_budget`: verify a tree of so many nodes instead of a chain.
    `ngram_size`: longest run of tokens that prompt look-up looks for.
    Raises ValueError for values out of range, or that exclude each other.
    """

    num_drafts: int | Literal["adaptive"] | None = None
    noise: Literal["none", "shared"] = "none"
    tree_budget: int | None = None
    ngram_size: int = 3

    def __post_init__(self) -> None:
        if isinstance(self.num_drafts, str) and self.num_drafts != "adaptive":
            raise ValueError(f"num_drafts {self.num_drafts!r} must be 'adaptive' or a number")
        if self.noise not in ("none", "shared"):
            raise ValueError(f"draft_noise must be 'none' or 'shared', not {self.noise!r}")
        if self.tree_budget is not None and not 1 <= self.tree_budget < MAX_ROWS:
            raise ValueError(f"tree_budget must be between 1 and {MAX_ROWS - 1} nodes, got {self.tree_budget}")
        if self.tree_budget is not None and self.is_adaptive:
            raise ValueError("tree_budget fixes the rows of a round and num_drafts='adaptive' varies them: choose one")
        if self.ngram_size < 1:
            raise ValueError(f"ngram_size must be at least 1, got {self.ngram_size}")

    @property
    def is_adaptive(self) -> bool:
        return self.num_drafts == "adaptive"

    def num_per_round(self, drafter: DFlashDraftModel | Literal["ngram"] | None) -> int:
        """The most proposals a round that this drafter makes, 0 for none.

        Raises ValueError for an option that the drafter does not have.
        """
        if drafter is None:
            given: tuple[tuple[str, object, object], ...] = (
                ("num_drafts", self.num_drafts, None),
                ("draft_noise", self.noise, "none"),
                ("tree_budget", self.tree_budget, None),
            )
            for name, value, default in given:
                if value != default:
                    raise ValueError(f"{name} {value!r} needs a drafter")
            return 0
        wanted = self.num_drafts if isinstance(self.num_drafts, int) else None
        if drafter == NGRAM:
            if self.noise != "none" or self.tree_budget is not None:
                name = "draft_noise" if self.noise != "none" else "tree_budget"
                raise ValueError(f"{name} needs a drafter's probabilities, which prompt look-up does not have")
            limit, whose = MAX_ROWS - 1, "one step's"
            number = DEFAULT_NUM_NGRAM_DRAFTS if wanted is None else wanted
        else:
            assert isinstance(drafter, DFlashDraftModel)
            limit, whose = drafter.config.num_proposals, "the drafter's"
            number = limit if wanted is None else wanted
        if not 1 <= number <= limit:
            raise ValueError(f"num_drafts {number} must be 'adaptive' or between 1 and {whose} {limit}")
        if number >= MAX_ROWS:
            raise ValueError(f"num_drafts {number} is more than the {MAX_ROWS - 1} that one step can verify")
        return number
