"""A fair race: several ways of generating from the same model, in one process, repeats interleaved.

Interleaving spreads a machine's drift (heat, neighbours) over all contestants instead of onto the last one. Each prompt
of each repeat draws its own order, so that none always runs behind the same other one, whose caches and heat it would
inherit; the draw is seeded, the same race has the same order. Every contestant warms up on the first prompt of every
set; that time is reported apart, like compilation. Medians come with quartiles and extremes: a reader sees what noise
there was. What is timed is said in `speedstack.eval.timing_result`.

Repeats go over all sets of prompts in turn, and the standings after each set are handed out, so that whatever ends the
process leaves what was finished. A contestant that fails leaves the set it failed on, with its reason; its other sets
and its finished repeats stand. Who runs is in `speedstack.eval.peers`; this file only knows that a contestant turns a
prompt into tokens and times.
"""

import logging
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tqdm import tqdm

from speedstack.eval.acceptance import summarize_stats
from speedstack.eval.document import Spread, Unavailable
from speedstack.eval.energy import EnergyCounter
from speedstack.eval.failures import PEER_ERRORS, one_line
from speedstack.eval.spread import spread_fields
from speedstack.eval.timing_result import ContestantTiming, Identity, TokenTimes
from speedstack.runtime import GenerationStats

logger = logging.getLogger(__name__)

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Sample:
    """One timed call. `arrivals` are the seconds from the call at which tokens came, and how many came each time.

    `rounds` are the counts of a contestant that speculates; `joules` are filled in by the race.
    """

    tokens: list[int]
    arrivals: list[tuple[float, int]]
    total_seconds: float
    rounds: GenerationStats | None = None
    joules: float | None = None

    @property
    def first_token_seconds(self) -> float:
        """From the call to the first arrival."""
        return self.arrivals[0][0]

    def token_seconds(self) -> list[float]:
        """Every token's share of the wait for it, those of the first arrival left out."""
        return [wait / count for wait, count in self._waits() for _ in range(count)]

    def wait_seconds(self) -> list[float]:
        """Times between arrivals."""
        return [wait for wait, _ in self._waits()]

    def _waits(self) -> list[tuple[float, int]]:
        pairs = zip(self.arrivals, self.arrivals[1:], strict=False)
        return [(now - before, count) for (before, _), (now, count) in pairs]


@dataclass(frozen=True)
class Contestant:
    """A way of generating: `run(prompt ids, number of new tokens)` decodes greedily, past any end-of-text token.

    `enter_set` is told, before each call, of which set the prompt is: whoever sizes buffers ahead sizes them by a set.
    What it takes is no part of a call's time; in warm-ups it counts as theirs.
    `identical_to` names the contestant whose tokens these must be compared with; `identity_promised` says that a
    difference is a fault, not a rounding.
    """

    name: str
    description: str
    run: Callable[[list[int], int], Sample]
    prepare_seconds: float = 0.0
    enter_set: Callable[[str], None] | None = None
    identical_to: str | None = None
    identity_promised: bool = False


@dataclass(frozen=True)
class Standings:
    """The race so far: over all prompts, by set of prompts, and who could not run.

    `rounds` are the counts of every contestant that speculates, by set: of one repeat, as greedy text repeats itself.
    """

    overall: tuple[ContestantTiming, ...]
    sets: dict[str, tuple[ContestantTiming, ...]]
    unavailable: tuple[Unavailable, ...]
    rounds: dict[str, dict[str, list[GenerationStats]]]


@dataclass
class _Lane:
    """One contestant's record while the race runs: `samples[set][repeat][prompt]`, of the sets it is still in."""

    contestant: Contestant
    warmup_seconds: float = 0.0
    enter_seconds: float = 0.0
    samples: dict[str, list[list[Sample]]] = field(default_factory=dict)
    left: set[str] = field(default_factory=set)


def race(
    contestants: Sequence[Contestant],
    prompt_sets: Mapping[str, Sequence[list[int]]],
    num_new_tokens: int = 128,
    num_repeats: int = 5,
    num_warmups: int = 1,
    seed: int = 0,
    energy: EnergyCounter | None = None,
    gpu_hour_usd: float | None = None,
    on_standings: Callable[[Standings], None] | None = None,
    progress: bool = True,
) -> Standings:
    """Times of every contestant on every set, and those that could not run with the reason.

    `seed` is of the orders they run in; `on_standings` is called after every set of every repeat. Raises ValueError for
    no prompts, fewer than 2 new tokens or no repeat. A broken promise of identical tokens is logged as an error and
    stands in the result's `identity`.
    """
    if not prompt_sets or not all(prompt_sets.values()) or num_new_tokens < 2 or min(num_repeats, num_warmups) < 1:
        raise ValueError(
            f"a race needs a prompt in every set, 2 new tokens, 1 repeat and 1 warm-up; got "
            f"{[len(prompts) for prompts in prompt_sets.values()]}, {num_new_tokens}, {num_repeats} and {num_warmups}"
        )
    running = _Race([_Lane(contestant) for contestant in contestants], prompt_sets, num_new_tokens, energy)
    num_prompts = sum(map(len, prompt_sets.values()))
    total = len(contestants) * (num_warmups * len(prompt_sets) + num_repeats * num_prompts)
    with tqdm(total=total, desc="timing", disable=not progress, dynamic_ncols=True) as running.bar:
        running.warm_up(num_warmups)
        orders = random.Random(seed)
        for _ in range(num_repeats):
            for name in prompt_sets:
                running.repeat(name, orders)
                if on_standings is not None:
                    on_standings(running.standings(gpu_hour_usd))
    standings = running.standings(gpu_hour_usd)
    for entry in standings.overall:
        if entry.identity is not None and entry.identity.is_broken:
            logger.error(
                "%s promised the tokens of %s: %s",
                entry.name,
                entry.identity.reference,
                entry.identity.first_difference,
            )
    return standings


def spread(values: Sequence[float]) -> Spread:
    """`spread_fields` of at least one value, as results hold them."""
    return Spread(**spread_fields(values))


class _Race:
    """Runs calls and keeps what they gave."""

    def __init__(
        self,
        lanes: list[_Lane],
        prompt_sets: Mapping[str, Sequence[list[int]]],
        num_new_tokens: int,
        energy: EnergyCounter | None,
    ) -> None:
        self.lanes, self.prompt_sets, self.num_new_tokens, self.energy = lanes, prompt_sets, num_new_tokens, energy
        self.unavailable: list[Unavailable] = []
        self.bar: tqdm = tqdm(disable=True)

    def warm_up(self, num_warmups: int) -> None:
        """The first prompt of every set, longest first: whoever sizes buffers by what it has seen sizes them once."""
        names = sorted(self.prompt_sets, key=lambda name: len(self.prompt_sets[name][0]), reverse=True)
        for lane in self.lanes:
            for name in names:
                for _ in range(num_warmups):
                    lane.enter_seconds = 0.0
                    sample = self._call(lane, name, self.prompt_sets[name][0])
                    lane.warmup_seconds += lane.enter_seconds + (sample.total_seconds if sample is not None else 0.0)

    def repeat(self, name: str, orders: random.Random) -> None:
        """Every prompt of a set once by everybody."""
        for lane in self.lanes:
            lane.samples.setdefault(name, []).append([])
        for prompt in self.prompt_sets[name]:
            for lane in orders.sample(self.lanes, len(self.lanes)):
                sample = self._call(lane, name, prompt)
                if sample is not None:
                    lane.samples[name][-1].append(sample)

    def standings(self, gpu_hour_usd: float | None) -> Standings:
        """Of whole repeats alone: of a set, and over all sets of those that went through every one."""
        by_set = {
            name: {lane.contestant.name: samples for lane in self.lanes if (samples := self._whole(lane, name))}
            for name in self.prompt_sets
        }
        merged: dict[str, list[list[Sample]]] = {}
        for lane in self.lanes:
            sets = [by_set[name].get(lane.contestant.name, []) for name in self.prompt_sets]
            if all(sets):
                merged[lane.contestant.name] = [[s for one in parts for s in one] for parts in zip(*sets, strict=False)]
        labels = {name: _labels(name, len(prompts), self.prompt_sets) for name, prompts in self.prompt_sets.items()}
        every_label = [label for part in labels.values() for label in part]

        def summaries(samples: dict[str, list[list[Sample]]], prompts: list[str]) -> Iterator[ContestantTiming]:
            for lane in self.lanes:
                if lane.contestant.name in samples:
                    yield _summarize(lane, samples, prompts, gpu_hour_usd)

        return Standings(
            overall=tuple(summaries(merged, every_label)),
            sets={name: tuple(summaries(samples, labels[name])) for name, samples in by_set.items()},
            unavailable=tuple(self.unavailable),
            rounds=self._rounds(by_set),
        )

    def _whole(self, lane: _Lane, name: str) -> list[list[Sample]]:
        num_prompts = len(self.prompt_sets[name])
        return [samples for samples in lane.samples.get(name, []) if len(samples) == num_prompts]

    def _rounds(self, by_set: dict[str, dict[str, list[list[Sample]]]]) -> dict[str, dict[str, list[GenerationStats]]]:
        found: dict[str, dict[str, list[GenerationStats]]] = {}
        for name, samples in by_set.items():
            for contestant, repeats in samples.items():
                if stats := _counts(repeats[0]):
                    found.setdefault(contestant, {})[name] = stats
        return found

    def _call(self, lane: _Lane, name: str, prompt: list[int]) -> Sample | None:
        """One call of `lane`; a lane that fails leaves the set with its reason."""
        self.bar.update()
        if name in lane.left:
            return None
        try:
            if lane.contestant.enter_set is not None:
                started = time.perf_counter()
                lane.contestant.enter_set(name)
                lane.enter_seconds = time.perf_counter() - started
            before = self.energy.joules() if self.energy is not None else None
            sample = lane.contestant.run(prompt, self.num_new_tokens)
        except PEER_ERRORS as error:
            reason = one_line(error)
        else:
            after = self.energy.joules() if self.energy is not None else None
            if len(sample.tokens) == self.num_new_tokens:
                used = after - before if after is not None and before is not None else None
                return replace(sample, joules=used)
            reason = f"made {len(sample.tokens)} tokens of {self.num_new_tokens}"
        reason = f"{name}: {reason}" if len(self.prompt_sets) > 1 else reason
        logger.warning("%s left the timing: %s", lane.contestant.name, reason)
        self.unavailable.append(Unavailable(name=lane.contestant.name, reason=reason))
        lane.left.add(name)
        return None


def _labels(name: str, num_prompts: int, prompt_sets: Mapping[str, Sequence[list[int]]]) -> list[str]:
    """How a difference names a prompt."""
    prefix = f"{name} " if len(prompt_sets) > 1 else ""
    return [f"{prefix}prompt {index + 1}" for index in range(num_prompts)]


def _summarize(
    lane: _Lane, samples: Mapping[str, list[list[Sample]]], labels: list[str], gpu_hour_usd: float | None
) -> ContestantTiming:
    """Rates are sums over a repeat's prompts, so that long and short prompts weigh by their tokens."""
    repeats = samples[lane.contestant.name]
    decode_rates, rates, first_token_seconds, joules = [], [], [], []
    for one in repeats:
        total_seconds = sum(sample.total_seconds for sample in one)
        first_seconds = sum(sample.first_token_seconds for sample in one)
        num_tokens = sum(len(sample.tokens) for sample in one)
        num_first = sum(sample.arrivals[0][1] for sample in one)
        # A clock that does not advance between two tokens would divide by zero.
        decode_rates.append((num_tokens - num_first) / max(total_seconds - first_seconds, 1e-9))
        rates.append(num_tokens / max(total_seconds, 1e-9))
        first_token_seconds.append(first_seconds / len(one))
        known = [sample.joules for sample in one if sample.joules is not None]
        if len(known) == len(one):
            joules.append(sum(known) / num_tokens)
    rounds = _counts(repeats[0])
    accepted = summarize_stats(lane.contestant.name, rounds) if rounds else None
    whole = spread(rates)
    return ContestantTiming(
        name=lane.contestant.name,
        description=lane.contestant.description,
        prepare_seconds=lane.contestant.prepare_seconds,
        warmup_seconds=lane.warmup_seconds,
        decode_tokens_per_second=spread(decode_rates),
        tokens_per_second=whole,
        first_token_seconds=spread(first_token_seconds),
        token_ms=_percentiles([[x for sample in one for x in sample.token_seconds()] for one in repeats]),
        wait_ms=_percentiles([[x for sample in one for x in sample.wait_seconds()] for one in repeats]),
        acceptance_length=accepted.acceptance_length if accepted is not None else None,
        survival=accepted.survival if accepted is not None else (),
        joules_per_token=spread(joules) if joules else None,
        usd_per_million_tokens=None if gpu_hour_usd is None else gpu_hour_usd / 3600 / whole.median * 1e6,
        identity=_compare(lane.contestant, samples, labels),
    )


def _counts(samples: Sequence[Sample]) -> list[GenerationStats]:
    """Of the texts in which a round ran."""
    return [sample.rounds for sample in samples if sample.rounds is not None and sample.rounds.num_rounds]


def _percentiles(seconds: Sequence[Sequence[float]]) -> TokenTimes | None:
    """Percentiles of each repeat's times, in milliseconds; None where nothing arrived after the first tokens."""
    if not all(seconds):
        return None
    found = [
        # 99 cut points, linear between closest ranks; of one value all are that value.
        statistics.quantiles(one, n=100, method="inclusive") if len(one) > 1 else list(one) * 99
        for one in seconds
    ]
    p50, p95, p99 = (spread([1e3 * cuts[p - 1] for cuts in found]) for p in PERCENTILES)
    return TokenTimes(p50=p50, p95=p95, p99=p99)


def _compare(contestant: Contestant, samples: Mapping[str, list[list[Sample]]], labels: list[str]) -> Identity | None:
    """Tokens of every prompt in every repeat against the reference's; a prompt counts only if all repeats agree."""
    if contestant.identical_to is None or contestant.identical_to not in samples:
        return None
    num_identical = 0
    first_difference = None
    for index, label in enumerate(labels):
        different = None
        # Either may have fewer whole repeats, when it failed later on.
        for ours, theirs in zip(samples[contestant.name], samples[contestant.identical_to], strict=False):
            pairs = zip(ours[index].tokens, theirs[index].tokens, strict=True)
            position = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
            if position is not None:
                different = f"{label} differs from token {position + 1} on"
                break
        num_identical += different is None
        first_difference = first_difference or different
    return Identity(
        reference=contestant.identical_to,
        promised=contestant.identity_promised,
        num_identical=num_identical,
        num_prompts=len(labels),
        first_difference=first_difference,
    )
