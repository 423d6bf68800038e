"""The acceptance rule, and acceptance length.

A drafted token stands when it equals the token the target itself samples at that position, and everything before it
stood. The target's token at the first disagreement, or after the last draft, is committed as well: a round always
commits at least one token, and its output is the target's own text whatever was drafted.

Acceptance length (tau) counts committed tokens a round, that last one included, so it lies in 1 .. block size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor


def accept(drafts: Sequence[int], sample: Callable[[int], int]) -> list[int]:
    """The tokens that a round commits: the drafts that stand, and the target's own token after them.

    `sample(count)` is the target's token after the first `count` drafts; it is asked for nothing behind the first
    disagreement.
    """
    committed = [sample(0)]
    for count, token in enumerate(drafts, start=1):
        if token != committed[-1]:
            break
        committed.append(sample(count))
    return committed


def leading_run(correct_AJ: Tensor) -> Tensor:
    """The number that `accept` accepts for many chains: length of each row's leading run of True, int64 [A]."""
    return correct_AJ.long().cumprod(-1).sum(-1)


def walk_rounds(runs: Sequence[int]) -> list[int]:
    """Tokens committed by each decode round over text the target wrote itself, without decoding again.

    `runs[i]` is the leading run of correct proposals when token i of the text is the anchor; the text has one token
    more than `runs`, and its last one anchors nothing. Greedy text does not depend on the drafter, so the rounds are
    the ones the engine makes: from anchor i to anchor i + runs[i] + 1, and in the end no further than there is text.
    """
    rounds, anchor = list[int](), 0
    while anchor < len(runs):
        rounds.append(min(runs[anchor] + 1, len(runs) - anchor))
        anchor += rounds[-1]
    return rounds


def survival(rounds: Sequence[Sequence[int]], num_proposals: int) -> list[float]:
    """Share of all rounds in which proposals 1 .. j stand in the text, for j = 1 .. num_proposals; no rounds, zeros.

    `rounds`: tokens committed by each round of each sequence, as `walk_rounds` gives them. The last token of a round is
    the target's own, whether a proposal would have been it or not, and nothing behind the end of a text counts: the
    shares add up to tau - 1.
    """
    committed = [tokens for sequence in rounds for tokens in sequence]
    return [
        sum(tokens > j for tokens in committed) / len(committed) if committed else 0.0
        for j in range(1, num_proposals + 1)
    ]
