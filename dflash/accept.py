"""The acceptance rule, and acceptance length.

A drafted token stands when it equals the token the target itself samples at that position, and everything before it
stood. The target's token at the first disagreement, or after the last draft, is committed as well: a round always
commits at least one token, and its output is the target's own text whatever was drafted.

Acceptance length (tau) counts committed tokens a round, that last one included, so it lies in 1 .. block size.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def count_accepted(drafts: Sequence[int], sampled: Sequence[int]) -> int:
    """Length a of the leading run in which `drafts` equals `sampled`; the round commits `sampled[: a + 1]`.

    `sampled[i]` is the target's token after the anchor and i drafts. It has one entry more than `drafts`, or stops at
    the first disagreement, behind which nothing is used. Raises ValueError when the token to commit last is missing.
    """
    if len(sampled) > len(drafts) + 1:
        raise ValueError(f"{len(drafts)} drafts need {len(drafts) + 1} sampled tokens at most, got {len(sampled)}")
    accepted = 0
    while accepted < min(len(drafts), len(sampled)) and drafts[accepted] == sampled[accepted]:
        accepted += 1
    if accepted == len(sampled):
        raise ValueError(f"the target's token after {accepted} accepted drafts is missing")
    return accepted


def leading_run(correct_AJ: Tensor) -> Tensor:
    """`count_accepted` for many blocks: length of each row's leading run of True, int64 [A]."""
    return correct_AJ.long().cumprod(-1).sum(-1)


def walk_rounds(runs: Sequence[int], start: int = 0) -> list[int]:
    """Tokens committed by each decode round over text the target wrote itself, without decoding again.

    `runs[i]` is the leading run of correct proposals when token i of the text is the anchor. Greedy text does not
    depend on the drafter, so the rounds are the ones the engine would make: from anchor i to anchor i + runs[i] + 1.
    Rounds that the end of the text would cut short are left out.
    """
    rounds, anchor = [], start
    while anchor < len(runs):
        rounds.append(runs[anchor] + 1)
        anchor += rounds[-1]
    return rounds
