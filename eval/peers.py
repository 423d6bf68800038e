"""Who runs in a timing: our engine with and without speculation, and the peers that are asked for and there.

All decode the same token ids greedily in one dtype, with one thread count, one sequence at a time, past end-of-text
tokens, as many tokens as the next one. Peers are set up as their own documentation would; those that are not installed,
or cannot run the model, are named with the reason. In float32 engines differ by rounding alone, which decides no argmax
but a near tie: there transformers' `generate` is promised to say the same, and the others are compared.

Repeats are interleaved, so everybody is in memory at once. What is held of the target's weights at most: one copy for
all of ours, which share a `LoadedTarget` (with a drafter two, where the `cpu` backend arranges them for its kernels);
one transformers model for its three ways, experts unpacked; one for each of vLLM's two instances; one of llama.cpp.
While ours are built, the copy that the `cpu` backend arranges is there too.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from speedstack.eval.acceptance import acceptance_result
from speedstack.eval.energy import EnergyCounter
from speedstack.eval.environment import describe_environment
from speedstack.eval.peer_llama_cpp import llama_cpp_contestants
from speedstack.eval.peer_transformers import NAMES, transformers_contestants
from speedstack.eval.peer_vllm import vllm_contestants
from speedstack.eval.prompts import PromptSet
from speedstack.eval.results import AcceptanceResult, SetTiming, TimingResult, Unavailable
from speedstack.eval.timing import Contestant, Sample, Standings, race
from speedstack.eval.timing_result import ENGINE, ENGINE_DRAFTER
from speedstack.runtime import DraftStrategy, Engine
from speedstack.runtime.strategy import NGRAM
from speedstack.runtime.target import load_target
from speedstack.runtime.weights import packed_parts

ENGINE_WHOLE_BLOCKS = "engine + drafter, whole blocks"
ENGINE_LOOK_UP = "engine + look-up"
TRANSFORMERS, TRANSFORMERS_DRAFTER, TRANSFORMERS_COMPILED = NAMES.values()

Peer = Literal["transformers", "assisted", "compiled", "vllm", "llama.cpp"]
OnResult = Callable[[TimingResult, AcceptanceResult | None], None]


@dataclass(frozen=True)
class TimingSettings:
    """How long, how often, and against whom. `dtype` names the dtype of all contestants: "float32" or "bfloat16".

    `look_up` adds our prompt look-up; `gguf` is the file that llama.cpp reads; `gpu_hour_usd` the price of an hour of
    this machine; `seed` is of the orders in which contestants run.
    """

    num_new_tokens: int = 128
    num_repeats: int = 5
    dtype: str = "float32"
    device: str = "cpu"
    backend: Literal["auto", "reference", "cpu", "graph", "resident"] = "auto"
    peers: tuple[Peer, ...] = ("transformers", "assisted")
    look_up: bool = False
    num_warmups: int = 1
    gguf: Path | None = None
    gpu_hour_usd: float | None = None
    seed: int = 0


def measure_timing(
    target: str | Path,
    drafter: str | Path | None,
    prompt_sets: Sequence[PromptSet],
    settings: TimingSettings | None = None,
    on_result: OnResult | None = None,
    progress: bool = True,
) -> TimingResult:
    """Race the engine against its peers on the checkpoint `target`, with and without `drafter`.

    `on_result` gets what is finished after every set of every repeat, with the acceptance of whole blocks. Raises
    ValueError for a dtype that is neither float32 nor bfloat16, when our engine cannot run the model, its logits are
    not numbers say, and as `race` and the loaders do.
    """
    settings = settings or TimingSettings()
    if settings.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype is {settings.dtype!r}: use 'float32' or 'bfloat16'")
    dtype = getattr(torch, settings.dtype)
    names = [entry.name for entry in prompt_sets]
    if len(set(names)) < len(names):
        raise ValueError(f"two sets of prompts have one name: {', '.join(names)}")
    prompts = {entry.name: entry.prompts for entry in prompt_sets}
    if not prompts or not all(prompts.values()):
        raise ValueError("a timing needs prompts, in every set")
    every_prompt = [prompt for group in prompts.values() for prompt in group]
    max_length = max(map(len, every_prompt)) + settings.num_new_tokens
    ours, identity = engine_contestants(target, drafter, dtype, settings, max_length)
    peers, unavailable = peer_contestants(target, drafter, dtype, settings, prompts)
    environment = describe_environment()
    with EnergyCounter(settings.device) as energy:

        def result(standings: Standings) -> TimingResult:
            return TimingResult(
                device=settings.device,
                dtype=settings.dtype,
                num_threads=torch.get_num_threads(),
                num_prompts=len(every_prompt),
                num_prompt_tokens=tuple(map(len, every_prompt)),
                num_new_tokens=settings.num_new_tokens,
                num_repeats=settings.num_repeats,
                contestants=standings.overall,
                sets=tuple(
                    SetTiming(
                        name=entry.name,
                        source=entry.source,
                        num_prompt_tokens=tuple(map(len, entry.prompts)),
                        contestants=standings.sets[entry.name],
                    )
                    for entry in prompt_sets
                ),
                unavailable=(*unavailable, *standings.unavailable),
                seed=settings.seed,
                gpu_hour_usd=settings.gpu_hour_usd,
                energy=energy.description,
                notes=tuple(note for entry in prompt_sets for note in entry.notes),
                environment=environment,
                **identity,
            )

        def on_standings(standings: Standings) -> None:
            if on_result is not None:
                rounds = standings.rounds.get(ENGINE_WHOLE_BLOCKS)
                accepted = acceptance_result(rounds, DraftStrategy(), settings.num_new_tokens) if rounds else None
                on_result(result(standings), accepted)

        finished = result(
            race(
                [*ours, *peers],
                prompts,
                settings.num_new_tokens,
                settings.num_repeats,
                settings.num_warmups,
                settings.seed,
                energy,
                settings.gpu_hour_usd,
                on_standings,
                progress,
            )
        )
    failed = next((entry for entry in finished.unavailable if entry.name == ENGINE), None)
    if failed is not None:
        raise ValueError(f"{ENGINE} cannot decode this model: {failed.reason}")
    return finished


def engine_contestants(
    target: str | Path,
    drafter: str | Path | None,
    dtype: torch.dtype,
    settings: TimingSettings,
    max_length: int,
) -> tuple[list[Contestant], dict[str, str | None]]:
    """Our engine without and with speculation, all of which promise the first one's tokens; and what is timed.

    One engine has no drafter: it decodes plainly and with look-up. Another has the drafter, whose context it writes in
    every step. They change how they speculate before a call.
    """
    started = time.perf_counter()
    loaded = load_target(target, settings.device, dtype)
    load_seconds = time.perf_counter() - started

    def make(with_drafter: str | Path | None) -> tuple[Engine, float]:
        """An engine, and what it took until it can be called, the common load included."""
        started = time.perf_counter()
        engine = Engine.from_target(loaded, with_drafter, settings.backend, max_length, max_batch_size=1)
        return engine, load_seconds + time.perf_counter() - started

    plain, plain_seconds = make(None)
    identity = {"target": str(target), "target_sha256": plain.target_sha256}
    packed = "".join(f", {part}" for part in packed_parts(plain.memory_bytes()))
    backend = f"speedstack Engine, {plain.backend_name} backend{packed}"
    contestants = [
        Contestant(
            name=ENGINE,
            description=f"{backend}, one token a step",
            run=engine_runner(plain, lambda: plain.set_drafter(None), speculates=False),
            prepare_seconds=plain_seconds,
        )
    ]
    ways: list[tuple[str, Engine, float, Callable[[], None], str]] = []
    adaptive = DraftStrategy("adaptive")
    if drafter is not None:
        drafting, drafting_seconds = make(drafter)
        identity |= {"drafter": str(drafter), "drafter_sha256": drafting.drafter_sha256}
        ways += [
            (
                ENGINE_DRAFTER,
                drafting,
                drafting_seconds,
                lambda: drafting.set_strategy(adaptive),
                "DFlash drafter, as many drafts as pay",
            ),
            (
                ENGINE_WHOLE_BLOCKS,
                drafting,
                drafting_seconds,
                lambda: drafting.set_strategy(DraftStrategy()),
                "DFlash drafter, every block verified whole",
            ),
        ]
    if settings.look_up:

        def look_up() -> None:
            plain.set_drafter(NGRAM)
            plain.set_strategy(adaptive)

        ways.append((ENGINE_LOOK_UP, plain, plain_seconds, look_up, "prompt look-up, as many as pay"))
    contestants += [
        Contestant(
            name=name,
            description=f"{backend}, {what}",
            run=engine_runner(engine, prepare, speculates=True),
            prepare_seconds=seconds,
            identical_to=ENGINE,
            identity_promised=True,
        )
        for name, engine, seconds, prepare, what in ways
    ]
    return contestants, identity


def peer_contestants(
    target: str | Path,
    drafter: str | Path | None,
    dtype: torch.dtype,
    settings: TimingSettings,
    prompts: Mapping[str, Sequence[list[int]]],
) -> tuple[list[Contestant], list[Unavailable]]:
    """The peers of `settings` that can be set up for these sets of prompts, and the others with the reason."""
    contestants: list[Contestant] = []
    unavailable: list[Unavailable] = []
    wanted = settings.peers
    kinds = [kind for kind in ("transformers", "assisted", "compiled") if kind in wanted]
    num_new_tokens = settings.num_new_tokens
    max_length = max(len(prompt) for group in prompts.values() for prompt in group) + num_new_tokens
    if drafter is None and "assisted" in kinds:
        kinds.remove("assisted")
        unavailable.append(Unavailable(name=TRANSFORMERS_DRAFTER, reason="no drafter: give --drafter DIR"))
    found: list[tuple[list[Contestant], list[Unavailable]]] = []
    if kinds:
        found.append(
            transformers_contestants(target, drafter, dtype, settings.device, kinds, prompts, num_new_tokens, ENGINE)
        )
    if "vllm" in wanted:
        found.append(vllm_contestants(target, drafter, dtype, settings.device, max_length, ENGINE))
    if "llama.cpp" in wanted:
        found.append(llama_cpp_contestants(settings.gguf, settings.device, max_length, ENGINE))
    for here, absent in found:
        contestants += here
        unavailable += absent
    return contestants, unavailable


def engine_runner(engine: Engine, prepare: Callable[[], None], speculates: bool) -> Callable[[list[int], int], Sample]:
    """Calls of `generate`, each after `prepare`; only one that speculates has rounds to count."""

    def run(prompt: list[int], num_new_tokens: int) -> Sample:
        prepare()
        started = time.perf_counter()
        generation = engine.generate(prompt, max_new_tokens=num_new_tokens, ignore_eos=True)
        total_seconds = time.perf_counter() - started
        return Sample(
            tokens=generation.tokens,
            arrivals=[(moment - started, count) for moment, count in generation.stats.arrivals],
            total_seconds=total_seconds,
            rounds=generation.stats if speculates else None,
        )

    return run
