"""A fair race: several ways of generating from the same model, in one process, repeats interleaved.

Interleaving spreads a machine's drift (heat, neighbours) over all contestants instead of onto the last one. Each prompt
of each repeat draws its own order, so that none always runs behind the same other one, whose caches and heat it would
inherit; the draw is seeded, the same race has the same order. Every contestant warms up on the first prompt of every
set; that time is reported apart, like compilation. Medians come with quartiles and extremes: a reader sees what noise
there was. A set may be decoded several sequences at once: then a call has as many prompts. What is timed is said in
`speedstack.eval.results.speed`.

Repeats go over all sets of prompts in turn, and the standings after each set are handed out, so that whatever ends the
process leaves what was finished. A contestant that fails leaves the set it failed on, with its reason; its other sets
and its finished repeats stand. Who runs is in `eval.speed.contestants`; this file only knows that a contestant turns a
prompt into tokens and times.
"""

import logging
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from speedstack.eval.results.failures import PEER_ERRORS, one_line
from speedstack.eval.results.schema import Spread, Unavailable
from speedstack.eval.results.speed import ContestantTiming, Identity, TokenTimes
from speedstack.eval.results.spread import spread_fields
from speedstack.eval.speed.acceptance import summarize_stats
from speedstack.eval.speed.contestant import Call, Contestant, Sample
from speedstack.eval.speed.energy import EnergyCounter
from speedstack.runtime import GenerationStats

logger = logging.getLogger(__name__)

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Standings:
    """The race so far: over all prompts, by set of prompts, and who could not run.

    `overall` leaves out sets of larger batches than the smallest: their rates are another matter.
    `rounds` are the counts of every contestant that speculates, by set: of one repeat, as greedy text repeats itself.
    """

    overall: tuple[ContestantTiming, ...]
    sets: dict[str, tuple[ContestantTiming, ...]]
    unavailable: tuple[Unavailable, ...]
    rounds: dict[str, dict[str, list[GenerationStats]]]


@dataclass
class _Lane:
    """One contestant's record while the race runs: `calls[set][repeat][batch]`, of the sets it is still in."""

    contestant: Contestant
    warmup_seconds: float = 0.0
    enter_seconds: float = 0.0
    calls: dict[str, list[list[Call]]] = field(default_factory=dict)
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
    batch_sizes: Mapping[str, int] | None = None,
) -> Standings:
    """Times of every contestant on every set, and those that could not run with the reason.

    `seed` is of the orders they run in; `on_standings` is called after every set of every repeat. `batch_sizes` says
    for a set how many of its prompts, in turn, are decoded at once; 1 where it says nothing. Raises ValueError for no
    prompts, fewer than 2 new tokens, no repeat, or prompts that do not fill batches. A broken promise of identical
    tokens is logged as an error and stands in the result's `identity`.
    """
    if not prompt_sets or not all(prompt_sets.values()) or num_new_tokens < 2 or min(num_repeats, num_warmups) < 1:
        raise ValueError(
            f"a race needs a prompt in every set, 2 new tokens, 1 repeat and 1 warm-up; got "
            f"{[len(prompts) for prompts in prompt_sets.values()]}, {num_new_tokens}, {num_repeats} and {num_warmups}"
        )
    batches = {name: batched(name, prompts, (batch_sizes or {}).get(name, 1)) for name, prompts in prompt_sets.items()}
    running = _Race([_Lane(contestant) for contestant in contestants], batches, num_new_tokens, energy)
    num_calls = sum(map(len, batches.values()))
    total = len(contestants) * (num_warmups * len(prompt_sets) + num_repeats * num_calls)
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


def batched(name: str, prompts: Sequence[list[int]], batch_size: int) -> list[list[list[int]]]:
    """The prompts of the set `name` in batches. Raises ValueError when the last one would not be full."""
    if len(prompts) % batch_size:
        raise ValueError(
            f"{name} has {len(prompts)} prompts, which do not fill batches of {batch_size}: ask for a multiple of it"
        )
    return [list(prompts[start : start + batch_size]) for start in range(0, len(prompts), batch_size)]


def spread(values: Sequence[float]) -> Spread:
    """`spread_fields` of at least one value, as results hold them."""
    return Spread(**spread_fields(values))


class _Race:
    """Runs calls and keeps what they gave. `batches[set]` are the prompts of each call."""

    def __init__(
        self,
        lanes: list[_Lane],
        batches: Mapping[str, list[list[list[int]]]],
        num_new_tokens: int,
        energy: EnergyCounter | None,
    ) -> None:
        self.lanes, self.batches, self.num_new_tokens, self.energy = lanes, batches, num_new_tokens, energy
        self.unavailable: list[Unavailable] = []
        self.bar: tqdm = tqdm(disable=True)

    def warm_up(self, num_warmups: int) -> None:
        """The first prompts of every set, most tokens first: whoever sizes buffers by what it has seen does so once."""
        names = sorted(self.batches, key=lambda name: sum(map(len, self.batches[name][0])), reverse=True)
        for lane in self.lanes:
            for name in names:
                for _ in range(num_warmups):
                    lane.enter_seconds = 0.0
                    call = self._call(lane, name, self.batches[name][0])
                    lane.warmup_seconds += lane.enter_seconds + (call.total_seconds if call is not None else 0.0)

    def repeat(self, name: str, orders: random.Random) -> None:
        """Every prompt of a set once by everybody."""
        for lane in self.lanes:
            lane.calls.setdefault(name, []).append([])
        for batch in self.batches[name]:
            for lane in orders.sample(self.lanes, len(self.lanes)):
                call = self._call(lane, name, batch)
                if call is not None:
                    lane.calls[name][-1].append(call)

    def standings(self, gpu_hour_usd: float | None) -> Standings:
        """Of whole repeats alone: of a set, and over the sets of the smallest batch of those that went through each."""
        by_set = {
            name: {lane.contestant.name: calls for lane in self.lanes if (calls := self._whole(lane, name))}
            for name in self.batches
        }
        sizes = {name: len(batches[0]) for name, batches in self.batches.items()}
        smallest = [name for name, size in sizes.items() if size == min(sizes.values())]
        merged: dict[str, list[list[Call]]] = {}
        for lane in self.lanes:
            sets = [by_set[name].get(lane.contestant.name, []) for name in smallest]
            if all(sets):
                merged[lane.contestant.name] = [[c for one in parts for c in one] for parts in zip(*sets, strict=False)]
        labels = {name: _labels(name, batches, len(self.batches) > 1) for name, batches in self.batches.items()}
        every_label = [label for name in smallest for label in labels[name]]

        def summaries(calls: dict[str, list[list[Call]]], prompts: list[str]) -> Iterator[ContestantTiming]:
            for lane in self.lanes:
                if lane.contestant.name in calls:
                    yield _summarize(lane, calls, prompts, gpu_hour_usd)

        return Standings(
            overall=tuple(summaries(merged, every_label)),
            sets={name: tuple(summaries(calls, labels[name])) for name, calls in by_set.items()},
            unavailable=tuple(self.unavailable),
            rounds=self._rounds(by_set),
        )

    def _whole(self, lane: _Lane, name: str) -> list[list[Call]]:
        num_calls = len(self.batches[name])
        return [calls for calls in lane.calls.get(name, []) if len(calls) == num_calls]

    def _rounds(self, by_set: dict[str, dict[str, list[list[Call]]]]) -> dict[str, dict[str, list[GenerationStats]]]:
        found: dict[str, dict[str, list[GenerationStats]]] = {}
        for name, calls in by_set.items():
            for contestant, repeats in calls.items():
                if stats := _counts(repeats[0]):
                    found.setdefault(contestant, {})[name] = stats
        return found

    def _call(self, lane: _Lane, name: str, prompts: list[list[int]]) -> Call | None:
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
            samples = _run(lane.contestant, prompts, self.num_new_tokens)
        except PEER_ERRORS as error:
            reason = one_line(error)
        else:
            after = self.energy.joules() if self.energy is not None else None
            made = min(len(sample.tokens) for sample in samples)
            if made == self.num_new_tokens == max(len(sample.tokens) for sample in samples):
                used = after - before if after is not None and before is not None else None
                return Call(samples, sum(map(len, prompts)), used)
            reason = f"made {made} tokens of {self.num_new_tokens}"
        reason = f"{name}: {reason}" if len(self.batches) > 1 else reason
        logger.warning("%s left the timing: %s", lane.contestant.name, reason)
        self.unavailable.append(Unavailable(name=lane.contestant.name, reason=reason))
        lane.left.add(name)
        return None


def _run(contestant: Contestant, prompts: list[list[int]], num_new_tokens: int) -> list[Sample]:
    if len(prompts) == 1:
        return [contestant.run(prompts[0], num_new_tokens)]
    if contestant.run_batch is None:
        raise ValueError("it decodes one sequence at a time")
    return contestant.run_batch(prompts, num_new_tokens)


def _labels(name: str, batches: list[list[list[int]]], are_several: bool) -> list[str]:
    """How a difference names a prompt."""
    prefix = f"{name} " if are_several else ""
    return [f"{prefix}prompt {index + 1}" for index in range(sum(map(len, batches)))]


def _summarize(
    lane: _Lane, calls: Mapping[str, list[list[Call]]], labels: list[str], gpu_hour_usd: float | None
) -> ContestantTiming:
    """Rates are sums over a repeat's calls, so that long and short prompts weigh by their tokens."""
    repeats = calls[lane.contestant.name]
    decode_rates, rates, prompt_rates, first_token_seconds, joules = [], [], [], [], []
    for one in repeats:
        total_seconds = sum(call.total_seconds for call in one)
        first_seconds = sum(call.first_token_seconds for call in one)
        num_tokens = sum(call.num_tokens for call in one)
        num_first = sum(call.num_first_tokens for call in one)
        # A clock that does not advance between two tokens would divide by zero.
        decode_rates.append((num_tokens - num_first) / max(total_seconds - first_seconds, 1e-9))
        rates.append(num_tokens / max(total_seconds, 1e-9))
        prompt_rates.append(sum(call.num_prompt_tokens for call in one) / max(first_seconds, 1e-9))
        first_token_seconds.append(first_seconds / len(one))
        known = [call.joules for call in one if call.joules is not None]
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
        prompt_tokens_per_second=spread(prompt_rates),
        first_token_seconds=spread(first_token_seconds),
        token_ms=_percentiles([[x for sample in _samples(one) for x in sample.token_seconds()] for one in repeats]),
        wait_ms=_percentiles([[x for sample in _samples(one) for x in sample.wait_seconds()] for one in repeats]),
        acceptance_length=accepted.acceptance_length if accepted is not None else None,
        survival=accepted.survival if accepted is not None else (),
        joules_per_token=spread(joules) if joules else None,
        usd_per_million_tokens=None if gpu_hour_usd is None else gpu_hour_usd / 3600 / whole.median * 1e6,
        identity=_compare(lane.contestant, calls, labels),
    )


def _samples(calls: Sequence[Call]) -> list[Sample]:
    """One a prompt, in their order."""
    return [sample for call in calls for sample in call.samples]


def _counts(calls: Sequence[Call]) -> list[GenerationStats]:
    """Of the texts in which a round ran."""
    return [one.rounds for one in _samples(calls) if one.rounds is not None and one.rounds.num_rounds]


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


def _compare(contestant: Contestant, calls: Mapping[str, list[list[Call]]], labels: list[str]) -> Identity | None:
    """Tokens of every prompt in every repeat against the reference's; a prompt counts only if all repeats agree."""
    if contestant.identical_to is None or contestant.identical_to not in calls:
        return None
    mine, reference = ([_samples(one) for one in calls[name]] for name in (contestant.name, contestant.identical_to))
    num_identical = 0
    first_difference = None
    for index, label in enumerate(labels):
        different = None
        # Either may have fewer whole repeats, when it failed later on.
        for ours, theirs in zip(mine, reference, strict=False):
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
