"""lm-eval's view of an `Engine`: log-likelihoods and generation of every lm-eval task run through our runtime.

A `TemplateLM`, so lm-eval itself splits (context, continuation) pairs into tokens. Open choices follow its Hugging Face
adapter (prefix of an empty context, special tokens, truncation), so scores compare request by request. Generated text
continues its context, as vLLM's does: with SentencePiece tokenizers it begins with the space that the adapter, which
decodes it alone, drops.

lm-eval sees one process; `eval.lm_eval.processes` shares out requests below it.
"""

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jinja2
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from speedstack.eval.data.chat_template import check_template_kwargs
from speedstack.eval.lm_eval.generation_kwargs import MAX_GEN_TOKS_KEYS, GenerationSettings, read_generation_kwargs
from speedstack.eval.lm_eval.processes import Processes
from speedstack.eval.lm_eval.request_cache import RequestCache, request_key
from speedstack.eval.lm_eval.task_loading import task_hash
from speedstack.eval.lm_eval.thinking import check_thinking, find_think_end
from speedstack.eval.lm_eval.worker import (
    Request,
    ScoreRequest,
    Worker,
    WriteRequest,
    Written,
    split_for_scoring,
    split_for_writing,
)
from speedstack.runtime import Engine

logger = logging.getLogger(__name__)

EncodedPair = tuple[tuple[str, str], list[int], list[int]]


@dataclass
class TaskCounts:
    """Counts of a task's requests: `num_cached` were known, `num_shortened` lost the beginning of their context.

    `num_unstopped` generations reached the length limit without a stop string or end-of-text, `num_without_answer` did
    not finish thinking. Rounds and committed tokens as in `speedstack.runtime.GenerationStats`.
    """

    num_requests: int = 0
    num_cached: int = 0
    num_shortened: int = 0
    num_generations: int = 0
    num_unstopped: int = 0
    num_without_answer: int = 0
    num_new_tokens: int = 0
    num_rounds: int = 0
    num_round_tokens: int = 0


class EngineLM(TemplateLM):
    """An lm-eval model over `engine`.

    `seed` plus the number of earlier equal requests seeds each generation, so that samples of one prompt differ. No
    request is answered before the generation settings of all `tasks` are checked. `salts`, by task, separate a task's
    cached answers; `drafting` is the `drafting_key` of an engine whose answers are kept in files.

    `chat_template_kwargs` are variables of the chat template. `think_end`, text or a token id (also as digits), ends a
    model's thinking; only what follows is scored and heeds stop strings, as with lm-eval's vLLM adapter. `max_gen_toks`
    overrides that of every task.

    Raises ValueError without a tokenizer or end-of-text token, for template variables or an end of thinking that the
    model lacks, and for thinking where nothing is generated.
    """

    def __init__(
        self,
        engine: Engine,
        seed: int = 0,
        progress: bool = True,
        cache: RequestCache | None = None,
        processes: Processes | None = None,
        tasks: Sequence[Any] = (),
        salts: Mapping[str, str] | None = None,
        drafting: str = "",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        think_end: str | int | None = None,
        max_gen_toks: int | None = None,
    ) -> None:
        super().__init__()
        if engine.tokenizer is None:
            raise ValueError("lm-eval needs text: save a tokenizer into the model directory and load the engine again")
        if engine.tokenizer.eos_token_id is None:
            raise ValueError("lm-eval needs an end-of-text token: set eos_token on the model's tokenizer")
        self.engine = engine
        self.tokenizer = engine.tokenizer
        self.seed = seed
        self.cache = RequestCache() if cache is None else cache
        self.processes = Processes() if processes is None else processes
        self.worker = Worker(engine, self.cache, progress)
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        check_template_kwargs(self.tokenizer, self.chat_template_kwargs)
        self.think_end = find_think_end(self.tokenizer, think_end)
        check_thinking(self.chat_template_kwargs, self.think_end, tasks)
        self._task_hashes = {task.task_name: task_hash(task) + (salts or {}).get(task.task_name, "") for task in tasks}
        self._unchecked, self._drafting, self._max_gen_toks = list(tasks), drafting, max_gen_toks
        self.counts: dict[str, TaskCounts] = {}

    @property
    def eot_token_id(self) -> int:
        """The end-of-text id."""
        return self.engine.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The prefix of a text without context: the begin-of-text id, or else end-of-text."""
        bos = self.engine.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """Maximum input tokens of one sequence; the last scored token is no input."""
        return self.engine.max_length

    @property
    def tokenizer_name(self) -> str:
        """Part of the fingerprint of lm-eval's own request cache."""
        return self.engine.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: object) -> list[int]:
        """Token ids of `string`; None adds the tokenizer's own special tokens, unless the text begins with them."""
        if kwargs:
            raise ValueError(f"tok_encode takes no {', '.join(sorted(kwargs))}: drop it")
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation in the model's template, without a system message that the template does not take.

        Raises ValueError without a template, and for a conversation that it refuses.
        """
        if not self.tokenizer.chat_template:
            raise ValueError(
                "the model's tokenizer has no chat template: evaluate without --chat-template, or put a "
                "chat_template.jinja into the model directory"
            )

        def apply(messages: list[dict[str, str]]) -> str:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **self.chat_template_kwargs,
            )

        try:
            return apply(chat_history)
        except jinja2.exceptions.TemplateError as error:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise ValueError(f"the chat template refuses a conversation of the task: {error}") from error
            logger.warning("the chat template has no place for a system message; it is left out (%s)", error)
            return apply(others)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(sum of log-probabilities, all greedy) of each continuation given its context."""
        self._check_generations()
        encoded = [self._encode(*request.args) for request in requests]
        return self._score_pairs(encoded, [request.task_name or "" for request in requests])

    def _loglikelihood_tokens(self, requests: list[EncodedPair], **kwargs: object) -> list[tuple[float, bool]]:
        """`loglikelihood` of token pairs, under lm-eval's name."""
        return self._score_pairs(requests, [""] * len(requests))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in disjoint windows if it exceeds the model's length."""
        self._check_generations()
        work: list[Request] = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [make_disjoint_window(window) for window in windows]
            work.append(self._score_request(request.task_name or "", "rolling", list(request.args), pairs))
        answers = self._answer(work, [request.task_name or "" for request in requests])
        return [math.fsum(logprob for logprob, _ in parts) for parts in answers]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Text generated after each context, cut before the first stop string.

        Raises ValueError for settings the engine lacks, and if `max_gen_toks` leaves no room for a prompt.
        """
        self._check_generations()
        num_before: Counter[str] = Counter()
        work: list[WriteRequest] = []
        for request in requests:
            context, gen_kwargs = request.args
            task = request.task_name or ""
            settings = self._generation_settings(gen_kwargs, task)
            prompt = self._prompt(context, settings.max_gen_toks, task)
            max_new_tokens = settings.num_new_tokens(len(prompt))
            plain_key = request_key(
                self._task_hashes.get(task, ""),
                "generate",
                [context, max_new_tokens, settings.stop, asdict(settings.sampling), self.think_end, self._drafting],
            )
            seed = 0 if settings.sampling.temperature == 0.0 else self.seed + num_before[plain_key]
            num_before[plain_key] += 1
            key = request_key(plain_key, "seed", [seed])
            work.append(
                WriteRequest(key, prompt, max_new_tokens, settings.stop, settings.sampling, seed, self.think_end)
            )
        tasks = [request.task_name or "" for request in requests]
        self._warn_of_shortened(tasks)
        written = [Written(**answer) for answer in self._answer(work, tasks)]
        for task, asked, one in zip(tasks, work, written, strict=True):
            self._count(
                task,
                num_generations=1,
                num_unstopped=int(one.finish_reason == "length" and bool(asked.stop)),
                num_without_answer=int(one.has_thought is False),
                num_new_tokens=one.num_new_tokens,
                num_rounds=one.num_rounds,
                num_round_tokens=one.num_round_tokens,
            )
        self._warn_of_unstopped()
        return [one.text for one in written]

    def write(self, contexts: Sequence[str], gen_kwargs: dict[str, Any]) -> list[str]:
        """`generate_until` outside lm-eval: text after each context, under a task's generation settings."""
        return self.generate_until(
            [
                Instance(request_type="generate_until", doc={}, arguments=(context, gen_kwargs), idx=index)
                for index, context in enumerate(contexts)
            ]
        )

    def _encode(self, context: str, continuation: str) -> EncodedPair:
        """lm-eval's split of a pair into tokens; a lone continuation follows the prefix token."""
        if context:
            return ((context, continuation), *self._encode_pair(context, continuation))
        ids = self.tok_encode(continuation, add_special_tokens=False)
        if ids[:1] == [self.prefix_token_id]:
            return (context, continuation), ids[:1], ids[1:]
        return (context, continuation), [self.prefix_token_id], ids

    def _score_pairs(self, encoded: Sequence[EncodedPair], tasks: Sequence[str]) -> list[tuple[float, bool]]:
        work: list[Request] = []
        for ((context, text), context_ids, ids), task in zip(encoded, tasks, strict=True):
            if not ids:
                raise ValueError(
                    f"the continuation {text!r} has no token of its own (empty, or its characters merge with the "
                    "context's last ones): start it with a space or a new line"
                )
            if len(ids) > self.max_length:
                raise ValueError(
                    f"a continuation of {len(ids)} tokens leaves no room for context: "
                    f"the engine holds {self.max_length} tokens; raise max_length or shorten the task's texts"
                )
            num_lost = max(0, len(context_ids) + len(ids) - (self.max_length + 1))
            self._count(task, num_shortened=int(num_lost > 0))
            # lm-eval scores pairs of tokens too, which have no text.
            asked = [context, text] if text is not None else [context_ids, ids]
            work.append(self._score_request(task, "score", asked, [(context_ids[num_lost:], ids)]))
        self._warn_of_shortened(tasks)
        return [(logprob, is_greedy) for ((logprob, is_greedy),) in self._answer(work, tasks)]

    def _score_request(
        self, task: str, kind: str, asked: list[Any], pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> ScoreRequest:
        key = request_key(self._task_hashes.get(task, ""), kind, asked)
        return ScoreRequest(key, tuple((tuple(context), tuple(more)) for context, more in pairs))

    def _answer(self, requests: Sequence[Request], tasks: Sequence[str]) -> list[Any]:
        """Answers in order, from the cache or the processes; each missing key is asked once."""
        missing: dict[str, Request] = {}
        for request, task in zip(requests, tasks, strict=True):
            self._count(task, num_requests=1, num_cached=int(request.key in self.cache))
            if request.key not in self.cache:
                missing[request.key] = request
        scores = [request for request in missing.values() if isinstance(request, ScoreRequest)]
        writes = [request for request in missing.values() if isinstance(request, WriteRequest)]
        answers = {request.key: self.cache[request.key] for request in requests if request.key in self.cache}
        if scores:
            answers |= self._share(scores, split_for_scoring(scores, self.processes.size))
        if writes:
            answers |= self._share(writes, split_for_writing(writes, self.processes.size))
        return [answers[request.key] for request in requests]

    def _share(self, requests: Sequence[Request], split: Sequence[Sequence[int]]) -> dict[str, Any]:
        parts = [[requests[index] for index in part] for part in split]
        shares = self.processes.share(self.worker, parts)
        return {
            request.key: answer
            for part, share in zip(parts, shares, strict=True)
            for request, answer in zip(part, share, strict=True)
        }

    def _check_generations(self) -> None:
        """Check all settings before the first answer; lm-eval has made all requests by then."""
        tasks, self._unchecked = self._unchecked, []
        for task in tasks:
            for instance in task.instances:
                if instance.request_type == "generate_until":
                    self._generation_settings(instance.args[1], task.task_name)

    def _generation_settings(self, gen_kwargs: Mapping[str, Any], task: str) -> GenerationSettings:
        """The settings of one request. Raises ValueError, naming the task, for what the engine cannot do."""
        whose = f"task {task}: " if task else ""
        if self._max_gen_toks is not None:
            lengths = {*MAX_GEN_TOKS_KEYS, "max_length"}
            others = {name: value for name, value in gen_kwargs.items() if name not in lengths}
            gen_kwargs = others | {"max_gen_toks": self._max_gen_toks}
        try:
            settings = read_generation_kwargs(gen_kwargs)
        except ValueError as error:
            raise ValueError(f"{whose}{error}") from error
        for name in ("max_gen_toks", "max_length"):
            if (getattr(settings, name) or 0) >= self.max_length + (name == "max_length"):
                raise ValueError(
                    f"{whose}{name} is {getattr(settings, name)}, but prompt and text share {self.max_length} tokens: "
                    "lower it, or raise max_length of the engine"
                )
        return settings

    def _prompt(self, context: str, max_new_tokens: int, task: str) -> tuple[int, ...]:
        """Prompt ids that leave room for the text: a long prompt's end, or the prefix token for an empty one."""
        ids = self.tok_encode(context) or [self.prefix_token_id]
        room = self.max_length - max_new_tokens
        self._count(task, num_shortened=int(len(ids) > room))
        return tuple(ids[-room:])

    def _count(self, task: str, **more: int) -> None:
        counts = self.counts.setdefault(task, TaskCounts())
        for name, value in more.items():
            setattr(counts, name, getattr(counts, name) + value)

    def _warn_of_shortened(self, tasks: Sequence[str]) -> None:
        for task in dict.fromkeys(tasks):
            if num := self.counts[task].num_shortened:
                logger.warning(
                    "%s: %d texts lost their beginning: context and what follows it share %d tokens",
                    task or "a task",
                    num,
                    self.max_length,
                )

    def _warn_of_unstopped(self) -> None:
        for task, counts in self.counts.items():
            if 1 < counts.num_generations == counts.num_unstopped:
                logger.warning(
                    "%s: not one of %d generations came to a stop string or an end-of-text token before its length "
                    "limit; the model may not know the task's format",
                    task or "a task",
                    counts.num_generations,
                )
            if counts.num_without_answer:
                logger.warning(
                    "%s: %d of %d generations did not come to the end of thinking, %r, and are scored as they are: "
                    "leave room for it with --max-gen-toks, or correct --think-end-token",
                    task or "a task",
                    counts.num_without_answer,
                    counts.num_generations,
                    self.think_end,
                )
