"""lm-eval's view of an `Engine`: log-likelihoods and generation of every lm-eval task run through our runtime.

A `TemplateLM`, so that the split of a (context, continuation) pair into tokens is lm-eval's own and scores compare with
its Hugging Face adapter. The prefix token, on which a text without context is conditioned, is the end-of-text token:
training documents are separated by it, and models without one of their own "begin of text" have no better.

Left out: chat templates (the base models studied here have none) and lm-eval's request-level data parallelism.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from speedstack.runtime import Engine

logger = logging.getLogger(__name__)

DEFAULT_MAX_GEN_TOKS = 256
# Engine calls of this many batches: long enough to keep a batch full, short enough for a progress bar to move.
BATCHES_PER_CALL = 4
GENERATION_KEYS = frozenset({"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"})


class EngineLM(TemplateLM):
    """An lm-eval model over `engine`. `seed` is the sampling seed of every generation; greedy tasks ignore it.

    Raises ValueError when the engine has no tokenizer, or its tokenizer no end-of-text token.
    """

    def __init__(self, engine: Engine, seed: int = 0, progress: bool = True) -> None:
        super().__init__()
        if engine.tokenizer is None:
            raise ValueError("lm-eval needs text: save a tokenizer into the model directory and load the engine again")
        if engine.tokenizer.eos_token_id is None:
            raise ValueError("lm-eval needs an end-of-text token: set eos_token on the model's tokenizer")
        self.engine = engine
        self.tokenizer = engine.tokenizer
        self.seed = seed
        self.progress = progress

    @property
    def eot_token_id(self) -> int:
        """The end-of-text id; also the prefix of texts without context."""
        return self.engine.tokenizer.eos_token_id

    @property
    def max_length(self) -> int:
        """Longest sequence in tokens, prefix and generated tokens included."""
        return self.engine.max_length

    @property
    def tokenizer_name(self) -> str:
        """Fingerprint part of lm-eval's request cache."""
        return self.engine.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: object) -> list[int]:
        """Token ids of `string`. Special tokens are added only on request: the prefix token is lm-eval's business."""
        if kwargs:
            raise ValueError(f"tok_encode takes no {', '.join(sorted(kwargs))}: drop it")
        return self.engine.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens))

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: object,
    ) -> list[tuple[float, bool]]:
        """(sum of log-probabilities, all greedy) of each request's continuation ids given its context ids."""
        if kwargs:
            raise ValueError(f"_loglikelihood_tokens takes no {', '.join(sorted(kwargs))}: drop it")
        for (_, text), _, continuation in requests:
            if not continuation:
                raise ValueError(
                    f"the continuation {text!r} has no token of its own (empty, or its characters merge with the "
                    "context's last ones): start it with a space or a new line"
                )
        pairs = [(context, continuation) for _, context, continuation in requests]
        scores = self._score_continuations(pairs, description="log-likelihood", disable_tqdm=disable_tqdm)
        for (request, _, _), score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", request, score)
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, cut into disjoint windows when it is longer than the model's."""
        pairs: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                # A window's inputs and its last target together fill the model: one less than its length as input.
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, windows):
                pairs.append((context, continuation))
                owners.append(index)
        scores = self._score_continuations(pairs, description="rolling log-likelihood", disable_tqdm=disable_tqdm)
        parts: list[list[float]] = [[] for _ in requests]
        for owner, (logprob, _) in zip(owners, scores, strict=True):
            parts[owner].append(logprob)
        totals = [math.fsum(values) for values in parts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Text generated after each context, up to the first of the request's stop strings, which is cut off.

        Raises ValueError for settings the engine does not have, and when `max_gen_toks` leaves no room for a prompt.
        """
        groups: dict[tuple, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[self._generation_settings(request.args[1])].append(index)
        texts: list[str] = [""] * len(requests)
        with self._bar(len(requests), "generate", disable_tqdm) as bar:
            for settings, indices in groups.items():
                max_gen_toks, stop, temperature, top_p, top_k = settings
                prompts = self._truncate_prompts([requests[i].args[0] for i in indices], max_gen_toks)
                for part in self._parts(prompts):
                    generations = self.engine.generate(
                        [prompts[i] for i in part],
                        max_new_tokens=max_gen_toks,
                        temperature=temperature,
                        top_p=top_p,
                        top_k=top_k,
                        seed=self.seed,
                        stop=stop,
                    )
                    for i, generation in zip(part, generations, strict=True):
                        texts[indices[i]] = cut_at_stop(generation.text, stop)
                    bar.update(len(part))
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _score_continuations(
        self, pairs: Sequence[tuple[list[int], list[int]]], description: str, disable_tqdm: bool
    ) -> list[tuple[float, bool]]:
        """(log-probability, all greedy) of each (context ids, continuation ids); long contexts lose their left end."""
        sequences = []
        num_truncated = 0
        for context, continuation in pairs:
            if len(continuation) >= self.max_length:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens leaves no room for context: "
                    f"the engine holds {self.max_length} tokens; raise max_length or shorten the task's texts"
                )
            num_truncated += len(context) + len(continuation) > self.max_length
            sequences.append((context + continuation)[-self.max_length :])
        if num_truncated:
            logger.warning(
                "%d of %d contexts were longer than %d tokens and lost their beginning",
                num_truncated,
                len(pairs),
                self.max_length,
            )
        results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        with self._bar(len(pairs), description, disable_tqdm) as bar:
            for part in self._parts(sequences):
                for i, score in zip(part, self.engine.score([sequences[i] for i in part]), strict=True):
                    num_scored = len(pairs[i][1])
                    logprobs = score.logprobs[-num_scored:].tolist()
                    results[i] = (math.fsum(logprobs), bool(score.is_greedy[-num_scored:].all()))
                bar.update(len(part))
        return results

    def _generation_settings(self, gen_kwargs: dict) -> tuple[int, tuple[str, ...], float, float, int]:
        """(max_gen_toks, stop strings, temperature, top_p, top_k) of one request, hashable so that requests group."""
        kwargs = dict(normalize_gen_kwargs(gen_kwargs, DEFAULT_MAX_GEN_TOKS))
        if unknown := sorted(set(kwargs) - GENERATION_KEYS):
            raise ValueError(
                f"unsupported generation setting {', '.join(unknown)}; known are {', '.join(sorted(GENERATION_KEYS))}"
            )
        max_gen_toks = kwargs["max_gen_toks"]
        if not 0 < max_gen_toks < self.max_length:
            raise ValueError(
                f"max_gen_toks is {max_gen_toks}, but prompt and text share {self.max_length} tokens: lower it"
            )
        return (
            max_gen_toks,
            tuple(text for text in kwargs["until"] if text),
            float(kwargs.get("temperature", 0.0)),
            float(kwargs.get("top_p", 1.0)),
            int(kwargs.get("top_k", 0)),
        )

    def _truncate_prompts(self, contexts: Sequence[str], max_gen_toks: int) -> list[list[int]]:
        """Prompt ids that leave room for `max_gen_toks`: the end of a long one, the prefix token for an empty one."""
        prompts = []
        num_truncated = 0
        for context in contexts:
            ids = self.tok_encode(context) or [self.prefix_token_id]
            num_truncated += len(ids) > self.max_length - max_gen_toks
            prompts.append(ids[-(self.max_length - max_gen_toks) :])
        if num_truncated:
            logger.warning(
                "%d of %d prompts lost their beginning: prompt and %d new tokens share %d",
                num_truncated,
                len(contexts),
                max_gen_toks,
                self.max_length,
            )
        return prompts

    def _parts(self, sequences: Sequence[list[int]]) -> Iterator[list[int]]:
        """Indices of `sequences`, longest first so that a batch pads little, a few batches at a time."""
        order = sorted(range(len(sequences)), key=lambda i: (-len(sequences[i]), i))
        size = self.engine.max_batch_size * BATCHES_PER_CALL
        for start in range(0, len(order), size):
            yield order[start : start + size]

    def _bar(self, total: int, description: str, disable_tqdm: bool) -> tqdm:
        return tqdm(total=total, desc=description, disable=disable_tqdm or not self.progress, dynamic_ncols=True)


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """`text` up to the first occurrence of any of the stop strings."""
    ends = [position for position in (text.find(marker) for marker in stop) if position >= 0]
    return text[: min(ends, default=len(text))]
