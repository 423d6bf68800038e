"""The acceptance rule and the acceptance length.

A draft is accepted if it equals the token that the target samples there and all earlier drafts were accepted. The
target's token at the first disagreement, or after the last draft, is committed too, so the output is the target's own
text. Acceptance length (tau) counts committed tokens per round, that token included: 1 to the block size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor


def accept(drafts: Sequence[int], sample: Callable[[int], int]) -> list[int]:
    """The tokens that a round commits: the accepted drafts, then the target's own token.

    `sample(count)` is the target's token after the first `count` drafts, never called past the first disagreement.
    """
    committed = [sample(0)]
    for count, token in enumerate(drafts, start=1):
        if token != committed[-1]:
            break
        committed.append(sample(count))
    return committed


def leading_run(correct_AJ: Tensor) -> Tensor:
    """Length of each row's leading run of True, int64 [A]: what `accept` accepts, for many chains."""
    return correct_AJ.long().cumprod(-1).sum(-1)


def walk_rounds(runs: Sequence[int]) -> list[int]:
    """Tokens committed by each round over text that the target wrote, without decoding again.

    `runs[i]` is the leading run of correct proposals with token i as the anchor; the text has one token more than
    `runs`. Greedy text does not depend on the drafter, so these are the engine's rounds: from anchor i to i + runs[i] +
    1, up to the end of the text.
    """
    rounds, anchor = list[int](), 0
    while anchor < len(runs):
        rounds.append(min(runs[anchor] + 1, len(runs) - anchor))
        anchor += rounds[-1]
    return rounds


def survival(rounds: Sequence[Sequence[int]], num_proposals: int) -> list[float]:
    """Share of all rounds in which proposals 1 .. j are accepted, for j = 1 .. num_proposals; zeros without rounds.

    `rounds`: tokens committed per round and sequence, from `walk_rounds`. A round's last token counts as the target's
    own, and nothing past the text's end counts, so the shares sum to tau - 1.
    """
    committed = [tokens for sequence in rounds for tokens in sequence]
    return [
        sum(tokens > j for tokens in committed) / len(committed) if committed else 0.0
        for j in range(1, num_proposals + 1)
    ]
