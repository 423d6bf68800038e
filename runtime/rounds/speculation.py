"""Options of speculation: proposals per round, and their noise. They never change the text."""

from dataclasses import dataclass
from typing import Literal

from speedstack.dflash.model import DFlashDraftModel
from speedstack.runtime.model.kv_ring import MAX_ROWS

NGRAM: Literal["ngram"] = "ngram"  # given instead of a drafter's path: prompt lookup
DEFAULT_NUM_NGRAM_DRAFTS = 7


@dataclass(frozen=True)
class DraftStrategy:
    """Options of speculation. Raises ValueError for values out of range.

    `num_drafts`: proposals per round; None takes all of the drafter's, `adaptive` as many as pay for their cost.
    `noise`: `none` proposes the drafter's most probable tokens; `shared` samples them with the target's noise,
    temperature, top-k and top-p of that position. Both are the same for greedy decoding.
    `ngram_size`: longest run of tokens that prompt lookup searches for.
    """

    num_drafts: int | Literal["adaptive"] | None = None
    noise: Literal["none", "shared"] = "none"
    ngram_size: int = 3

    def __post_init__(self) -> None:
        if isinstance(self.num_drafts, str) and self.num_drafts != "adaptive":
            raise ValueError(f"num_drafts {self.num_drafts!r} must be 'adaptive' or a number")
        if self.noise not in ("none", "shared"):
            raise ValueError(f"draft_noise must be 'none' or 'shared', not {self.noise!r}")
        if self.ngram_size < 1:
            raise ValueError(f"ngram_size must be at least 1, got {self.ngram_size}")

    @property
    def is_adaptive(self) -> bool:
        return self.num_drafts == "adaptive"

    def num_per_round(self, drafter: DFlashDraftModel | Literal["ngram"] | None) -> int:
        """The most proposals per round with this drafter, 0 without one. Raises ValueError for an option it does not
        support.
        """
        if drafter is None:
            given: tuple[tuple[str, object, object], ...] = (
                ("num_drafts", self.num_drafts, None),
                ("draft_noise", self.noise, "none"),
            )
            for name, value, default in given:
                if value != default:
                    raise ValueError(f"{name} {value!r} needs a drafter")
            return 0
        wanted = self.num_drafts if isinstance(self.num_drafts, int) else None
        if drafter == NGRAM:
            if self.noise != "none":
                raise ValueError("draft_noise needs a drafter's probabilities, which prompt lookup does not have")
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
