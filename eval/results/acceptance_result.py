"""Result of an acceptance measurement: how many tokens a round commits, and how far into a block the target agrees."""

from typing import Any, Literal

from pydantic import Field

from speedstack.eval.results.schema import Document, Environment, Record


class AcceptanceSet(Record):
    """Acceptance on one set of prompts.

    `acceptance_length` is tokens committed / decode rounds, the bonus token included (tau); `mean_of_responses` is the
    same ratio a response, then averaged, as the DFlash paper reports it. `survival[i]` is the share of the rounds in
    which the drafts up to position i + 1 were all accepted: the shares add up to tau - 1. (Files of 2026-11 have the
    share of the rounds that drafted the position.) `rows_per_token` are rows of the target, and `drafted_per_token`
    proposals made, a token committed; None in files written before they were counted.
    """

    name: str
    num_prompts: int
    num_rounds: int
    num_committed: int
    acceptance_length: float
    mean_of_responses: float
    survival: tuple[float, ...]
    rows_per_token: float | None = None
    drafted_per_token: float | None = None


class AcceptanceResult(Document):
    """Acceptance of one drafter by one target.

    `block_size`: the most tokens that a round commits. `strategy`: the fields of the engine's `DraftStrategy`.
    """

    kind: Literal["acceptance"] = "acceptance"
    block_size: int
    strategy: dict[str, Any] = Field(default={})
    temperature: float
    seed: int
    max_new_tokens: int
    overall: AcceptanceSet
    sets: tuple[AcceptanceSet, ...]
    environment: Environment | None = None
