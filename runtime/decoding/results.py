"""What the engine returns: generated tokens with their statistics, and log-probabilities.

Legend: W wanted rows, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch


@dataclass
class GenerationStats:
    """Counts and times of one sequence; sequences decoded together share the decode time.

    A round is one target pass after the prompt. The lists count, for each draft position, how often it was verified and
    accepted. A round commits one token more than it accepts; if the text ends in it, the last token counts as the
    target's own.

    `num_rows`: target rows computed in rounds, anchors included. `num_drafted`: proposals made, verified or not.
    `arrivals`: `time.perf_counter()` of every commit and its number of tokens: the prompt's pass, then each round or
    each launch of several rounds.
    """

    num_prompt_tokens: int = 0
    num_new_tokens: int = 0
    num_rounds: int = 0
    num_round_tokens: int = 0
    num_rows: int = 0
    num_drafted: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    drafted_by_position: list[int] = field(default_factory=list)
    accepted_by_position: list[int] = field(default_factory=list)
    arrivals: list[tuple[float, int]] = field(default_factory=list)

    @property
    def acceptance_length(self) -> float:
        """Tokens committed per round, bonus token included (tau): 1.0 without a drafter, at most the block size."""
        return self.num_round_tokens / self.num_rounds if self.num_rounds else float("nan")

    @property
    def rows_per_token(self) -> float:
        """Target rows per token committed in rounds."""
        return self.num_rows / self.num_round_tokens if self.num_round_tokens else float("nan")

    @property
    def drafted_per_token(self) -> float:
        """Proposals per token committed in rounds."""
        return self.num_drafted / self.num_round_tokens if self.num_round_tokens else float("nan")

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens per second, without the prompt and its first token."""
        return self.num_round_tokens / self.decode_seconds if self.decode_seconds else float("nan")


@dataclass
class Generation:
    """One sequence's new tokens and the text they add (see `decoding/detokenizer.py`).

    A stop string or end token is in the tokens, not in the text.
    """

    tokens: list[int]
    text: str
    finish_reason: Literal["length", "eos", "stop"]
    stats: GenerationStats


@dataclass
class Score:
    """Float32 log-probabilities of ids[1:] given the tokens before, and whether each was the argmax."""

    logprobs: torch.Tensor
    is_greedy: torch.Tensor


def score_of(steps: Iterable[tuple[torch.Tensor, list[int]]], ids: Sequence[int]) -> Score:
    """The score of `ids` from a backend's steps: logits [rows, vocabulary] and their argmaxes, in order.

    Raises ValueError for NaN logits, whose argmax is -1.
    """
    logprobs: list[torch.Tensor] = []
    greedy: list[int] = []
    start = 1
    for logits_WV, best in steps:
        targets = torch.tensor(ids[start : start + len(best)], device=logits_WV.device)
        kept = logits_WV[: len(targets)]
        logprobs.append(torch.log_softmax(kept, -1).gather(1, targets[:, None])[:, 0].cpu())
        greedy += best[: len(targets)]
        start += len(best)
    if -1 in greedy:
        raise ValueError("the target's logits are NaN; the checkpoint is broken or its dtype overflows")
    return Score(torch.cat(logprobs), torch.tensor(greedy) == torch.tensor(ids[1:]))
