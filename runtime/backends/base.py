"""What an engine asks of the code that computes: steps of the target, and proposals of the drafter.

A backend owns weights on its device and the static key/value buffers of `num_slots` sequences. It keeps no notion of
length: a row names its slot and position, writes its keys and values there and attends to what lies before it, so that
rejected drafts need no clean-up; they are overwritten before anything reads them.
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
    """How the token after a row is drawn: `sampling.sample` with the noise of its position. Temperature is above 0."""

    seed: int
    sequence: int
    params: SamplingParams


@dataclass(frozen=True)
class Rows:
    """Tokens to compute in one step. Rows of a sequence are in ascending, gapless order of position.

    `draws`: of each row, None for the most probable token; only for backends that have `rounds`.
    """

    tokens: Sequence[int]
    slots: Sequence[int]
    positions: Sequence[int]
    draws: Sequence[Draw | None] | None = None


@dataclass(frozen=True)
class DraftRequest:
    """Proposals are wanted after `anchor`, from the context of `slot` before the anchor's position.

    `params` and `noise`: how the target will sample the tokens after the anchor, one float32 [V] a position. Without
    noise, proposals are the most probable tokens.
    """

    anchor: int
    slot: int
    position: int
    params: SamplingParams = GREEDY
    noise: Sequence[torch.Tensor] | None = None


@dataclass(frozen=True)
class RoundsRequest:
    """A sequence that is to be decoded for some rounds without the host.

    `tokens`: all there are, the newest of which, the anchor, has not been computed yet. `end`: how many there may be.
    `watches_eos`: the model's end-of-sequence tokens end it. `num_drafts`: proposals a round at most, of the backend's
    drafter, or by prompt lookup for runs of up to `ngram_size` tokens. `draw`: None is greedy.
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
    """What one round of one sequence was: proposals made and verified, how many stand, and tokens that this commits.

    A token of -1 stands for logits that are NaN.
    """

    num_proposed: int
    num_drafts: int
    num_accepted: int
    tokens: Sequence[int]


class Rounds(Protocol):
    """Rounds that a backend makes one after another without the host, which hears of them when all are done."""

    max_rounds: int
    num_rows: int  # of a step: what the anchor and the drafts of one sequence have to fit into

    def run(self, requests: Sequence[RoundsRequest], num_rounds: int) -> list[list[Round]]:
        """Up to `num_rounds` rounds of each sequence, fewer of one that is over before. Raises RuntimeError as `step`.

        Keys and values of all tokens but the anchor have to be there.
        """
        ...

    def set_prompt_lookup(self, is_wanted: bool) -> None:
        """Whether requests may ask for drafts that are looked up from now on."""
        ...

    @property
    def has_drafter(self) -> bool:
        """Whether requests may ask for drafts of the backend's drafter."""
        ...

    def takes(self, requests: Sequence[RoundsRequest]) -> bool:
        """Whether so many sequences with so many drafts share a launch; the host makes the rounds of others."""
        ...


class Backend(Protocol):
    """One way of computing a step. All return values may be overwritten by the next call."""

    name: str
    prepare_seconds: float
    # Whether `round_cost` was measured on this machine: then as many drafts as pay are the default.
    has_measured_cost: bool
    # Rows that cost about one step together, for which drafts compete; None where each row costs its own.
    rows_a_step: int | None
    # What makes several rounds without the host, and samples by itself; None where every round needs the host.
    rounds: Rounds | None

    @property
    def round_cost(self) -> RoundCost:
        """What a round takes with the present drafter."""
        ...

    def step(self, rows: Rows, logit_rows: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
        """Computes all rows, and the logits of those named in `logit_rows`, which ascend.

        Returns float32 logits [len(logit_rows), vocabulary] and the index of the largest logit in each, ties to the
        lower index; -1 where a logit is NaN. With `rows.draws` that is the token drawn. With a drafter its
        context is written for all rows too.
        """
        ...

    def draft(self, requests: Sequence[DraftRequest], num_drafts: int) -> list[Draft]:
        """The first `num_drafts` proposals of each request.

        There are fewer where the drafter's logits are NaN. Fewer than the drafter was trained for make a
        shorter block, which is cheaper and proposes nearly the same.
        """
        ...

    def set_drafter(self, drafter: DFlashDraftModel | None) -> None:
        """Drafts with another drafter from now on, in the dtype and on the device of the weights, or with none."""
        ...

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of weights as this backend holds them, by part of the model; see `weights.packed_parts`."""
        ...

    def cache_bytes(self) -> int:
        """Bytes of all key/value buffers."""
        ...
