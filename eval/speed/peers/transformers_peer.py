"""transformers as a peer: `generate`, assisted generation with the same DFlash drafter, and `generate` compiled.

`generate` runs with its dynamic cache and the experts implementation that decodes this model fastest (tried out first),
and keeps no scores. The compiled one is what transformers' documentation calls it: a static cache, and the decoding
forward under `torch.compile`. A step attends to the whole of a static cache, so every set of prompts has one of its
own, as long as its longest text, and code compiled for that length: a set of long prompts slows no other. It tries
experts implementations out as well, compiled, since another one may be fastest then. What decodes fastest need not be
good for a prompt: on a GPU that goes through transformers' own choice, and `generate` switches between the two. On a
CPU transformers does not switch, and so neither does this: what decodes fastest reads the prompt too.

Plain `generate` decodes several sequences at once too, shorter prompts padded, with the experts implementation that
does that fastest. All three run one model in memory.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from transformers import GenerationConfig

from speedstack.dflash.checkpoint import load_drafter
from speedstack.dflash.hf import to_transformers
from speedstack.eval.results.failures import PEER_ERRORS, one_line
from speedstack.eval.results.schema import Unavailable
from speedstack.eval.results.speed import TRANSFORMERS
from speedstack.eval.speed.contestant import Contestant, Sample
from speedstack.quant.checkpoint import load_model
from speedstack.runtime import GenerationStats

P = ParamSpec("P")
T = TypeVar("T")

NAMES = {
    "transformers": TRANSFORMERS,
    "assisted": "transformers + drafter",
    "compiled": "transformers, compiled",
}
EXPERTS_IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")
# The third is a loop over experts that the router chose, at which every layer's graph breaks.
COMPILED_EXPERTS = ("grouped_mm", "batched_mm")
# batched_mm gathers the weights of every token's experts: of a long prompt's that is more than there is memory.
PROMPT_EXPERTS = "grouped_mm"
_SWITCH = "_optimize_model_for_decode"
TRIAL_TOKENS = 16
TRIAL_REPEATS = 3


class ArrivalClock:
    """A transformers streamer that notes when new tokens came and how many; the prompt is its first `put`."""

    def __init__(self) -> None:
        self.num_puts = 0
        self.arrivals: list[tuple[float, int]] = []

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt, then with every piece of new tokens, which are on the host by then."""
        self.num_puts += 1
        if self.num_puts > 1:
            self.arrivals.append((time.perf_counter(), value.numel()))

    def end(self) -> None:
        """Called after the last token."""


def transformers_contestants(
    target: str | Path,
    drafter: str | Path | None,
    dtype: torch.dtype,
    device: str,
    kinds: Sequence[str],
    prompts: Mapping[str, Sequence[list[int]]],
    num_new_tokens: int,
    reference: str,
    batch_size: int = 1,
) -> tuple[list[Contestant], list[Unavailable]]:
    """Contestants of `kinds` (keys of `NAMES`) that can be set up, and the others with the reason.

    `prompts` are those of each set, by its name; `reference` is the contestant whose text these must say; `batch_size`
    sequences are decoded at once at most.
    """
    names = [NAMES[kind] for kind in kinds]
    # Experts are tried out on decoding, for which a long prompt is only a wait.
    shortest = {name: min(group, key=len) for name, group in prompts.items()}
    trial_set = min(shortest, key=lambda name: len(shortest[name]))
    trial_prompt = shortest[trial_set]
    started = time.perf_counter()
    try:
        model: Any = load_model(target, dtype=dtype)
        model = model.to(device).eval()
        # The model's own settings would end a text early, at an end-of-text id, and penalize what it has said before.
        model.generation_config = GenerationConfig()
        refuse_broken_logits(model, trial_prompt)
    except PEER_ERRORS as error:
        return [], [Unavailable(name=name, reason=one_line(error)) for name in names]
    load_seconds = time.perf_counter() - started
    plain: dict[str, float] = {}
    unavailable: list[Unavailable] = []
    if set(kinds) - {"compiled"}:
        plain, unavailable = try_experts_implementations(model, trial_prompt)
    contestants = []
    for kind in kinds:
        started = time.perf_counter()
        try:
            run, what = _runner_of(kind, model, drafter, dtype, prompts, num_new_tokens)
            trials = plain
            if isinstance(run, CompiledGenerate):
                run.choose_set(trial_set)
                trials, failed = try_experts_implementations(
                    model, trial_prompt, run, COMPILED_EXPERTS, min(TRIAL_TOKENS, num_new_tokens), NAMES[kind]
                )
                unavailable += failed
        except PEER_ERRORS as error:
            unavailable.append(Unavailable(name=NAMES[kind], reason=one_line(error)))
            continue
        if not trials:
            reason = "none of its experts implementations runs this model"
            unavailable.append(Unavailable(name=NAMES[kind], reason=reason))
            continue
        fastest = min(trials, key=lambda name: trials[name])
        prompt = prompt_experts(model, trials, kind)
        choice = f"{fastest} experts" + (f", {prompt} for the prompt" if prompt not in (None, fastest) else "")
        tried = ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in trials.items())
        run_batch = None
        if kind == "transformers" and batch_size > 1:
            run_batch, batch_choice = _batch_runner(model, trial_prompt, batch_size, trials)
            choice += f", {batch_choice} experts for {batch_size} sequences"
        contestants.append(
            Contestant(
                name=NAMES[kind],
                description=f"transformers {what}, {choice} (tried, ms a decoded token: {tried})",
                run=_with_experts(model, fastest, prompt, run),
                run_batch=run_batch,
                prepare_seconds=load_seconds + time.perf_counter() - started,
                enter_set=_with_experts(model, fastest, prompt, run.enter_set)
                if isinstance(run, CompiledGenerate)
                else None,
                identical_to=reference,
                # In float32 the two differ by rounding alone, which decides no argmax but a near tie; in bfloat16 it
                # does, and so it may where rows are verified together.
                identity_promised=kind == "transformers" and dtype == torch.float32,
            )
        )
    return contestants, unavailable


def _batch_runner(
    model: Any, prompt: list[int], batch_size: int, known: Mapping[str, float]
) -> tuple[Callable[[list[list[int]], int], list[Sample]], str]:
    """Calls of `generate` with several prompts, and which of the `known` experts implementations it has for that."""
    run = transformers_batch_runner(model)
    trials, _ = try_experts_implementations(
        model, prompt, lambda prompt, count: run([prompt] * batch_size, count)[0], tuple(known)
    )
    fastest = min(trials or known, key=lambda name: (trials or known)[name])
    return _with_experts(model, fastest, prompt_experts(model, trials or known, "transformers"), run), fastest


def _runner_of(
    kind: str,
    model: Any,
    drafter: str | Path | None,
    dtype: torch.dtype,
    prompts: Mapping[str, Sequence[list[int]]],
    num_new_tokens: int,
) -> tuple[Callable[[list[int], int], Sample], str]:
    """How to run a contestant, and what to call it."""
    if kind == "transformers":
        return transformers_runner(model), "generate, dynamic cache"
    if kind == "assisted":
        assert drafter is not None
        loaded = load_drafter(drafter)
        assistant = to_transformers(loaded.to(dtype), model)
        options = {"assistant_model": assistant, "speculation_type": "dflash"}
        return (
            transformers_runner(model, options, num_proposals=loaded.config.num_proposals),
            "DFlash assisted generation, the same drafter",
        )
    return CompiledGenerate(model, prompts, num_new_tokens), "generate, static cache, torch.compile"


class CompiledGenerate:
    """`generate` under `torch.compile`, with a static cache for each set of prompts, as long as its longest text.

    `choose_set` says whose prompts come; `enter_set` says it too, and compiles for them when it does so first.
    """

    def __init__(self, model: Any, prompts: Mapping[str, Sequence[list[int]]], num_new_tokens: int) -> None:
        from transformers import CompileConfig, StaticCache

        config = CompileConfig()
        if model.device.type == "cpu":
            # CUDA graphs are what the default mode is for; and transformers compiles on a CPU only when told so.
            config.mode = "default"
            config._compile_all_devices = True  # type: ignore[assignment]
        self._prompts, self._num_new_tokens = prompts, num_new_tokens
        lengths = {name: max(map(len, group)) + num_new_tokens for name, group in prompts.items()}
        caches = {length: StaticCache(config=model.config, max_cache_len=length) for length in set(lengths.values())}
        self.caches = {name: caches[length] for name, length in lengths.items()}
        self._generate = {
            name: transformers_runner(model, {"past_key_values": cache, "compile_config": config})
            for name, cache in self.caches.items()
        }
        # Past its limit the compiler silently leaves a function uncompiled; every length is one more of each.
        self._recompile_limit = torch._dynamo.config.recompile_limit * len(caches)
        self._set_name = next(iter(prompts))
        self._has_buffers, self._is_compiled = set[int](), set[str]()

    def choose_set(self, name: str) -> None:
        """The next prompts are of the set `name`."""
        self._set_name, cache = name, self.caches[name]
        if id(cache) in self._has_buffers:
            return
        self(self._prompts[name][0][:1], 1)  # a prefill, which is not compiled, makes the buffers
        for layer in cache.layers:
            for buffer in (getattr(layer, "keys", None), getattr(layer, "values", None)):
                if buffer is not None:
                    # Or a second length would make the compiler write slower code, for any length.
                    torch._dynamo.mark_static(buffer)
        self._has_buffers.add(id(cache))

    def enter_set(self, name: str) -> None:
        """`choose_set`; for the first time it also runs the shortest and the longest prompt of the set.

        A layer with a window is other code once its window is full: between them these texts see both, if any does.
        """
        self.choose_set(name)
        if name not in self._is_compiled:
            for prompt in (min(self._prompts[name], key=len), max(self._prompts[name], key=len)):
                self(prompt, self._num_new_tokens)
            self._is_compiled.add(name)

    def __call__(self, prompt: list[int], num_new_tokens: int) -> Sample:
        """One text."""
        self.caches[self._set_name].reset()
        with torch._dynamo.config.patch(recompile_limit=self._recompile_limit):
            return self._generate[self._set_name](prompt, num_new_tokens)


def refuse_broken_logits(model: Any, prompt: list[int]) -> None:
    """Raises ValueError when the model's logits are NaN: its argmax would be some token all the same."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt], device=model.device)).logits[0, -1]
    if not torch.isfinite(logits).all():
        raise ValueError("its logits are NaN; the checkpoint is broken or its dtype overflows")


def try_experts_implementations(
    model: Any,
    prompt: list[int],
    run: Callable[[list[int], int], Sample] | None = None,
    implementations: Sequence[str] | None = None,
    num_tokens: int = TRIAL_TOKENS,
    label: str = NAMES["transformers"],
) -> tuple[dict[str, float], list[Unavailable]]:
    """Decode seconds a token, the best of a few texts, of each experts implementation; those that fail, and why.

    `run` is plain `generate` if it is not given, `implementations` all there are; `label` names those that fail.
    """
    seconds_per_token: dict[str, float] = {}
    unavailable = []
    run = run or transformers_runner(model)
    for name in EXPERTS_IMPLEMENTATIONS if implementations is None else implementations:
        try:
            with experts(model, name):
                run(prompt, 2)
                samples = [run(prompt, num_tokens) for _ in range(TRIAL_REPEATS)]
        except PEER_ERRORS as error:
            unavailable.append(Unavailable(name=f"{label} ({name} experts)", reason=one_line(error)))
        else:
            # The race compares decode rates, and an implementation fast on a prompt need not be fast on one token.
            seconds_per_token[name] = min(
                (sample.total_seconds - sample.first_token_seconds) / (len(sample.tokens) - 1) for sample in samples
            )
    return seconds_per_token, unavailable


@contextmanager
def experts(model: Any, decoding: str, prompt: str | None = None) -> Iterator[None]:
    """Calls of `generate` inside decode with the experts implementation `decoding` and prefill with `prompt`.

    None: with the same. This is what `generate` does on GPUs, where it decodes models of grouped_mm with batched_mm:
    its own switch is replaced, so that what is measured is what is named. Raises ValueError for an implementation that
    the model does not have.
    """
    model.set_experts_implementation(prompt or decoding)

    @contextmanager
    def switched() -> Iterator[None]:
        model.set_experts_implementation(decoding)
        try:
            yield
        finally:
            model.set_experts_implementation(prompt or decoding)

    setattr(model, _SWITCH, switched)
    try:
        yield
    finally:
        delattr(model, _SWITCH)


def prompt_experts(model: Any, trials: Mapping[str, float], kind: str) -> str | None:
    """The implementation for prompts beside the fastest decoder of `trials`: transformers' own choice, where it runs.

    None where `generate` does not switch: on a CPU, in assisted generation, and in versions of transformers without it.
    """
    has_switch = kind != "assisted" and hasattr(type(model), _SWITCH) and model.device.type != "cpu"
    return PROMPT_EXPERTS if has_switch and PROMPT_EXPERTS in trials else None


def _with_experts(model: Any, decoding: str, prompt: str | None, run: Callable[P, T]) -> Callable[P, T]:
    """`run` with experts implementations of its own: contestants share the model."""

    def run_with(*arguments: P.args, **options: P.kwargs) -> T:
        with experts(model, decoding, prompt):
            return run(*arguments, **options)

    return run_with


def transformers_runner(
    model: Any, options: dict[str, Any] | None = None, num_proposals: int | None = None
) -> Callable[[list[int], int], Sample]:
    """Calls of `generate` with `options`; `num_proposals` a round where it speculates."""

    def run(prompt: list[int], num_new_tokens: int) -> Sample:
        ids = torch.tensor([prompt], device=model.device)
        clock = ArrivalClock()
        started = time.perf_counter()
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_new_tokens,
            do_sample=False,
            streamer=clock,
            **(options or {}),
        )
        tokens = output[0, len(prompt) :].tolist()  # reading the values waits for the device
        total_seconds = time.perf_counter() - started
        return Sample(
            tokens=tokens,
            arrivals=[(moment - started, count) for moment, count in clock.arrivals],
            total_seconds=total_seconds,
            rounds=None if num_proposals is None else rounds_of(clock.arrivals, num_new_tokens, num_proposals),
        )

    return run


def transformers_batch_runner(model: Any) -> Callable[[list[list[int]], int], list[Sample]]:
    """Calls of `generate` with several prompts, the shorter ones padded on the left."""

    def run(prompts: list[list[int]], num_new_tokens: int) -> list[Sample]:
        length = max(map(len, prompts))
        ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts], device=model.device)
        mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        clock = ArrivalClock()
        started = time.perf_counter()
        output = model.generate(
            ids,
            attention_mask=mask.to(model.device),
            max_new_tokens=num_new_tokens,
            do_sample=False,
            streamer=clock,
        )
        tokens = output[:, length:].tolist()  # reading the values waits for the device
        total_seconds = time.perf_counter() - started
        arrivals = [(moment - started, count // len(prompts)) for moment, count in clock.arrivals]
        return [Sample(tokens=one, arrivals=arrivals, total_seconds=total_seconds) for one in tokens]

    return run


def rounds_of(arrivals: Sequence[tuple[float, int]], num_new_tokens: int, num_proposals: int) -> GenerationStats:
    """Counts of a foreign decoder that verifies chains of `num_proposals`, from how many tokens came together.

    As our engine counts: proposals that the length of the text would cut off are not proposed.
    """
    stats = GenerationStats(
        num_new_tokens=num_new_tokens,
        drafted_by_position=[0] * num_proposals,
        accepted_by_position=[0] * num_proposals,
    )
    num_left = num_new_tokens - arrivals[0][1]
    for _, count in arrivals[1:]:
        proposed = min(num_proposals, num_left - 1)
        stats.num_rounds += 1
        stats.num_round_tokens += count
        stats.num_rows += 1 + proposed
        stats.num_drafted += num_proposals
        for i in range(proposed):
            stats.drafted_by_position[i] += 1
            stats.accepted_by_position[i] += i < count - 1
        num_left -= count
    return stats
