"""Who runs in a timing: our engine with and without speculation, and the peers that are asked for and there.

All decode the same token ids greedily in one dtype, with one thread count, as many sequences at once, past end-of-text
tokens, as many tokens as the next one. Peers are set up as their own documentation would; those that are not installed,
or cannot run the model, are named with the reason. vLLM and llama.cpp run in processes of their own, with interpreters
of their own, and wait there for their turn. In float32 engines differ by rounding alone, which decides no argmax
but a near tie: there transformers' `generate` is promised to say the same, and the others are compared.

Repeats are interleaved, so everybody is in memory at once. What is held of the target's weights at most: one copy for
all of ours, which share a `LoadedTarget` (with a drafter two, where the `cpu` backend arranges them for its kernels);
one transformers model for its three ways, experts unpacked; one for each of vLLM's two instances; one of llama.cpp for
each of its files; one unpacked for ours that is asked for. While ours are built, the copy that the `cpu` backend
arranges is there too.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from speedstack.eval.data.prompts import PromptSet
from speedstack.eval.results.environment import describe_environment
from speedstack.eval.results.failures import PEER_ERRORS, one_line
from speedstack.eval.results.schema import Unavailable
from speedstack.eval.results.speed import ENGINE, ENGINE_DRAFTER, AcceptanceResult, SetTiming, TimingResult
from speedstack.eval.speed.acceptance import acceptance_result
from speedstack.eval.speed.contestant import Contestant, Sample
from speedstack.eval.speed.energy import EnergyCounter
from speedstack.eval.speed.harness import Standings, batched, race
from speedstack.eval.speed.peers.copies import GGUFWeights, PeerCopies
from speedstack.eval.speed.peers.llama_cpp_peer import llama_cpp_contestants
from speedstack.eval.speed.peers.process import peer_python
from speedstack.eval.speed.peers.transformers_peer import NAMES, transformers_contestants
from speedstack.eval.speed.peers.vllm_peer import vllm_contestants
from speedstack.runtime import DraftStrategy, Engine
from speedstack.runtime.model.loading import load_target
from speedstack.runtime.model.weights import packed_parts
from speedstack.runtime.rounds.speculation import NGRAM

ENGINE_WHOLE_BLOCKS = "engine + drafter, whole blocks"
ENGINE_LOOK_UP = "engine + look-up"
ENGINE_UNPACKED = "engine, unpacked experts"
TRANSFORMERS, TRANSFORMERS_DRAFTER, TRANSFORMERS_COMPILED = NAMES.values()

Peer = Literal["transformers", "assisted", "compiled", "vllm", "llama.cpp", "unpacked"]
COPIES = Path("runs/peers")
OnResult = Callable[[TimingResult, AcceptanceResult | None], None]


@dataclass(frozen=True)
class TimingSettings:
    """How long, how often, and against whom. `dtype` names the dtype of all contestants: "float32" or "bfloat16";
    transformers and vLLM may have another one, `peer_dtype`.

    `look_up` adds our prompt lookup; `gpu_hour_usd` is the price of an hour of this machine; `seed` is of the orders
    in which contestants run. Every set of prompts is decoded in batches of each of `batch_sizes`.

    The peer "unpacked" is our own engine on the same values with experts that are not packed. `gguf` is the file that
    llama.cpp reads, or one with each of `gguf_weights` is made in `copies`, where unpacked copies are too. Interpreters
    are those of `peers.process.peer_python` where they are None. `dense_dtype` and `kv_dtype`: our engines', see
    `Engine.from_target`.
    """

    num_new_tokens: int = 128
    num_repeats: int = 5
    dtype: str = "float32"
    device: str = "cpu"
    backend: Literal["auto", "reference", "cpu", "graph", "resident"] = "auto"
    peers: tuple[Peer, ...] = ("transformers", "assisted")
    dense_dtype: Literal["int8"] | None = None
    kv_dtype: Literal["float32", "bfloat16"] | None = None
    look_up: bool = False
    num_warmups: int = 1
    peer_dtype: str | None = None
    batch_sizes: tuple[int, ...] = (1,)
    gguf: Path | None = None
    gguf_weights: tuple[GGUFWeights, ...] = ("f16",)
    copies: Path = COPIES
    vllm_python: Path | None = None
    llama_cpp_python: Path | None = None
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
    ValueError for a dtype that is neither float32 nor bfloat16, when our engine cannot run the model or its logits are
    NaN, and as `race` and the loaders do.
    """
    settings = settings or TimingSettings()
    for name in ("dtype", "peer_dtype"):
        if getattr(settings, name) not in ("float32", "bfloat16", None):
            raise ValueError(f"{name} is {getattr(settings, name)!r}: use 'float32' or 'bfloat16'")
    dtype = getattr(torch, settings.dtype)
    names = [entry.name for entry in prompt_sets]
    if len(set(names)) < len(names):
        raise ValueError(f"two sets of prompts have one name: {', '.join(names)}")
    if not prompt_sets or not all(entry.prompts for entry in prompt_sets):
        raise ValueError("a timing needs prompts, in every set")
    sets = [(entry, size) for size in sorted(set(settings.batch_sizes)) for entry in prompt_sets]
    prompts = {set_name(entry, size): entry.prompts for entry, size in sets}
    batch_sizes = {set_name(entry, size): size for entry, size in sets}
    for entry, size in sets:
        batched(entry.name, entry.prompts, size)
    every_prompt = [prompt for entry in prompt_sets for prompt in entry.prompts]
    max_length = max(map(len, every_prompt)) + settings.num_new_tokens
    with ExitStack() as resources:
        ours, identity = engine_contestants(target, drafter, dtype, settings, max_length)
        peers, unavailable = peer_contestants(target, drafter, dtype, settings, prompts, resources)
        environment = describe_environment()
        energy = resources.enter_context(EnergyCounter(settings.device))

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
                        name=set_name(entry, size),
                        source=entry.source,
                        batch_size=size,
                        num_prompt_tokens=tuple(map(len, entry.prompts)),
                        contestants=standings.sets[set_name(entry, size)],
                    )
                    for entry, size in sets
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
                found, smallest = standings.rounds.get(ENGINE_WHOLE_BLOCKS, {}), min(batch_sizes.values())
                rounds = {name: stats for name, stats in found.items() if batch_sizes[name] == smallest}
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
                batch_sizes,
            )
        )
    failed = next((entry for entry in finished.unavailable if entry.name == ENGINE), None)
    if failed is not None:
        raise ValueError(f"{ENGINE} cannot decode this model: {failed.reason}")
    return finished


def set_name(entry: PromptSet, batch_size: int) -> str:
    """How a race calls a set of prompts that are decoded so many at once."""
    return entry.name if batch_size == 1 else f"{entry.name} x{batch_size}"


def engine_contestants(
    target: str | Path,
    drafter: str | Path | None,
    dtype: torch.dtype,
    settings: TimingSettings,
    max_length: int,
) -> tuple[list[Contestant], dict[str, str | None]]:
    """Our engine without and with speculation, all of which promise the first one's tokens; and what is timed.

    One engine has no drafter: it decodes plainly and with prompt lookup. Another has the drafter, whose context it
    writes in every step. They change how they speculate before a call.
    """
    started = time.perf_counter()
    loaded = load_target(target, settings.device, dtype)
    load_seconds = time.perf_counter() - started

    def make(with_drafter: str | Path | None) -> tuple[Engine, float]:
        """An engine, and what it took until it can be called, the common load included."""
        started = time.perf_counter()
        engine = Engine.from_target(
            loaded,
            with_drafter,
            settings.backend,
            max_length,
            max_batch_size=max(settings.batch_sizes),
            dense_dtype=settings.dense_dtype,
            kv_dtype=settings.kv_dtype,
        )
        return engine, load_seconds + time.perf_counter() - started

    plain, plain_seconds = make(None)
    identity = {"target": str(target), "target_sha256": plain.target_sha256}
    packed = "".join(f", {part}" for part in packed_parts(plain.memory_bytes()))
    held = {"dense layers": settings.dense_dtype, "key/value buffers": settings.kv_dtype}
    options = "".join(f", {part} in {dtype}" for part, dtype in held.items() if dtype is not None)
    backend = f"speedstack Engine, {plain.backend_name} backend{packed}{options}"
    contestants = [
        Contestant(
            name=ENGINE,
            description=f"{backend}, one token a step",
            run=engine_runner(plain, lambda: plain.set_drafter(None), speculates=False),
            run_batch=engine_batch_runner(plain, lambda: plain.set_drafter(None), speculates=False),
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

        ways.append((ENGINE_LOOK_UP, plain, plain_seconds, look_up, "prompt lookup, as many as pay"))
    contestants += [
        Contestant(
            name=name,
            description=f"{backend}, {what}",
            run=engine_runner(engine, prepare, speculates=True),
            run_batch=engine_batch_runner(engine, prepare, speculates=True),
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
    resources: ExitStack,
) -> tuple[list[Contestant], list[Unavailable]]:
    """The peers of `settings` that can be set up for these sets of prompts, and the others with the reason.

    `resources` ends their processes.
    """
    contestants: list[Contestant] = []
    unavailable: list[Unavailable] = []
    wanted, batch_size = settings.peers, max(settings.batch_sizes)
    kinds = [kind for kind in ("transformers", "assisted", "compiled") if kind in wanted]
    num_new_tokens = settings.num_new_tokens
    max_length = max(len(prompt) for group in prompts.values() for prompt in group) + num_new_tokens
    if drafter is None and "assisted" in kinds:
        kinds.remove("assisted")
        unavailable.append(Unavailable(name=TRANSFORMERS_DRAFTER, reason="no drafter: give --drafter DIR"))
    found: list[tuple[list[Contestant], list[Unavailable]]] = []
    theirs = dtype if settings.peer_dtype is None else getattr(torch, settings.peer_dtype)
    if kinds:
        found.append(
            transformers_contestants(
                target, drafter, theirs, settings.device, kinds, prompts, num_new_tokens, ENGINE, batch_size
            )
        )
    copies, device = PeerCopies(target, settings.copies), settings.device
    if "vllm" in wanted:
        python = peer_python(settings.vllm_python)
        found.append(
            vllm_contestants(copies, drafter, python, theirs, device, max_length, batch_size, ENGINE, resources)
        )
    if theirs != dtype:
        found = [([_in_another_dtype(one, theirs) for one in here], absent) for here, absent in found]
    if "llama.cpp" in wanted:
        python, weights = peer_python(settings.llama_cpp_python), settings.gguf_weights
        found.append(
            llama_cpp_contestants(
                copies, settings.gguf, weights, python, device, max_length, batch_size, ENGINE, resources
            )
        )
    if "unpacked" in wanted:
        found.append(unpacked_contestants(copies, dtype, settings, max_length))
    for here, absent in found:
        contestants += here
        unavailable += absent
    return contestants, unavailable


def _in_another_dtype(contestant: Contestant, dtype: torch.dtype) -> Contestant:
    """Rounding decides between near ties then, so that no text is promised."""
    description = f"{contestant.description}, {str(dtype).removeprefix('torch.')}"
    return replace(contestant, description=description, identity_promised=False)


def unpacked_contestants(
    copies: PeerCopies, dtype: torch.dtype, settings: TimingSettings, max_length: int
) -> tuple[list[Contestant], list[Unavailable]]:
    """Our engine on an unpacked copy of a target that is packed, which has the same values; or why not."""
    if not copies.is_packed:
        return [], [Unavailable(name=ENGINE_UNPACKED, reason="the target's experts are not packed")]
    plain = replace(settings, look_up=False)
    try:
        (contestant,), _ = engine_contestants(copies.plain(), None, dtype, plain, max_length)
    except PEER_ERRORS as error:
        return [], [Unavailable(name=ENGINE_UNPACKED, reason=one_line(error))]
    return [replace(contestant, name=ENGINE_UNPACKED, identical_to=ENGINE)], []


def engine_runner(engine: Engine, prepare: Callable[[], None], speculates: bool) -> Callable[[list[int], int], Sample]:
    """Calls of `generate` with one prompt; `engine_batch_runner` says the rest."""
    batch = engine_batch_runner(engine, prepare, speculates)

    def run(prompt: list[int], num_new_tokens: int) -> Sample:
        return batch([prompt], num_new_tokens)[0]

    return run


def engine_batch_runner(
    engine: Engine, prepare: Callable[[], None], speculates: bool
) -> Callable[[list[list[int]], int], list[Sample]]:
    """Calls of `generate`, each after `prepare`; only one that speculates has rounds to count."""

    def run(prompts: list[list[int]], num_new_tokens: int) -> list[Sample]:
        prepare()
        started = time.perf_counter()
        generations = engine.generate(prompts, max_new_tokens=num_new_tokens, ignore_eos=True)
        total_seconds = time.perf_counter() - started
        return [
            Sample(
                tokens=generation.tokens,
                arrivals=[(moment - started, count) for moment, count in generation.stats.arrivals],
                total_seconds=total_seconds,
                rounds=generation.stats if speculates else None,
            )
            for generation in generations
        ]

    return run
