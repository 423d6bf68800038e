"""The backend interface: steps of the target, and proposals of the drafter.

A backend owns weights and static key/value buffers for `num_slots` sequences, without lengths: a row names its slot and
position, writes its keys and values there and attends to earlier positions. Rejected drafts are overwritten before they
are read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from speedstack.dflash.model import DFlashDraftModel
from speedstack.dflash.propose import Draft
from speedstack.runtime.rounds.draft_length import RoundCost
from speedstack.runtime.rounds.sampling import GREEDY, SamplingParams


@dataclass(frozen=True)
class Draw:
    """How the token after a row is sampled (`sampling.sample`). Temperature is above 0."""

    seed: int
    sequence: int
    params: SamplingParams


@dataclass(frozen=True)
class Rows:
    """Tokens of one step. Rows of a sequence have ascending, consecutive positions.

    `draws`: per row, None for the argmax; only for backends with `rounds`.
    """

    tokens: Sequence[int]
    slots: Sequence[int]
    positions: Sequence[int]
    draws: Sequence[Draw | None] | None = None


@dataclass(frozen=True)
class DraftRequest:
    """Asks for proposals after `anchor`, from the context of `slot` before it.

    `params`, `noise`: the target's sampling of the tokens after the anchor, float32 [V] per position. Without noise,
    proposals are the most probable tokens.
    """

    anchor: int
    slot: int
    position: int
    params: SamplingParams = GREEDY
    noise: Sequence[torch.Tensor] | None = None


@dataclass(frozen=True)
class RoundsRequest:
    """A sequence to decode for some rounds without the host.

    `tokens`: all so far; the last is the anchor, not computed yet. `end`: the most tokens there may be. `watches_eos`:
    whether EOS ends it. `num_drafts`: most proposals per round, by the drafter or by prompt lookup for runs of up to
    `ngram_size` tokens. `draw`: None is greedy.
    """

    tokens: Sequence[int]
    slot: int
    end: int
    watches_eos: bool
    num_drafts: int = 0
    ngram_size: int = 0
    draw: Draw | None = None


@dataclass(frozen=True)
class Round:
    """One round of one sequence: proposals made, verified and accepted, and tokens committed; token -1 means NaN
    logits.
    """

    num_proposed: int
    num_drafts: int
    num_accepted: int
    tokens: Sequence[int]


class Rounds(Protocol):
    """Runs several rounds without the host, which gets the results at the end."""

    max_rounds: int
    num_rows: int  # rows of a step, an upper bound for a sequence's anchor and drafts

    def run(self, requests: Sequence[RoundsRequest], num_rounds: int) -> list[list[Round]]:
        """Up to `num_rounds` rounds of each sequence. Raises RuntimeError as `Backend.step`.

        Keys and values of all tokens but the anchor must be present.
        """
        ...

    def set_prompt_lookup(self, is_wanted: bool) -> None:
        """Whether requests may ask for prompt lookup from now on."""
        ...

    @property
    def has_drafter(self) -> bool:
        """Whether requests may use the backend's drafter."""
        ...

    def takes(self, requests: Sequence[RoundsRequest]) -> bool:
        """Whether these requests fit one launch; the host runs the rounds of others."""
        ...


class Backend(Protocol):
    """One implementation of a step. The next call may overwrite returned values."""

    name: str
    prepare_seconds: float
    # Whether `round_cost` was measured on this machine; then adaptive drafting is the default.
    has_measured_cost: bool
    # Rows that cost about one step together, for which drafts compete; None if each row has its own cost.
    rows_a_step: int | None
    # Runs several rounds and samples without the host; None if every round needs the host.
    rounds: Rounds | None

    @property
    def round_cost(self) -> RoundCost:
        """The cost of a round with the present drafter."""
        ...

    def step(self, rows: Rows, logit_rows: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
        """Computes all rows, and logits for those in `logit_rows`, which ascend; extends the drafter's context.

        Returns float32 logits [len(logit_rows), vocabulary] and the argmax of each, ties to the lower index, -1 for
        NaN. With `rows.draws` it is the sampled token.
        """
        ...

    def draft(self, requests: Sequence[DraftRequest], num_drafts: int) -> list[Draft]:
        """The first `num_drafts` proposals of each request; fewer if the drafter's logits are NaN.

        Fewer drafts than in training make a shorter, cheaper block with nearly the same proposals.
        """
        ...

    def set_drafter(self, drafter: DFlashDraftModel | None) -> None:
        """Changes or removes the drafter; it is converted to the weights' dtype and device."""
        ...

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of weights as stored by this backend, by part of the model (see `weights.packed_parts`)."""
        ...

    def cache_bytes(self) -> int:
        """Bytes of all key/value buffers."""
        ...
