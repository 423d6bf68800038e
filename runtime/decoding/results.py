"""What the engine returns: generated tokens with their statistics, and log-probabilities.

Legend: W wanted rows, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch


@dataclass
class GenerationStats:
    """Counts and times of one sequence. Decode time is shared when sequences are decoded together.

    A round is one pass of the target after the prompt; position i of the two lists counts draft position i + 1 of the
    block: how often it was verified, and how often it was accepted. A round commits one token more than it accepts,
    always: of a round in which the text ends, by an end token, a stop string or its length, the last token counts as
    the target's own.

    `num_rows` are the rows that the target computed in rounds, anchors included; `num_drafted` the proposals made,
    verified or not. `arrivals` are the times of `time.perf_counter()` at which tokens were committed, and how many
    each time: the prompt's pass first, then every round, or every launch of several rounds that the host did not see.
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
        """Tokens committed a round, the target's own included (tau): 1.0 without a drafter, at most the block size."""
        return self.num_round_tokens / self.num_rounds if self.num_rounds else float("nan")

    @property
    def rows_per_token(self) -> float:
        """Rows of the target a token committed in rounds: what speculation costs where rows are not free."""
        return self.num_rows / self.num_round_tokens if self.num_round_tokens else float("nan")

    @property
    def drafted_per_token(self) -> float:
        """Proposals made a token committed in rounds."""
        return self.num_drafted / self.num_round_tokens if self.num_round_tokens else float("nan")

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens a second, the prompt and the token that its pass yields left out."""
        return self.num_round_tokens / self.decode_seconds if self.decode_seconds else float("nan")


@dataclass
class Generation:
    """One sequence's new tokens, and the text that they add to the prompt's (see `runtime.decoding.detokenizer`).

    The text ends before a stop string or an end token, the tokens end with it. Special tokens are in the text only
    where that was asked for.
    """

    tokens: list[int]
    text: str
    finish_reason: Literal["length", "eos", "stop"]
    stats: GenerationStats


@dataclass
class Score:
    """Float32 log-probabilities of ids[1:] given what precedes them, and whether each was the most probable token."""

    logprobs: torch.Tensor
    is_greedy: torch.Tensor


def score_of(steps: Iterable[tuple[torch.Tensor, list[int]]], ids: Sequence[int]) -> Score:
    """Of what a backend's steps give after all of `ids`, in order: logits [rows, vocabulary], and their argmaxes.

    Raises ValueError for logits that are NaN, whose argmax is -1.
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
