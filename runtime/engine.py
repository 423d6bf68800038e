"""The engine: a target, an optional drafter and a backend, behind `generate`, `stream`, `score` and `logits`.

Decoding is a loop of rounds that propose and verify tokens (`decoding/loop.py`). Row invariance and position-keyed
sampling noise make the text bit-identical with and without a drafter, and independent of the batch.

Left out: paged buffers, prefix sharing and preemption. Every sequence owns a slot of `max_length` positions.
"""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from speedstack.dflash.model import DFlashDraftModel
from speedstack.runtime.backends.base import Backend, Rows
from speedstack.runtime.backends.cpu.backend import HeldAs
from speedstack.runtime.backends.gpu.multi_step import rounds_for
from speedstack.runtime.backends.select import make_backend
from speedstack.runtime.decoding.detokenizer import TextStream
from speedstack.runtime.decoding.drafter_choice import Drafter, load_drafter_for
from speedstack.runtime.decoding.loop import Decoder
from speedstack.runtime.decoding.prompts import (
    Prompt,
    encode_prompt,
    integer,
    sampling_params,
    seeds_for,
    single_prompt,
    split_prompts,
    stop_strings,
)
from speedstack.runtime.decoding.proposers import DrafterProposer, NgramProposer, NoProposer, Proposer
from speedstack.runtime.decoding.results import Generation, Score, score_of
from speedstack.runtime.decoding.sequence import RunningSequence
from speedstack.runtime.model.kv_ring import MAX_ROWS
from speedstack.runtime.model.loading import LoadedTarget, load_target
from speedstack.runtime.model.spec import ModelSpec
from speedstack.runtime.model.weights import ModelWeights
from speedstack.runtime.rounds.draft_length import DraftBudget, DraftHistory
from speedstack.runtime.rounds.sampling import SamplingParams
from speedstack.runtime.rounds.speculation import NGRAM, DraftStrategy

DEFAULT_MAX_LENGTH = 4096


class Engine:
    """Decodes with one target, with or without a drafter. Build it with `from_pretrained`."""

    def __init__(
        self,
        weights: ModelWeights,
        drafter: Drafter = None,
        tokenizer: Any = None,
        backend: str = "auto",
        max_length: int | None = None,
        max_batch_size: int = 8,
        strategy: DraftStrategy | None = None,
        dense_dtype: str | None = None,
        kv_dtype: str | None = None,
    ) -> None:
        """Like `from_pretrained`, with weights that are already in memory."""
        spec = weights.spec
        default_length = min(spec.max_position_embeddings, DEFAULT_MAX_LENGTH)
        self.max_length = default_length if max_length is None else max_length
        if not 1 <= self.max_length <= spec.max_position_embeddings:
            raise ValueError(
                f"max_length must be between 1 and the model's {spec.max_position_embeddings} positions, "
                f"not {self.max_length}"
            )
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size must be at least 1, got {max_batch_size}")
        self._is_decoding = False
        self.max_batch_size = max_batch_size
        self.tokenizer = tokenizer
        self.target_sha256: str | None = None
        self.drafter_sha256: str | None = None
        self.spec: ModelSpec = spec
        self.dtype: torch.dtype = weights.dtype
        self.device: torch.device = weights.embedding_VD.device
        self._has_default_strategy = strategy is None
        model = drafter if isinstance(drafter, DFlashDraftModel) else None
        (strategy or DraftStrategy()).num_per_round(drafter)
        held = HeldAs(dense_dtype, kv_dtype)
        self.backend: Backend = make_backend(backend, weights, model, max_batch_size, self.max_length, held)
        self._plan(drafter, strategy or self._default_strategy(drafter))

    @classmethod
    def from_pretrained(
        cls,
        target: str | Path,
        drafter: str | Path | DFlashDraftModel | None = None,
        backend: Literal["auto", "reference", "cpu", "graph", "resident"] = "auto",
        device: str = "auto",
        dtype: str | torch.dtype | None = None,
        max_length: int | None = None,
        max_batch_size: int = 8,
        num_drafts: int | Literal["adaptive", "all"] | None = None,
        draft_noise: Literal["none", "shared"] = "none",
        dense_dtype: Literal["int8"] | None = None,
        kv_dtype: Literal["float32", "bfloat16"] | None = None,
    ) -> "Engine":
        """Loads a target, and a drafter trained for it, from directories.

        Args:
            target: Hugging Face directory, with or without MXFP4 experts.
            drafter: DFlash directory or a model in memory (see `set_drafter`); one made for another target is refused.
                `"ngram"` is prompt lookup; a directory of that name needs a path such as `./ngram`.
            backend: `reference`: PyTorch, any device. `cpu`: compiled kernels, float32. `graph`: one Triton kernel per
                phase. `resident`: one Triton kernel for whole rounds, several per launch unless the draft length is
                adaptive or the drafter or sampling needs the host. `auto`: `cpu` where it can run, else `reference`
                with a warning that says why.
            device: `cpu`, `cuda`, `cuda:1`; `auto` takes CUDA if available.
            dtype: for all weights but packed experts and FP8 matrices that the backend reads as FP8. None: float32 on a
                CPU, bfloat16 on a GPU.
            max_length: positions per sequence; None takes the model's limit, at most 4096.
            max_batch_size: sequences decoded together.
            num_drafts: proposals verified per round. `all`: every proposal. `adaptive`: as many as pay for their cost,
                possibly none. None: `adaptive` on `cpu`, which measures the cost, else `all`.
            draft_noise: `shared` samples proposals with the target's own noise (see `DraftStrategy`); no effect on
                greedy decoding.
            dense_dtype: `int8` stores attention, dense MLPs and the LM head in 8-bit blocks of 32, which changes logits
                slightly. None: as stored. `cpu` only.
            kv_dtype: of key/value buffers; `bfloat16` halves them and changes logits slightly. `cpu` only.

        Raises:
            ValueError: one line that says what is wrong and what would be right.
        """
        strategy = DraftStrategy(None if num_drafts == "all" else num_drafts, draft_noise)
        loaded = load_target(target, device, dtype)
        is_default = num_drafts is None and strategy == DraftStrategy()
        chosen = None if is_default else strategy
        return cls.from_target(loaded, drafter, backend, max_length, max_batch_size, chosen, dense_dtype, kv_dtype)

    @classmethod
    def from_target(
        cls,
        target: LoadedTarget,
        drafter: str | Path | DFlashDraftModel | None = None,
        backend: Literal["auto", "reference", "cpu", "graph", "resident"] = "auto",
        max_length: int | None = None,
        max_batch_size: int = 8,
        strategy: DraftStrategy | None = None,
        dense_dtype: Literal["int8"] | None = None,
        kv_dtype: Literal["float32", "bfloat16"] | None = None,
    ) -> "Engine":
        """Like `from_pretrained`, for a target in memory; engines of one target share its weights."""
        w = target.weights
        model, sha256 = load_drafter_for(drafter, w.spec, target.sha256, w.dtype, w.embedding_VD.device)
        options = (backend, max_length, max_batch_size, strategy, dense_dtype, kv_dtype)
        engine = cls(w, model, target.tokenizer, *options)
        engine.target_sha256, engine.drafter_sha256 = target.sha256, sha256
        return engine

    def set_drafter(self, drafter: str | Path | DFlashDraftModel | None) -> None:
        """Switches to another drafter, or to none with None, which resets the strategy to the backend's default.

        Takes what `from_pretrained` takes. A model in memory is copied, so its training may go on. Raises ValueError,
        with nothing changed, for another target's drafter, one that does not fit the strategy, or while a stream is
        being read.
        """
        model, sha256 = load_drafter_for(drafter, self.spec, self.target_sha256, self.dtype, self.device)
        is_default = drafter is None or self._has_default_strategy
        strategy = self._default_strategy(model) if is_default else self.strategy
        strategy.num_per_round(model)
        with self._alone():
            self._has_default_strategy = is_default
            # Prompt lookup needs nothing from the backend, so switching between it and no drafter rebuilds nothing.
            if isinstance(model, DFlashDraftModel) or isinstance(self._drafter, DFlashDraftModel):
                self.backend.set_drafter(model if isinstance(model, DFlashDraftModel) else None)
            self._plan(model, strategy)
        self.drafter_sha256 = sha256

    def set_strategy(self, strategy: DraftStrategy) -> None:
        """Changes how the engine speculates; the text stays the same.

        Raises ValueError if the drafter or the backend does not support it, or while a stream is being read.
        """
        with self._alone():
            self._plan(self._drafter, strategy)
            self._has_default_strategy = False

    def _default_strategy(self, drafter: Drafter) -> DraftStrategy:
        """Adaptive if the backend has measured the cost of a draft, else all drafts."""
        is_adaptive = drafter is not None and self.backend.has_measured_cost
        return DraftStrategy("adaptive") if is_adaptive else DraftStrategy()

    def _plan(self, drafter: Drafter, strategy: DraftStrategy) -> None:
        num_drafts = strategy.num_per_round(drafter)
        rounds = rounds_for(self.backend, drafter, strategy)  # may fail; nothing has changed yet
        self._drafter, self.strategy, self.num_drafts = drafter, strategy, num_drafts
        self._histories: dict[SamplingParams, DraftHistory] = {}
        proposer: Proposer = DrafterProposer(self.backend, strategy)
        if drafter is None or drafter == NGRAM:
            proposer = NoProposer() if drafter is None else NgramProposer()
        self._decoder = Decoder(self.backend, proposer, self.spec.vocab_size, self.device, rounds)

    @property
    def backend_name(self) -> str:
        return self.backend.name

    @property
    def prepare_seconds(self) -> float:
        """Time spent once on compiling kernels and packing weights."""
        return self.backend.prepare_seconds

    @property
    def vocab_size(self) -> int:
        return self.spec.vocab_size

    def memory_bytes(self) -> dict[str, int]:
        """Bytes of weights by part, as the backend stores them, and of the key/value buffers."""
        return self.backend.weight_bytes() | {"KV cache": self.backend.cache_bytes()}

    def generate(
        self,
        prompts: Any,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: Any = 0,
        stop: Any = (),
        ignore_eos: bool = False,
        skip_special_tokens: bool = True,
    ) -> Any:
        """Continues one prompt, or each of a list.

        Each result depends only on its prompt and seed: pass a list of seeds to sample one prompt several times.

        Args:
            prompts: text, token ids [T] (list, tuple, range, array, tensor) or a tokenizer's output; or a list of
                these, or an array [N, T]. Padding named by an attention mask is removed. Text gets the tokenizer's
                special tokens unless it begins with BOS (see `encode_text`).
            temperature: 0 is greedy. Defaults in the model's generation_config.json are ignored.
            seed: one integer for all prompts, or one for each.
            stop: one or more strings that end a sequence. They are cut from the text; their tokens are kept. Special
                tokens are allowed.
            ignore_eos: continue past end tokens (`spec.eos_token_ids`; for a directory, `end_token_ids`) to
                `max_new_tokens`. A final end token is in the tokens, not in the text.
            skip_special_tokens: leave special tokens out of the text; the tokens keep them.

        Returns:
            A `Generation`, or a list of them in the order of the prompts.

        Raises:
            ValueError: an invalid or empty prompt, ids outside the vocabulary, a prompt too long for the buffers, a
                sampling parameter out of range, or NaN logits.
        """
        listed, is_single = split_prompts(prompts, self.tokenizer)
        params = sampling_params(temperature, top_p, top_k)
        waiting = [
            self._sequence(prompt, max_new_tokens, params, one_seed, stop, ignore_eos, skip_special_tokens)
            for prompt, one_seed in zip(listed, seeds_for(seed, len(listed)), strict=True)
        ]
        for _ in self._run(list(waiting)):
            pass
        results = [sequence.result() for sequence in waiting]
        return results[0] if is_single else results

    def stream(
        self,
        prompt: Any,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        stop: Any = (),
        ignore_eos: bool = False,
        skip_special_tokens: bool = True,
    ) -> Generator[str, None, Generation]:
        """Yields the text of `generate` piece by piece and returns its result. Needs a tokenizer."""
        if self.tokenizer is None:
            raise ValueError("stream yields text, and the target has no tokenizer files; use generate with token ids")
        found, params = single_prompt(prompt, self.tokenizer), sampling_params(temperature, top_p, top_k)
        sequence = self._sequence(
            found, max_new_tokens, params, integer("seed", seed), stop, ignore_eos, skip_special_tokens
        )
        for _ in self._run([sequence]):
            piece = sequence.take_text()
            if piece:
                yield piece
        return sequence.result()

    def score(self, prompts: Any) -> Any:
        """Log-probability of every token but the first, given the tokens before it: a `Score`, or a list for several
        prompts.
        """
        listed, is_single = split_prompts(prompts, self.tokenizer)
        scores = [self._score(self.encode(prompt)) for prompt in listed]
        return scores[0] if is_single else scores

    def logits(self, prompt: Any) -> torch.Tensor:
        """Float32 logits [T, vocabulary] after each of the prompt's T tokens."""
        return torch.cat([logits.clone() for logits, _ in self._prefill_logits(self.encode(prompt))])

    def encode(self, prompt: Any) -> list[int]:
        """Token ids of a prompt: at least one, at most `max_length`, all in the vocabulary."""
        return encode_prompt(prompt, self.tokenizer, self.spec.vocab_size, self.max_length)

    def _sequence(
        self,
        prompt: Prompt,
        max_new_tokens: Any,
        params: SamplingParams,
        seed: int,
        stop: Any,
        ignore_eos: bool,
        skip_special_tokens: bool = True,
    ) -> RunningSequence:
        ids, num_new, stops = self.encode(prompt), integer("max_new_tokens", max_new_tokens), stop_strings(stop)
        if num_new < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {num_new}")
        if len(ids) + num_new > self.max_length:
            raise ValueError(
                f"a prompt of {len(ids)} tokens and max_new_tokens={num_new} do not fit the buffers of "
                f"{self.max_length} positions; raise max_length or shorten either"
            )
        if stops and self.tokenizer is None:
            raise ValueError("stop strings need text, and the target has no tokenizer files")
        is_prompt_lookup = self._drafter == NGRAM
        cost = self.backend.round_cost.of_prompt_lookup if is_prompt_lookup else self.backend.round_cost
        history = self._histories.setdefault(params, DraftHistory())
        return RunningSequence(
            ids,
            num_new,
            params,
            seed,
            () if ignore_eos else self.spec.eos_token_ids,
            TextStream(self.tokenizer, stops, ids, skip_special_tokens) if self.tokenizer is not None else None,
            self.num_drafts,
            DraftBudget(self.num_drafts, cost, history) if self.strategy.is_adaptive else None,
            self.strategy.ngram_size if is_prompt_lookup else None,
        )

    def _run(self, waiting: list[RunningSequence]) -> Iterator[None]:
        """Decodes all sequences, `max_batch_size` at a time; yields after prompts and after each launch of rounds."""
        free = list(range(self.max_batch_size))[::-1]
        running: list[RunningSequence] = []
        waiting = waiting[::-1]
        with self._alone():
            while waiting or running:
                admitted = [waiting.pop() for _ in range(min(len(waiting), len(free)))]
                for sequence in admitted:
                    sequence.slot = free.pop()
                running += admitted
                for _ in self._decoder.prefill(admitted):
                    yield
                decoding = [sequence for sequence in running if not sequence.is_finished]
                if decoding:
                    self._decoder.round(decoding)
                free += [sequence.slot for sequence in running if sequence.is_finished]
                running = [sequence for sequence in running if not sequence.is_finished]
                yield

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Refuses a second call while a stream still uses the buffers."""
        if self._is_decoding:
            raise ValueError("this engine is decoding already: finish or close that stream, or use a second engine")
        self._is_decoding = True
        try:
            yield
        finally:
            self._is_decoding = False

    def _prefill_logits(self, ids: list[int]) -> Iterator[tuple[torch.Tensor, list[int]]]:
        with self._alone():
            for start in range(0, len(ids), MAX_ROWS):
                chunk = ids[start : start + MAX_ROWS]
                rows = Rows(chunk, [0] * len(chunk), list(range(start, start + len(chunk))))
                yield self.backend.step(rows, range(len(chunk)))

    def _score(self, ids: list[int]) -> Score:
        if len(ids) < 2:
            raise ValueError(f"scoring needs at least two tokens, got {len(ids)}")
        return score_of(self._prefill_logits(ids), ids)
