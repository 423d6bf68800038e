"""One sequence being decoded: its tokens, its limits, and why it ends."""

import time
from collections.abc import Sequence
from typing import Literal

from speedstack.dflash.ngram import NgramIndex
from speedstack.dflash.propose import Draft
from speedstack.runtime.backends.base import Draw, Round, RoundsRequest
from speedstack.runtime.decoding.detokenizer import TextStream
from speedstack.runtime.decoding.results import Generation, GenerationStats
from speedstack.runtime.rounds.draft_length import DraftBudget
from speedstack.runtime.rounds.sampling import SamplingParams, sequence_key


def nan_logits(position: int) -> ValueError:
    """The error for a position whose logits are NaN."""
    return ValueError(
        f"the target's logits at position {position} are NaN; the checkpoint is broken or its dtype overflows"
    )


class RunningSequence:
    """State of one prompt's continuation. `slot`: the cache slot, -1 before the engine admits it.

    `text`: the detokenizer, None without a tokenizer. `num_drafts`: most proposals per round. `budget`: chooses how
    many are worth it, None for all. `ngram_size`: for prompt lookup, None with a drafter.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        params: SamplingParams,
        seed: int,
        eos_token_ids: Sequence[int],
        text: TextStream | None,
        num_drafts: int,
        budget: DraftBudget | None,
        ngram_size: int | None = None,
    ) -> None:
        self.tokens = list(prompt)
        self.params, self.seed = params, seed
        self.key = sequence_key(prompt)
        self._draw = None if params.temperature == 0.0 else Draw(seed, self.key, params)
        self.slot = -1
        self.finish_reason: Literal["length", "eos", "stop"] | None = None
        self._num_prompt_tokens, self._max_new_tokens = len(prompt), max_new_tokens
        self._eos = frozenset(eos_token_ids)
        self._text = text
        # Detokenizing can cost as much as a small model's step, so it waits until the text is read.
        self._undecoded: list[int] = []
        self._num_drafts = num_drafts
        self._ngram_size = ngram_size or 0
        self._ngrams = NgramIndex(ngram_size) if ngram_size is not None else None
        self._budget = budget
        self.stats = GenerationStats(
            num_prompt_tokens=len(prompt),
            drafted_by_position=[0] * num_drafts,
            accepted_by_position=[0] * num_drafts,
        )

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def num_left(self) -> int:
        """Tokens that may still be added."""
        return self._max_new_tokens - (len(self.tokens) - self._num_prompt_tokens)

    def num_to_draft(self) -> int:
        """Proposals to ask for in the next round, at most as many as could be committed."""
        wanted = self._budget.num_to_draft() if self._budget else self._num_drafts
        return min(wanted, self.num_left - 1)

    def look_up(self, count: int) -> list[int]:
        """Up to `count` tokens that followed the previous occurrence of the text's current end."""
        assert self._ngrams is not None
        return self._ngrams.propose(self.tokens, count)

    def noise_key(self, position: int) -> tuple[int, int, int]:
        """The (seed, sequence, position) of the position's sampling noise (see `NoiseTable`)."""
        return self.seed, self.key, position

    def draw(self) -> Draw | None:
        """How tokens are sampled; None is greedy."""
        return self._draw

    def rounds_request(self) -> RoundsRequest:
        """A request to decode this sequence to its end without the host."""
        end = len(self.tokens) + self.num_left
        return RoundsRequest(
            self.tokens, self.slot, end, bool(self._eos), self._num_drafts, self._ngram_size, self.draw()
        )

    def worth_verifying(self, draft: Draft) -> Draft:
        """The leading proposals that are worth a target row."""
        self.stats.num_drafted += len(draft.tokens)
        draft = draft.leading(self.num_left - 1)
        if self._budget and draft.tokens:
            # Prompt lookup has no probabilities; its recent hit rate already limited the request.
            draft = draft.leading(self._budget.num_to_verify(draft.probabilities or [1.0] * len(draft.tokens)))
        return draft

    def record_round(self, num_verified: int, num_accepted: int, num_committed: int) -> None:
        """Counts a round: proposals verified and accepted, and tokens that `commit` added.

        If the text ends in the round, its last token counts as the target's own even if more proposals match.
        """
        if self._budget:
            self._budget.record(num_verified, num_accepted)
        self.stats.num_rounds += 1
        self.stats.num_round_tokens += num_committed
        self.stats.num_rows += 1 + num_verified
        for i in range(num_verified):
            self.stats.drafted_by_position[i] += 1
            self.stats.accepted_by_position[i] += i < num_committed - 1

    def take_rounds(self, rounds: Sequence[Round]) -> None:
        """Commits tokens decoded without the host, up to the one that ends the sequence, as one arrival.

        Raises ValueError for NaN logits.
        """
        num_before = len(self.tokens)
        for one in rounds:
            if not self.is_finished:
                self.stats.num_drafted += one.num_proposed
                self.record_round(one.num_drafts, one.num_accepted, self._add(one.tokens))
        self._arrive(len(self.tokens) - num_before)

    def commit(self, tokens: Sequence[int]) -> int:
        """Adds tokens up to the one that ends the sequence; returns how many were added."""
        num_added = self._add(tokens)
        self._arrive(num_added)
        return num_added

    def _arrive(self, num_tokens: int) -> None:
        self.stats.num_new_tokens = len(self.tokens) - self._num_prompt_tokens
        self.stats.arrivals.append((time.perf_counter(), num_tokens))

    def _add(self, tokens: Sequence[int]) -> int:
        num_before = len(self.tokens)
        for token in tokens:
            if token < 0:
                raise nan_logits(len(self.tokens))
            self.tokens.append(token)
            if token in self._eos:
                self.finish_reason = "eos"
            else:
                self._undecoded.append(token)
                if self._text is not None and self._text.has_stops and self._decode().stopped:
                    self.finish_reason = "stop"
                if self.finish_reason is None and self.num_left == 0:
                    self.finish_reason = "length"
            if self.is_finished:
                break
        return len(self.tokens) - num_before

    def take_text(self) -> str:
        """New text that can no longer change."""
        return self._decode().take(is_last=self.is_finished)

    def result(self) -> Generation:
        assert self.finish_reason is not None
        text = self._decode().text if self._text is not None else ""
        return Generation(self.tokens[self._num_prompt_tokens :], text, self.finish_reason, self.stats)

    def _decode(self) -> TextStream:
        assert self._text is not None, "the engine refuses stop strings and streams without a tokenizer"
        if self._undecoded:
            self._text.push(*self._undecoded)
            self._undecoded = []
        return self._text
