"""The engine: a target, an optional drafter and a backend, behind `generate`, `stream`, `score` and `logits`.

Decoding is a loop of rounds. In each, every running sequence contributes its newest token (the anchor, whose keys and
values the target has not computed yet) and the drafter's proposals after it; the target computes all rows in one step,
the token at each position is chosen from its logits, and proposals are kept as long as they are the tokens chosen. With
row invariance and position-keyed sampling noise the text is bit for bit the text without a drafter. Sequences are
admitted as others finish; who runs beside whom changes nothing either.

Left out: paged buffers, prefix sharing and preemption; every sequence owns a slot of `max_length` positions.
"""

import copy
import operator
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from speedstack.dflash.accept import count_accepted
from speedstack.dflash.checkpoint import check_target, load_drafter
from speedstack.dflash.model import DFlashDraftModel
from speedstack.quant.checkpoint import load_checkpoint, weights_sha256
from speedstack.runtime.backend import MAX_ROWS, Backend, Rows
from speedstack.runtime.results import Generation, Score
from speedstack.runtime.sampling import SamplingParams, gumbel_noise, sample
from speedstack.runtime.select import choose_device, choose_dtype, make_backend
from speedstack.runtime.sequence import RunningSequence
from speedstack.runtime.spec import ModelSpec, spec_from_config
from speedstack.runtime.weights import ModelWeights, read_weights

Prompt = str | list[int]
DEFAULT_MAX_LENGTH = 4096


class Engine:
    """Decodes with one target, with or without a drafter. Build it with `from_pretrained`."""

    def __init__(
        self,
        weights: ModelWeights,
        drafter: DFlashDraftModel | None = None,
        tokenizer: Any = None,
        backend: str = "auto",
        max_length: int | None = None,
        max_batch_size: int = 8,
        num_drafts: int | Literal["adaptive"] | None = None,
    ) -> None:
        """See `from_pretrained`; this takes weights that are already in memory."""
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
        self._weights, self._backend_choice, self._num_drafts_choice = weights, backend, num_drafts
        self.max_batch_size = max_batch_size
        self.tokenizer = tokenizer
        self.target_sha256: str | None = None
        self.drafter_sha256: str | None = None
        self.spec: ModelSpec = spec
        self.dtype: torch.dtype = weights.embedding_VD.dtype
        self.device: torch.device = weights.embedding_VD.device
        self._install(drafter)

    @classmethod
    def from_pretrained(
        cls,
        target: str | Path,
        drafter: str | Path | DFlashDraftModel | None = None,
        backend: Literal["auto", "reference", "cpu"] = "auto",
        device: str = "auto",
        dtype: str | torch.dtype | None = None,
        max_length: int | None = None,
        max_batch_size: int = 8,
        num_drafts: int | Literal["adaptive"] | None = None,
    ) -> "Engine":
        """Loads a target, and a drafter that was trained for it, from directories.

        Args:
            target: Hugging Face directory, experts packed in MXFP4 or not.
            drafter: DFlash directory in z-lab's format, or a model in memory (see `set_drafter`); refused when it
                names another target.
            backend: `reference` is PyTorch on any device, `cpu` compiled kernels for float32 on a CPU; `auto` takes
                `cpu` where it can and says why where it cannot.
            device: `cpu`, `cuda`, `cuda:1`; `auto` takes CUDA where there is one.
            dtype: of everything but packed experts; None is float32 on a CPU and bfloat16 on a GPU.
            max_length: positions that each sequence's buffers hold; None takes the model's, at most 4096.
            max_batch_size: sequences decoded together.
            num_drafts: proposals verified a round; None verifies all that the drafter makes, `adaptive` drafts and
                verifies as many as are worth their cost, which is fastest for a single sequence on a CPU.

        Raises:
            ValueError: with one line that says what is wrong and what would be right.
        """
        torch_device = choose_device(device)
        torch_dtype = choose_dtype(dtype, torch_device)
        checkpoint = load_checkpoint(target)
        spec = spec_from_config(checkpoint.config)
        sha256 = weights_sha256(target)
        tied = bool(checkpoint.config.tie_word_embeddings)
        weights = read_weights(spec, checkpoint.tensors, torch_dtype, torch_device, tied)
        model = _load_drafter(drafter, spec, sha256, torch_dtype, torch_device) if drafter is not None else None
        engine = cls(weights, model, _load_tokenizer(target), backend, max_length, max_batch_size, num_drafts)
        engine.target_sha256 = sha256
        engine.drafter_sha256 = weights_sha256(drafter) if isinstance(drafter, str | Path) else None
        return engine

    def set_drafter(self, drafter: DFlashDraftModel | None) -> None:
        """Drafts with another model from now on, or with none: a drafter in training is measured this way.

        The weights are copied, so that training may go on. Raises ValueError for a drafter of another target, one that
        proposes fewer tokens than the engine's `num_drafts`, or while a stream is read.
        """
        if drafter is not None:
            drafter = _load_drafter(drafter, self.spec, self.target_sha256, self.dtype, self.device)
        with self._alone():
            self._install(drafter)
        self.drafter_sha256 = None

    def _install(self, drafter: DFlashDraftModel | None) -> None:
        limit = drafter.config.num_proposals if drafter is not None else 0
        wanted = self._num_drafts_choice
        num_drafts = limit if wanted is None or wanted == "adaptive" else wanted
        if wanted is not None and not 1 <= num_drafts <= limit:
            what = f"must be 'adaptive' or between 1 and the drafter's {limit}" if drafter else "needs a drafter"
            raise ValueError(f"num_drafts {wanted} {what}")
        if num_drafts + 1 > MAX_ROWS:
            raise ValueError(f"num_drafts {num_drafts} is more than the {MAX_ROWS - 1} that one step can verify")
        self.backend: Backend = make_backend(
            self._backend_choice, self._weights, drafter, self.max_batch_size, self.max_length
        )
        self.num_drafts, self.is_adaptive = num_drafts, wanted == "adaptive"

    @property
    def backend_name(self) -> str:
        return self.backend.name

    @property
    def prepare_seconds(self) -> float:
        """Time that compiling kernels and arranging weights took, once."""
        return self.backend.prepare_seconds

    @property
    def vocab_size(self) -> int:
        return self.spec.vocab_size

    def memory_bytes(self) -> dict[str, int]:
        """Bytes of weights by part, as the backend holds them, and of the key/value buffers."""
        return self.backend.weight_bytes() | {"KV cache": self.backend.cache_bytes()}

    def generate(
        self,
        prompts: Any,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | Sequence[int] = 0,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
    ) -> Any:
        """Continues one prompt, or each of a list.

        What is sampled for a prompt depends on the prompt and its seed alone: give a list of seeds to draw several
        continuations of one prompt.

        Args:
            prompts: text, token ids, or a list of either.
            seed: one for all prompts, or one a prompt.
            stop: strings that end a sequence; they are cut from the text, and their tokens are kept.
            ignore_eos: go on past the end-of-sequence token, to `max_new_tokens`.

        Returns:
            A `Generation`, or a list of them in the order of the prompts.

        Raises:
            ValueError: an empty prompt, ids outside the vocabulary, a prompt that does not fit the buffers, a sampling
                parameter out of range, or logits that are not numbers.
        """
        is_single = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int))
        listed = [prompts] if is_single else list(prompts)
        seeds = [seed] * len(listed) if isinstance(seed, int) else list(seed)
        if len(seeds) != len(listed):
            raise ValueError(f"{len(seeds)} seeds for {len(listed)} prompts: give one seed, or one a prompt")
        params = SamplingParams(temperature, top_p, top_k)
        waiting = [
            self._sequence(prompt, max_new_tokens, params, one_seed, stop, ignore_eos)
            for prompt, one_seed in zip(listed, seeds, strict=True)
        ]
        for _ in self._run(list(waiting)):
            pass
        results = [sequence.result() for sequence in waiting]
        return results[0] if is_single else results

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
    ) -> Generator[str, None, Generation]:
        """Yields the text of `generate` piece by piece, as rounds commit it; returns its result. Needs a tokenizer."""
        if self.tokenizer is None:
            raise ValueError("stream yields text, and the target has no tokenizer files; use generate with token ids")
        params = SamplingParams(temperature, top_p, top_k)
        sequence = self._sequence(prompt, max_new_tokens, params, seed, stop, ignore_eos)
        for _ in self._run([sequence]):
            piece = sequence.take_text()
            if piece:
                yield piece
        return sequence.result()

    def score(self, ids: list[int] | list[list[int]]) -> Any:
        """Log-probabilities of ids[1:], each given all ids before it; a `Score`, or a list for a list of sequences."""
        if ids and isinstance(ids[0], Sequence):
            return [self._score(one) for one in ids]  # type: ignore[arg-type]
        return self._score(ids)  # type: ignore[arg-type]

    def logits(self, ids: list[int]) -> torch.Tensor:
        """Float32 logits [len(ids), vocabulary] after each token."""
        return torch.cat([logits.clone() for logits, _ in self._prefill_logits(ids)])

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, checked: not empty, all in the vocabulary, at most `max_length` of them."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("the target has no tokenizer files; give token ids instead of text")
            ids = self.tokenizer.encode(prompt, add_special_tokens=False)
        else:
            try:
                ids = [operator.index(token) for token in prompt]
            except TypeError:
                raise ValueError("a prompt is text or a list of integer token ids") from None
        if not ids:
            raise ValueError("the prompt is empty; give at least one token")
        bad = next((token for token in ids if not 0 <= token < self.spec.vocab_size), None)
        if bad is not None:
            raise ValueError(f"token id {bad} is outside the vocabulary of {self.spec.vocab_size} tokens")
        if len(ids) > self.max_length:
            raise ValueError(
                f"{len(ids)} tokens do not fit the buffers of {self.max_length} positions; raise max_length"
            )
        return ids

    def _sequence(
        self,
        prompt: Prompt,
        max_new_tokens: int,
        params: SamplingParams,
        seed: int,
        stop: str | Sequence[str],
        ignore_eos: bool,
    ) -> RunningSequence:
        ids = self.encode(prompt)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if len(ids) + max_new_tokens > self.max_length:
            raise ValueError(
                f"a prompt of {len(ids)} tokens and max_new_tokens={max_new_tokens} do not fit the buffers of "
                f"{self.max_length} positions; raise max_length or shorten either"
            )
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if stops and (self.tokenizer is None or "" in stops):
            raise ValueError("stop strings need a tokenizer and must not be empty")
        eos = () if ignore_eos else self.spec.eos_token_ids
        return RunningSequence(
            ids, max_new_tokens, params, seed, eos, stops, self.tokenizer, self.num_drafts, self.is_adaptive
        )

    def _run(self, waiting: list[RunningSequence]) -> Iterator[None]:
        """Decodes all sequences, `max_batch_size` at a time; yields after every round."""
        free = list(range(self.max_batch_size))[::-1]
        running: list[RunningSequence] = []
        waiting = waiting[::-1]
        with self._alone():
            while waiting or running:
                while waiting and free:
                    sequence = waiting.pop()
                    sequence.slot = free.pop()
                    self._prefill(sequence)
                    running.append(sequence)
                decoding = [sequence for sequence in running if not sequence.is_finished]
                if decoding:
                    self._round(decoding)
                free += [sequence.slot for sequence in running if sequence.is_finished]
                running = [sequence for sequence in running if not sequence.is_finished]
                yield

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keeps two calls from sharing the buffers: a stream may be left half read."""
        if self._is_decoding:
            raise ValueError("this engine is decoding already: finish or close that stream, or use a second engine")
        self._is_decoding = True
        try:
            yield
        finally:
            self._is_decoding = False

    def _prefill(self, sequence: RunningSequence) -> None:
        started = time.perf_counter()
        ids = sequence.tokens
        for start in range(0, len(ids), MAX_ROWS):
            chunk = ids[start : start + MAX_ROWS]
            rows = Rows(chunk, [sequence.slot] * len(chunk), list(range(start, start + len(chunk))))
            is_last = start + len(chunk) == len(ids)
            logits_WV, best = self.backend.step(rows, [len(chunk) - 1] if is_last else [])
        noise_RV = self._noise([sequence], [len(ids)])
        token = self._choose(sequence, logits_WV[0], noise_RV[0], best[0], len(ids))
        sequence.stats.prefill_seconds = time.perf_counter() - started
        sequence.commit([token])

    def _round(self, sequences: list[RunningSequence]) -> None:
        started = time.perf_counter()
        drafts = self._draft(sequences)
        tokens: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        for sequence, draft in zip(sequences, drafts, strict=True):
            tokens += [sequence.tokens[-1], *draft]
            slots += [sequence.slot] * (1 + len(draft))
            positions += range(len(sequence.tokens) - 1, len(sequence.tokens) + len(draft))
        rows = Rows(tokens, slots, positions)
        logits_WV, best = self.backend.step(rows, range(len(tokens)))
        owners = [s for s, draft in zip(sequences, drafts, strict=True) for _ in range(len(draft) + 1)]
        noise_RV = self._noise(owners, [position + 1 for position in positions])
        first = 0
        for sequence, draft in zip(sequences, drafts, strict=True):
            chosen: list[int] = []
            for offset in range(len(draft) + 1):
                row = first + offset
                token = self._choose(sequence, logits_WV[row], noise_RV[row], best[row], positions[row] + 1)
                chosen.append(token)
                if offset < len(draft) and draft[offset] != chosen[offset]:
                    break
            accepted = count_accepted(draft[: len(chosen) - 1], chosen)
            num_committed = sequence.commit(chosen[: accepted + 1])
            sequence.record_round(len(draft), accepted, num_committed)
            first += len(draft) + 1
        seconds = time.perf_counter() - started
        for sequence in sequences:
            sequence.stats.decode_seconds += seconds

    def _draft(self, sequences: list[RunningSequence]) -> list[list[int]]:
        """The proposals to verify for each sequence; sequences that want some are drafted together."""
        if self.num_drafts == 0:
            return [[] for _ in sequences]
        wanted = [sequence.num_to_draft() for sequence in sequences]
        drafting = [sequence for sequence, count in zip(sequences, wanted, strict=True) if count > 0]
        if not drafting:
            return [[] for _ in sequences]
        anchors = [sequence.tokens[-1] for sequence in drafting]
        slots, positions = [s.slot for s in drafting], [len(s.tokens) - 1 for s in drafting]
        proposals = iter(self.backend.draft(anchors, slots, positions, max(wanted)))
        return [s.worth_verifying(next(proposals)) if count else [] for s, count in zip(sequences, wanted, strict=True)]

    def _noise(self, owners: list[RunningSequence], positions: list[int]) -> torch.Tensor | list[None]:
        """Sampling noise of each row's next token; nothing where all sequences are greedy."""
        if all(sequence.params.temperature == 0.0 for sequence in owners):
            return [None] * len(owners)
        seeds, keys = [s.seed for s in owners], [s.key for s in owners]
        return gumbel_noise(seeds, keys, positions, self.spec.vocab_size, self.device)

    def _choose(
        self,
        sequence: RunningSequence,
        logits_V: torch.Tensor,
        noise_V: torch.Tensor | None,
        best: int,
        position: int,
    ) -> int:
        if best < 0:
            raise ValueError(
                f"the target's logits at position {position} are not numbers; "
                "the checkpoint is broken or its dtype overflows"
            )
        return best if noise_V is None else sample(logits_V, noise_V, sequence.params)

    def _prefill_logits(self, ids: list[int]) -> Iterator[tuple[torch.Tensor, list[int]]]:
        ids = self.encode(ids)
        with self._alone():
            for start in range(0, len(ids), MAX_ROWS):
                chunk = ids[start : start + MAX_ROWS]
                rows = Rows(chunk, [0] * len(chunk), list(range(start, start + len(chunk))))
                yield self.backend.step(rows, range(len(chunk)))

    def _score(self, ids: list[int]) -> Score:
        if len(ids) < 2:
            raise ValueError(f"scoring needs at least two tokens, got {len(ids)}")
        logprobs: list[torch.Tensor] = []
        greedy: list[int] = []
        start = 1
        for logits_WV, best in self._prefill_logits(ids):
            targets = torch.tensor(ids[start : start + len(best)], device=logits_WV.device)
            kept = logits_WV[: len(targets)]
            logprobs.append(torch.log_softmax(kept, -1).gather(1, targets[:, None])[:, 0].cpu())
            greedy += best[: len(targets)]
            start += len(best)
        if -1 in greedy:
            raise ValueError("the target's logits are not numbers; the checkpoint is broken or its dtype overflows")
        return Score(torch.cat(logprobs), torch.tensor(greedy) == torch.tensor(ids[1:]))


def _load_drafter(
    drafter: str | Path | DFlashDraftModel,
    spec: ModelSpec,
    target_sha256: str | None,
    dtype: torch.dtype,
    device: torch.device,
) -> DFlashDraftModel:
    """A drafter as backends take it, checked against the target; a model in memory is copied."""
    model = copy.deepcopy(drafter) if isinstance(drafter, DFlashDraftModel) else load_drafter(drafter)
    check_target(model.config, target_sha256, spec.hidden_size, spec.num_layers, spec.vocab_size)
    return model.to(device, dtype).eval().requires_grad_(False)


def _load_tokenizer(path: str | Path) -> Any:
    """The tokenizer beside a model, or None where there are no tokenizer files."""
    if not any((Path(path) / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)
