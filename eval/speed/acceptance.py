"""Acceptance length of a drafter on sets of prompts: overall, a position, a set.

Counted by the engine while it decodes: nothing is simulated, and the text is the target's own. The headline is tokens
committed / decode rounds with the target's bonus token included, so it is the number of times fewer the target runs.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from speedstack.eval.results.environment import describe_environment
from speedstack.eval.results.speed import AcceptanceResult, AcceptanceSet
from speedstack.runtime import Engine, Generation, GenerationStats
from speedstack.runtime.rounds.speculation import DraftStrategy


def measure_acceptance(
    engine: Engine,
    prompt_sets: Mapping[str, Sequence[str | list[int]]],
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    strategy: DraftStrategy | None = None,
    ignore_eos: bool = True,
) -> AcceptanceResult:
    """Generate `max_new_tokens` from every prompt and count.

    `ignore_eos`: go on past the target's end token, so that lengths are equal; else an answer ends where it does.
    `strategy`: how the engine speculates meanwhile; None verifies every block whole. Raises ValueError for an engine
    without a drafter, a strategy it does not have, no prompts, or fewer than 2 new tokens (no round would run).
    """
    if engine.num_drafts == 0:
        raise ValueError("acceptance needs a drafter: load the engine with Engine.from_pretrained(target, drafter)")
    if max_new_tokens < 2:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: the prefill makes the first token, so use at least 2")
    if not prompt_sets or not all(prompt_sets.values()):
        raise ValueError("every prompt set needs at least one prompt")
    before, strategy = engine.strategy, strategy or DraftStrategy()
    engine.set_strategy(strategy)
    try:
        generations = {
            name: engine.generate(
                list(prompts), max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, ignore_eos=ignore_eos
            )
            for name, prompts in prompt_sets.items()
        }
    finally:
        engine.set_strategy(before)
    stats = {name: [generation.stats for generation in group] for name, group in generations.items()}
    return acceptance_result(stats, strategy, max_new_tokens, temperature, seed)


def acceptance_result(
    sets: Mapping[str, Sequence[GenerationStats]],
    strategy: DraftStrategy,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> AcceptanceResult:
    """The result of what was counted on sets of prompts; a set without a decode round is left out with a warning.

    Raises ValueError when no round ran on any.
    """
    everything = [entry for group in sets.values() for entry in group]
    overall = summarize_stats("all prompts", everything)
    measured = {name: group for name, group in sets.items() if any(entry.num_rounds for entry in group)}
    for name in sets.keys() - measured.keys():
        warnings.warn(f"no decode round ran on {name}: it has no acceptance", stacklevel=2)
    return AcceptanceResult(
        block_size=1 + max(len(entry.drafted_by_position) for entry in everything),
        strategy=asdict(strategy),
        temperature=temperature,
        seed=seed,
        max_new_tokens=max_new_tokens,
        overall=overall,
        sets=tuple(summarize_stats(name, group) for name, group in measured.items()),
        environment=describe_environment(),
    )


def summarize(name: str, generations: Sequence[Generation]) -> AcceptanceSet:
    """Acceptance pooled over `generations`. Raises ValueError when no decode round ran."""
    return summarize_stats(name, [generation.stats for generation in generations])


def summarize_stats(name: str, generated: Sequence[GenerationStats]) -> AcceptanceSet:
    """As `summarize`, of the statistics alone."""
    stats = [entry for entry in generated if entry.num_rounds > 0]
    if not stats:
        raise ValueError(f"no decode round ran on {name}: generate more tokens")
    num_rounds = sum(entry.num_rounds for entry in stats)
    num_committed = sum(entry.num_round_tokens for entry in stats)
    num_positions = max(len(entry.drafted_by_position) for entry in stats)
    accepted = [0] * num_positions
    for entry in stats:
        for i, count in enumerate(entry.accepted_by_position):
            accepted[i] += count
    return AcceptanceSet(
        name=name,
        num_prompts=len(generated),
        num_rounds=num_rounds,
        num_committed=num_committed,
        acceptance_length=num_committed / num_rounds,
        mean_of_responses=sum(entry.acceptance_length for entry in stats) / len(stats),
        survival=tuple(count / num_rounds for count in accepted),
        rows_per_token=sum(entry.num_rows for entry in stats) / num_committed,
        drafted_per_token=sum(entry.num_drafted for entry in stats) / num_committed,
    )
