"""One process' share of an evaluation's requests: score texts, write texts, cache each answer at once.

Requests and answers are plain data that travel between processes.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lm_eval.models.utils import postprocess_generated_text
from tqdm import tqdm

from speedstack.eval.lm_eval.request_cache import RequestCache
from speedstack.eval.lm_eval.thinking import strip_thinking
from speedstack.runtime import Engine, Generation
from speedstack.runtime.rounds.sampling import SamplingParams
from speedstack.runtime.scoring import score_continuations

# Batches per engine call: enough to keep a batch full, few enough for a moving progress bar and little loss on a kill.
BATCHES_PER_CALL = 4


@dataclass(frozen=True)
class ScoreRequest:
    """Score each (context ids, continuation ids). The answer is [log-probability, all greedy] of each, in order."""

    key: str
    pairs: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


@dataclass(frozen=True)
class WriteRequest:
    """Continue `prompt` up to a stop string; answers with the fields of `Written`. `think_end`: of `find_think_end`."""

    key: str
    prompt: tuple[int, ...]
    max_new_tokens: int
    stop: tuple[str, ...]
    sampling: SamplingParams
    seed: int
    think_end: str | int | None = None

    @property
    def settings(self) -> tuple[Any, ...]:
        """Settings that requests of one call must share."""
        return (self.max_new_tokens, self.stop, self.sampling, self.think_end)


@dataclass(frozen=True)
class Written:
    """A generation: its text up to a stop string, why it ended, and its rounds.

    `has_thought`: whether it contains the end of thinking; None if none is sought.
    """

    text: str
    finish_reason: str
    has_thought: bool | None
    num_new_tokens: int
    num_rounds: int
    num_round_tokens: int


Request = ScoreRequest | WriteRequest


class Worker:
    """Answers requests with one engine."""

    def __init__(self, engine: Engine, cache: RequestCache, progress: bool = True) -> None:
        self.engine, self.cache, self.progress = engine, cache, progress

    def __call__(self, requests: Sequence[Request]) -> list[Any]:
        """Answers in the order of requests. Raises ValueError as the engine does; earlier answers are kept."""
        scores = [request for request in requests if isinstance(request, ScoreRequest)]
        writes = [request for request in requests if isinstance(request, WriteRequest)]
        if scores:
            self._score(scores)
        if writes:
            self._write(writes)
        return [self.cache[request.key] for request in requests]

    def _score(self, requests: Sequence[ScoreRequest]) -> None:
        owners = [(request, part) for request in requests for part in range(len(request.pairs))]
        answers: dict[str, list[Any]] = {request.key: [None] * len(request.pairs) for request in requests}
        num_open = {request.key: len(request.pairs) for request in requests}
        with self._bar(len(owners), "log-likelihood") as bar:
            for one in score_continuations(self.engine, [request.pairs[part] for request, part in owners]):
                request, part = owners[one.index]
                logprob = math.fsum(one.score.logprobs.tolist())
                answers[request.key][part] = [logprob, bool(one.score.is_greedy.all())]
                num_open[request.key] -= 1
                if num_open[request.key] == 0:
                    self.cache.put(request.key, answers[request.key])
                bar.update()
        for request in requests:  # a text without tokens has no score
            if not request.pairs:
                self.cache.put(request.key, [])

    def _write(self, requests: Sequence[WriteRequest]) -> None:
        groups: dict[tuple, list[WriteRequest]] = defaultdict(list)
        for request in requests:
            groups[request.settings].append(request)
        size = self.engine.max_batch_size * BATCHES_PER_CALL
        with self._bar(len(requests), "generate") as bar:
            for group in groups.values():
                group.sort(key=lambda request: -len(request.prompt))
                for start in range(0, len(group), size):
                    self._write_together(group[start : start + size])
                    bar.update(len(group[start : start + size]))

    def _write_together(self, requests: Sequence[WriteRequest]) -> None:
        first = requests[0]
        generations = self.engine.generate(
            [list(request.prompt) for request in requests],
            max_new_tokens=first.max_new_tokens,
            temperature=first.sampling.temperature,
            top_p=first.sampling.top_p,
            top_k=first.sampling.top_k,
            seed=[request.seed for request in requests],
            # Thinking contains strings that end an answer, such as empty lines.
            stop=() if first.think_end is not None else first.stop,
        )
        for request, generation in zip(requests, generations, strict=True):
            self.cache.put(request.key, asdict(self._written(request, generation)))

    def _written(self, request: WriteRequest, generation: Generation) -> Written:
        text, has_thought = generation.text, None
        if request.think_end is not None:
            text, has_thought = strip_thinking(self.engine.tokenizer, generation.tokens, text, request.think_end)
        answer = postprocess_generated_text(text, list(request.stop), None)
        return Written(
            text=answer,
            finish_reason="stop" if len(answer) < len(text) else generation.finish_reason,
            has_thought=has_thought,
            num_new_tokens=generation.stats.num_new_tokens,
            num_rounds=generation.stats.num_rounds,
            num_round_tokens=generation.stats.num_round_tokens,
        )

    def _bar(self, total: int, description: str) -> tqdm:
        # None: only on a terminal.
        return tqdm(total=total, desc=description, disable=None if self.progress else True, dynamic_ncols=True)


def split_for_scoring(requests: Sequence[ScoreRequest], num_parts: int) -> list[list[int]]:
    """Request indices in parts of about equal tokens; neighbours in token order stay together."""
    order = sorted(range(len(requests)), key=lambda index: requests[index].pairs)
    sizes = [sum(len(context) + len(more) for context, more in request.pairs) for request in requests]
    even_share = max(1, -(-sum(sizes) // num_parts))
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    num_before = 0
    for index in order:
        parts[min(num_before // even_share, num_parts - 1)].append(index)
        num_before += sizes[index]
    return parts


def split_for_writing(requests: Sequence[WriteRequest], num_parts: int) -> list[list[int]]:
    """Request indices dealt out in order of prompt length, so that every part has long and short ones."""
    order = sorted(range(len(requests)), key=lambda index: (-len(requests[index].prompt), index))
    return [order[part::num_parts] for part in range(num_parts)]
