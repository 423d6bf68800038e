"""A fair race: several ways of generating from the same model, in one process, repeats interleaved.

Interleaving spreads a machine's drift (heat, neighbours) over all contestants instead of onto the last one. Each prompt
of each repeat draws its own order, so that none always runs behind the same other one, whose caches and heat it would
inherit; the draw is seeded, the same race has the same order. The first call of each is a warm-up whose time is
reported apart, like compilation. Medians come with quartiles and extremes: a reader sees what noise there was.
Who runs is in `speedstack.eval.peers`; this file only knows that a contestant turns a prompt into tokens and times.
"""

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from speedstack.eval.failures import PEER_ERRORS, one_line
from speedstack.eval.results import ContestantTiming, Identity, Spread, Unavailable
from speedstack.eval.spread import spread_fields

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One timed call: new tokens, wall seconds to the first and to the last, decode rounds if it counts them."""

    tokens: list[int]
    first_token_seconds: float
    total_seconds: float
    num_rounds: int | None = None


@dataclass(frozen=True)
class Contestant:
    """A way of generating: `run(prompt ids, number of new tokens)` decodes greedily, past any end-of-text token.

    `identical_to` names the contestant whose tokens these must be compared with; `identity_promised` says that a
    difference is a fault, not a rounding.
    """

    name: str
    description: str
    run: Callable[[list[int], int], Sample]
    prepare_seconds: float = 0.0
    identical_to: str | None = None
    identity_promised: bool = False


@dataclass
class _Lane:
    """One contestant's record while the race runs; `samples[repeat][prompt]`."""

    contestant: Contestant
    warmup_seconds: float = 0.0
    samples: list[list[Sample]] = field(default_factory=list)


def race(
    contestants: Sequence[Contestant],
    prompts: Sequence[list[int]],
    num_new_tokens: int = 128,
    num_repeats: int = 5,
    progress: bool = True,
    seed: int = 0,
) -> tuple[tuple[ContestantTiming, ...], tuple[Unavailable, ...]]:
    """Times of every contestant, and those that could not run with the reason. `seed` is of the orders they run in.

    Raises ValueError for no prompts, fewer than 2 new tokens or no repeat. A broken promise of identical tokens is
    logged as an error and stands in the result's `identity`.
    """
    if not prompts or num_new_tokens < 2 or num_repeats < 1:
        raise ValueError(
            f"a race needs a prompt, 2 new tokens and 1 repeat; got {len(prompts)}, {num_new_tokens} and {num_repeats}"
        )
    lanes = [_Lane(contestant) for contestant in contestants]
    unavailable: list[Unavailable] = []
    orders = random.Random(seed)
    total = len(lanes) * (1 + num_repeats * len(prompts))
    with tqdm(total=total, desc="timing", disable=not progress, dynamic_ncols=True) as bar:
        for lane in list(lanes):
            sample = _run(lane, prompts[0], num_new_tokens, lanes, unavailable)
            lane.warmup_seconds = sample.total_seconds if sample is not None else 0.0
            bar.update()
        for _ in range(num_repeats):
            for lane in lanes:
                lane.samples.append([])
            for prompt in prompts:
                for lane in orders.sample(lanes, len(lanes)):
                    sample = _run(lane, prompt, num_new_tokens, lanes, unavailable)
                    if sample is not None:
                        lane.samples[-1].append(sample)
                    bar.update()
    by_name = {lane.contestant.name: lane for lane in lanes}
    return tuple(_summarize(lane, by_name) for lane in lanes), tuple(unavailable)


def spread(values: Sequence[float]) -> Spread:
    """`spread_fields` of at least one value, as results hold them."""
    return Spread(**spread_fields(values))


def _run(
    lane: _Lane, prompt: list[int], num_new_tokens: int, lanes: list[_Lane], unavailable: list[Unavailable]
) -> Sample | None:
    """One call of `lane`; a lane that fails leaves the race with its reason."""
    try:
        sample = lane.contestant.run(prompt, num_new_tokens)
    except PEER_ERRORS as error:
        reason = one_line(error)
    else:
        if len(sample.tokens) == num_new_tokens:
            return sample
        reason = f"made {len(sample.tokens)} tokens of {num_new_tokens}"
    logger.warning("%s left the timing: %s", lane.contestant.name, reason)
    unavailable.append(Unavailable(name=lane.contestant.name, reason=reason))
    lanes.remove(lane)
    return None


def _summarize(lane: _Lane, lanes: dict[str, _Lane]) -> ContestantTiming:
    """Rates are sums over a repeat's prompts, so that long and short prompts weigh by their tokens."""
    decode_rates, rates, first_token_seconds = [], [], []
    for samples in lane.samples:
        total_seconds = sum(sample.total_seconds for sample in samples)
        first_seconds = sum(sample.first_token_seconds for sample in samples)
        num_tokens = sum(len(sample.tokens) for sample in samples)
        # A clock that does not advance between two tokens would divide by zero.
        decode_rates.append((num_tokens - len(samples)) / max(total_seconds - first_seconds, 1e-9))
        rates.append(num_tokens / max(total_seconds, 1e-9))
        first_token_seconds.append(first_seconds / len(samples))
    rounds = [sample.num_rounds for samples in lane.samples for sample in samples]
    counted = [count for count in rounds if count]
    num_decoded = sum(len(sample.tokens) - 1 for samples in lane.samples for sample in samples if sample.num_rounds)
    return ContestantTiming(
        name=lane.contestant.name,
        description=lane.contestant.description,
        prepare_seconds=lane.contestant.prepare_seconds,
        warmup_seconds=lane.warmup_seconds,
        decode_tokens_per_second=spread(decode_rates),
        tokens_per_second=spread(rates),
        first_token_seconds=spread(first_token_seconds),
        acceptance_length=num_decoded / sum(counted) if counted else None,
        identity=_compare(lane, lanes),
    )


def _compare(lane: _Lane, lanes: dict[str, _Lane]) -> Identity | None:
    """Tokens of every prompt in every repeat against the reference's; a prompt counts only if all repeats agree."""
    reference_name = lane.contestant.identical_to
    if reference_name is None or reference_name not in lanes:
        return None
    reference = lanes[reference_name]
    num_prompts = len(lane.samples[0])
    num_identical = 0
    first_difference = None
    for index in range(num_prompts):
        different = None
        for ours, theirs in zip(lane.samples, reference.samples, strict=True):
            pairs = zip(ours[index].tokens, theirs[index].tokens, strict=True)
            position = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
            if position is not None:
                different = f"prompt {index + 1} differs from token {position + 1} on"
                break
        num_identical += different is None
        first_difference = first_difference or different
    identity = Identity(
        reference=reference_name,
        promised=lane.contestant.identity_promised,
        num_identical=num_identical,
        num_prompts=num_prompts,
        first_difference=first_difference,
    )
    if identity.is_broken:
        logger.error(
            "%s promised the tokens of %s: %s", lane.contestant.name, reference_name, identity.first_difference
        )
    return identity
