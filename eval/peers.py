"""The contestants of a timing run: our engine with and without drafter, and transformers with and without the same one.

Peers are set up as their own documentation would: transformers' `generate` with its dynamic cache, its fastest experts
implementation for this model (tried out first), no tokens' scores kept; its DFlash assisted generation with the very
same drafter weights. All decode greedily in one dtype, with one thread count, past end-of-text tokens.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from speedstack.dflash.checkpoint import load_drafter
from speedstack.dflash.hf import to_transformers
from speedstack.eval.environment import describe_environment
from speedstack.eval.results import TimingResult, Unavailable
from speedstack.eval.timing import PEER_ERRORS, Contestant, Sample, one_line, race
from speedstack.quant.checkpoint import load_model
from speedstack.runtime import Engine

ENGINE = "engine"
ENGINE_DRAFTER = "engine + drafter"
ENGINE_WHOLE_BLOCKS = "engine + drafter, whole blocks"
TRANSFORMERS = "transformers"
TRANSFORMERS_DRAFTER = "transformers + drafter"

EXPERTS_IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")
TRIAL_TOKENS = 16
TRIAL_REPEATS = 3


@dataclass(frozen=True)
class TimingSettings:
    """How long and how often. `dtype` names the dtype of all contestants: "float32" or "bfloat16"."""

    num_new_tokens: int = 128
    num_repeats: int = 5
    dtype: str = "float32"
    device: str = "cpu"
    backend: Literal["auto", "reference", "cpu", "graph", "resident"] = "auto"


class FirstTokenClock:
    """A transformers streamer that notes when the first new token came; the prompt is its first `put`."""

    def __init__(self) -> None:
        self.num_puts = 0
        self.first_token_time: float | None = None

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt, then with every piece of new tokens."""
        self.num_puts += 1
        if self.num_puts == 2:
            self.first_token_time = time.perf_counter()

    def end(self) -> None:
        """Called after the last token."""


def measure_timing(
    target: str | Path,
    drafter: str | Path | None,
    prompts: Sequence[list[int]],
    settings: TimingSettings | None = None,
    progress: bool = True,
) -> TimingResult:
    """Race the engine against transformers on the checkpoint `target`, each with and without `drafter`.

    Raises ValueError for a dtype that is neither float32 nor bfloat16, and as `race` and the loaders do.
    """
    settings = settings or TimingSettings()
    if settings.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype is {settings.dtype!r}: use 'float32' or 'bfloat16'")
    dtype = getattr(torch, settings.dtype)
    contestants = engine_contestants(target, drafter, dtype, settings)
    peers, unavailable = transformers_contestants(target, drafter, dtype, settings, prompts[0])
    results, failed = race(
        [*contestants, *peers], prompts, settings.num_new_tokens, settings.num_repeats, progress=progress
    )
    return TimingResult(
        device=settings.device,
        dtype=settings.dtype,
        num_threads=torch.get_num_threads(),
        num_prompts=len(prompts),
        num_prompt_tokens=tuple(len(prompt) for prompt in prompts),
        num_new_tokens=settings.num_new_tokens,
        num_repeats=settings.num_repeats,
        contestants=results,
        unavailable=(*unavailable, *failed),
        environment=describe_environment(),
    )


def engine_contestants(
    target: str | Path, drafter: str | Path | None, dtype: torch.dtype, settings: TimingSettings
) -> list[Contestant]:
    """Our engine without a drafter and, if there is one, with it, twice; both promise the first one's tokens."""
    plain = Engine.from_pretrained(target, backend=settings.backend, device=settings.device, dtype=dtype)
    contestants = [
        Contestant(
            name=ENGINE,
            description=f"speedstack Engine, {plain.backend_name} backend, one token a step",
            run=_engine_runner(plain),
            prepare_seconds=plain.prepare_seconds,
        )
    ]
    if drafter is None:
        return contestants
    for name, num_drafts, what in (
        (ENGINE_DRAFTER, "adaptive", "as many drafts as pay"),
        (ENGINE_WHOLE_BLOCKS, None, "every block verified whole"),
    ):
        drafting = Engine.from_pretrained(
            target,
            drafter,
            backend=settings.backend,
            device=settings.device,
            dtype=dtype,
            num_drafts=num_drafts,  # type: ignore[arg-type]
        )
        contestants.append(
            Contestant(
                name=name,
                description=f"speedstack Engine, {drafting.backend_name} backend, DFlash drafter, {what}",
                run=_engine_runner(drafting),
                prepare_seconds=drafting.prepare_seconds,
                identical_to=ENGINE,
                identity_promised=True,
            )
        )
    return contestants


def transformers_contestants(
    target: str | Path,
    drafter: str | Path | None,
    dtype: torch.dtype,
    settings: TimingSettings,
    trial_prompt: list[int],
) -> tuple[list[Contestant], list[Unavailable]]:
    """transformers' `generate`, and its assisted generation with the same drafter; what cannot be set up, and why."""
    names = [TRANSFORMERS] if drafter is None else [TRANSFORMERS, TRANSFORMERS_DRAFTER]
    started = time.perf_counter()
    try:
        model: Any = load_model(target, dtype=dtype)
        model = model.to(settings.device).eval()
    except PEER_ERRORS as error:
        return [], [Unavailable(name=name, reason=one_line(error)) for name in names]
    load_seconds = time.perf_counter() - started
    trials, unavailable = try_experts_implementations(model, trial_prompt)
    if not trials:
        reason = "none of its experts implementations runs this model"
        return [], [*unavailable, *(Unavailable(name=name, reason=reason) for name in names)]
    fastest = min(trials, key=lambda name: trials[name])
    model.set_experts_implementation(fastest)
    tried = ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in trials.items())
    contestants = [
        Contestant(
            name=TRANSFORMERS,
            description=f"transformers generate, {fastest} experts (tried, ms a decoded token: {tried})",
            run=_transformers_runner(model, assistant=None),
            prepare_seconds=load_seconds,
            identical_to=ENGINE,
            # In float32 the two differ by rounding alone, which decides no argmax but a near tie; in bfloat16 it does.
            identity_promised=dtype == torch.float32,
        )
    ]
    if drafter is not None:
        try:
            assistant = to_transformers(load_drafter(drafter).to(dtype), model)
        except PEER_ERRORS as error:
            unavailable.append(Unavailable(name=TRANSFORMERS_DRAFTER, reason=one_line(error)))
        else:
            contestants.append(
                Contestant(
                    name=TRANSFORMERS_DRAFTER,
                    description=f"transformers DFlash assisted generation, {fastest} experts, the same drafter",
                    run=_transformers_runner(model, assistant=assistant),
                    prepare_seconds=load_seconds,
                    identical_to=TRANSFORMERS,
                )
            )
    return contestants, unavailable


def try_experts_implementations(model: Any, prompt: list[int]) -> tuple[dict[str, float], list[Unavailable]]:
    """Decode seconds a token, the best of a few texts, of each experts implementation; those that fail, and why."""
    seconds_per_token: dict[str, float] = {}
    unavailable = []
    run = _transformers_runner(model, assistant=None)
    for name in EXPERTS_IMPLEMENTATIONS:
        try:
            model.set_experts_implementation(name)
            run(prompt, 2)
            samples = [run(prompt, TRIAL_TOKENS) for _ in range(TRIAL_REPEATS)]
        except PEER_ERRORS as error:
            unavailable.append(Unavailable(name=f"{TRANSFORMERS} ({name} experts)", reason=one_line(error)))
        else:
            # The race compares decode rates, and an implementation fast on a prompt need not be fast on one token.
            seconds_per_token[name] = min(
                (sample.total_seconds - sample.first_token_seconds) / (len(sample.tokens) - 1) for sample in samples
            )
    return seconds_per_token, unavailable


def _engine_runner(engine: Engine) -> Callable[[list[int], int], Sample]:
    def run(prompt: list[int], num_new_tokens: int) -> Sample:
        started = time.perf_counter()
        generation = engine.generate(prompt, max_new_tokens=num_new_tokens, ignore_eos=True)
        total_seconds = time.perf_counter() - started
        return Sample(
            tokens=generation.tokens,
            first_token_seconds=min(generation.stats.prefill_seconds, total_seconds),
            total_seconds=total_seconds,
            num_rounds=generation.stats.num_rounds if engine.num_drafts else None,
        )

    return run


def _transformers_runner(model: Any, assistant: Any) -> Callable[[list[int], int], Sample]:
    # Otherwise the model's own end-of-text id would end a text early.
    model.generation_config.eos_token_id = None
    options: dict[str, Any] = {}
    if assistant is not None:
        options = {"assistant_model": assistant, "speculation_type": "dflash"}

    def run(prompt: list[int], num_new_tokens: int) -> Sample:
        ids = torch.tensor([prompt], device=model.device)
        clock = FirstTokenClock()
        num_passes = 0

        def count_pass(*_: object) -> None:
            nonlocal num_passes
            num_passes += 1

        with model.register_forward_hook(count_pass):
            started = time.perf_counter()
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_new_tokens,
                do_sample=False,
                streamer=clock,
                **options,
            )
            tokens = output[0, len(prompt) :].tolist()  # reading the values waits for the device
            finished = time.perf_counter()
        first_token_time = clock.first_token_time if clock.first_token_time is not None else finished
        return Sample(
            tokens=tokens,
            first_token_seconds=first_token_time - started,
            total_seconds=finished - started,
            # The prompt's pass is no decode round.
            num_rounds=num_passes - 1 if assistant is not None else None,
        )

    return run
