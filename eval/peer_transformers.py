"""transformers as a peer: `generate`, assisted generation with the same DFlash drafter, and `generate` compiled.

`generate` runs with its dynamic cache and its fastest experts implementation for this model (tried out first), and
keeps no scores. The compiled one is what transformers' documentation calls it: a static cache, and the decoding
forward under `torch.compile`; the cache is as long as the longest text, so that nothing is compiled twice. It tries
experts implementations out as well, compiled, since another one may be fastest then.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from speedstack.dflash.checkpoint import load_drafter
from speedstack.dflash.hf import to_transformers
from speedstack.eval.document import Unavailable
from speedstack.eval.failures import PEER_ERRORS, one_line
from speedstack.eval.timing import Contestant, Sample
from speedstack.quant.checkpoint import load_model
from speedstack.runtime import GenerationStats

NAMES = {
    "transformers": "transformers",
    "assisted": "transformers + drafter",
    "compiled": "transformers, compiled",
}
EXPERTS_IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")
# The third is a loop over experts that the router chose, at which every layer's graph breaks.
COMPILED_EXPERTS = ("grouped_mm", "batched_mm")
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
    trial_prompt: list[int],
    max_length: int,
    reference: str,
) -> tuple[list[Contestant], list[Unavailable]]:
    """Contestants of `kinds` (keys of `NAMES`) that can be set up, and the others with the reason.

    `max_length` is the longest prompt with its answer; `reference` the contestant whose text these must say.
    """
    names = [NAMES[kind] for kind in kinds]
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
            run, what = _runner_of(kind, model, drafter, dtype, max_length)
        except PEER_ERRORS as error:
            unavailable.append(Unavailable(name=NAMES[kind], reason=one_line(error)))
            continue
        trials = plain
        if kind == "compiled":
            num_tokens = min(TRIAL_TOKENS, max_length - len(trial_prompt))
            trials, failed = try_experts_implementations(
                model, trial_prompt, run, COMPILED_EXPERTS, num_tokens, NAMES[kind]
            )
            unavailable += failed
        if not trials:
            reason = "none of its experts implementations runs this model"
            unavailable.append(Unavailable(name=NAMES[kind], reason=reason))
            continue
        fastest = min(trials, key=lambda name: trials[name])
        tried = ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in trials.items())
        contestants.append(
            Contestant(
                name=NAMES[kind],
                description=f"transformers {what}, {fastest} experts (tried, ms a decoded token: {tried})",
                run=_with_experts(model, fastest, run),
                prepare_seconds=load_seconds + time.perf_counter() - started,
                identical_to=reference,
                # In float32 the two differ by rounding alone, which decides no argmax but a near tie; in bfloat16 it
                # does, and so it may where rows are verified together.
                identity_promised=kind == "transformers" and dtype == torch.float32,
            )
        )
    return contestants, unavailable


def _runner_of(
    kind: str, model: Any, drafter: str | Path | None, dtype: torch.dtype, max_length: int
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
    return _compiled_runner(model, max_length), "generate, static cache, torch.compile"


def _compiled_runner(model: Any, max_length: int) -> Callable[[list[int], int], Sample]:
    from transformers import CompileConfig, StaticCache

    config = CompileConfig()
    if model.device.type == "cpu":
        # CUDA graphs are what the default mode is for; and transformers compiles on a CPU only when told so.
        config.mode = "default"
        config._compile_all_devices = True  # type: ignore[assignment]
    cache = StaticCache(config=model.config, max_cache_len=max_length)
    generate = transformers_runner(model, {"past_key_values": cache, "compile_config": config})

    def run(prompt: list[int], num_new_tokens: int) -> Sample:
        cache.reset()
        return generate(prompt, num_new_tokens)

    return run


def refuse_broken_logits(model: Any, prompt: list[int]) -> None:
    """Raises ValueError when the model's logits are not numbers: its argmax would be some token all the same."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt], device=model.device)).logits[0, -1]
    if not torch.isfinite(logits).all():
        raise ValueError("its logits are not numbers; the checkpoint is broken or its dtype overflows")


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
    for name in implementations or EXPERTS_IMPLEMENTATIONS:
        try:
            model.set_experts_implementation(name)
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


def _with_experts(
    model: Any, implementation: str, run: Callable[[list[int], int], Sample]
) -> Callable[[list[int], int], Sample]:
    """`run` with an experts implementation of its own: contestants share the model."""

    def run_with(prompt: list[int], num_new_tokens: int) -> Sample:
        model.set_experts_implementation(implementation)
        return run(prompt, num_new_tokens)

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
