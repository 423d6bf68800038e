"""Rounds without the host: the engine writes what it writes with the host between them, and counts the same rounds.

A backend that interprets plans stands for the resident kernel here, so that no Triton is needed; resident/test_rounds
holds the kernel against the same. Legend: R rows, L positions.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speedstack.dflash.ngram import NgramIndex
from speedstack.runtime import Engine
from speedstack.runtime.backends.base import Draw, RoundsRequest
from speedstack.runtime.backends.gpu.multi_step import ROUNDS_A_LAUNCH, rounds_inbox
from speedstack.runtime.decoding.results import Generation, GenerationStats
from speedstack.runtime.model.kv_ring import MAX_ROWS
from speedstack.runtime.model.weights import ModelWeights
from speedstack.runtime.plan.ir import Plan
from speedstack.runtime.plan.record_layout import CAPACITY, END, FIRST_ROW, LENGTH, NUM_ROWS, SEED, TOKEN
from speedstack.runtime.plan.verify.proof import prove
from speedstack.runtime.rounds.row_allocation import allocate_rows, contiguous_groups
from speedstack.runtime.rounds.sampling import SamplingParams
from speedstack.runtime.rounds.speculation import DraftStrategy
from tests.runtime.backends.gpu.interpreted_backend import InterpretedBackend
from tests.runtime.backends.gpu.plan_cases import SMALL_CASES

MAX_LENGTH = 48
PROMPTS = [[5, 6, 7, 5, 6, 7, 5, 6], [3], [9, 2, 9, 2, 4, 9]]


@pytest.fixture(scope="module")
def weights() -> ModelWeights:
    return SMALL_CASES["dense"]()


def engine_of(
    weights: ModelWeights,
    monkeypatch: pytest.MonkeyPatch,
    drafter: Any = None,
    strategy: DraftStrategy | None = None,
    tokenizer: Any = None,
    **options: Any,
) -> tuple[Engine, InterpretedBackend]:
    """An engine on an interpreted plan."""
    backend = InterpretedBackend(weights, MAX_LENGTH, **options)
    with monkeypatch.context() as patch:
        patch.setattr("speedstack.runtime.engine.make_backend", lambda *args: backend)
        return Engine(weights, drafter, tokenizer, "reference", MAX_LENGTH, 3, strategy), backend


def reference_of(
    weights: ModelWeights,
    drafter: Any = None,
    strategy: DraftStrategy | None = None,
    tokenizer: Any = None,
    num_rows: int = 8,
) -> Engine:
    """An engine whose rounds the host makes, with as many rows a step."""
    engine = Engine(weights, drafter, tokenizer, "reference", MAX_LENGTH, 3, strategy)
    engine.backend.rows_a_step = num_rows
    return engine


def num_prompt_steps(prompts: Sequence[Sequence[int]], num_rows: int) -> int:
    """Steps of a backend of `num_rows` rows for prompts that are admitted together: they share the engine's steps."""
    num_tokens = sum(map(len, prompts))
    chunks = [min(MAX_ROWS, num_tokens - start) for start in range(0, num_tokens, MAX_ROWS)]
    return sum(-(-chunk // num_rows) for chunk in chunks)


def counts(stats: GenerationStats) -> dict[str, Any]:
    """All that does not depend on the clock, nor on how many rounds the host hears of at once."""
    timed = ("prefill_seconds", "decode_seconds", "arrivals")
    return {name: value for name, value in vars(stats).items() if name not in timed}


def check_same(found: Sequence[Generation], expected: Sequence[Generation]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.tokens, one.finish_reason, one.text) == (other.tokens, other.finish_reason, other.text)
        assert counts(one.stats) == counts(other.stats)
        assert sum(count for _, count in one.stats.arrivals) == len(one.tokens)
        moments = [moment for moment, _ in one.stats.arrivals]
        assert moments == sorted(moments) and one.stats.decode_seconds >= 0.0


@pytest.mark.parametrize("num_programs", [1, 3, 8])
def test_plain_text_is_that_of_one_step_at_a_time(
    weights: ModelWeights, num_programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three sequences of different lengths and budgets; fewer launches than steps."""
    engine, backend = engine_of(weights, monkeypatch, num_programs=num_programs, seed=num_programs)
    reference = reference_of(weights)
    check_same(engine.generate(PROMPTS, max_new_tokens=19), reference.generate(PROMPTS, max_new_tokens=19))
    assert backend.num_launches == num_prompt_steps(PROMPTS, 8) + -(-18 // ROUNDS_A_LAUNCH)
    alone = engine.generate(PROMPTS[2], max_new_tokens=40)
    assert len(alone.tokens) == 40 and alone.stats.num_rounds == 39
    check_same([alone], [reference.generate(PROMPTS[2], max_new_tokens=40)])
    assert [count for _, count in alone.stats.arrivals] == [1, 8, 8, 8, 8, 7]


@pytest.mark.parametrize(("num_drafts", "ngram_size", "num_rows"), [(3, 3, 16), (1, 2, 4), (7, 1, 8), (2, 5, 8)])
def test_look_up_drafts_and_accepts_as_the_host_does(
    weights: ModelWeights, num_drafts: int, ngram_size: int, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text, drafts by position, acceptance, rows: all that is counted. Steps hold all drafts or some of each text's."""
    strategy = DraftStrategy(num_drafts=num_drafts, ngram_size=ngram_size)
    engine, backend = engine_of(weights, monkeypatch, "ngram", strategy, num_rows=num_rows, seed=num_drafts)
    found = engine.generate(PROMPTS, max_new_tokens=30)
    host = reference_of(weights, "ngram", strategy, num_rows=num_rows)
    check_same(found, host.generate(PROMPTS, max_new_tokens=30))
    assert backend.num_steps - num_prompt_steps(PROMPTS, num_rows) == max(one.stats.num_rounds for one in found)
    plain = reference_of(weights).generate(PROMPTS, max_new_tokens=30)
    assert [one.tokens for one in found] == [one.tokens for one in plain]
    assert sum(sum(one.stats.accepted_by_position) for one in found) > 5, "nothing was accepted"
    drafted = sum(one.stats.num_drafted for one in found)
    assert drafted > sum(sum(one.stats.accepted_by_position) for one in found), "everything was accepted"
    assert backend.has_prompt_lookup


def test_end_of_sequence_ends_one_and_disturbs_no_other(weights: ModelWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    """An end-of-sequence token within a launch, at its first and at its last round, among accepted drafts."""
    free = reference_of(weights).generate(PROMPTS, max_new_tokens=30)
    seen = set[str | None]()
    written = {token for one in free for token in one.tokens}
    others = [token for token in range(weights.spec.vocab_size) if token not in written]
    for index, eos in enumerate(sorted(written)[::3]):
        ending = replace(weights, spec=replace(weights.spec, eos_token_ids=(*others[:index], eos)))
        for drafter in (None, "ngram"):
            strategy = DraftStrategy(num_drafts=3) if drafter else None
            engine, _ = engine_of(ending, monkeypatch, drafter, strategy)
            expected = reference_of(ending, drafter, strategy).generate(PROMPTS, max_new_tokens=30)
            check_same(engine.generate(PROMPTS, max_new_tokens=30), expected)
            seen |= {one.finish_reason for one in expected}
            ignoring = engine.generate(PROMPTS, max_new_tokens=12, ignore_eos=True)
            assert [one.tokens for one in ignoring] == [one.tokens[:12] for one in free]
    assert seen == {"eos", "length"}


def test_a_text_may_fill_the_buffers_to_the_last_position(
    weights: ModelWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, strategy = PROMPTS[0], DraftStrategy(num_drafts=5)
    num_new = MAX_LENGTH - len(prompt)
    engine, _ = engine_of(weights, monkeypatch, "ngram", strategy)
    expected = reference_of(weights, "ngram", strategy).generate(prompt, max_new_tokens=num_new)
    check_same([engine.generate(prompt, max_new_tokens=num_new)], [expected])
    assert len(expected.tokens) == num_new
    for few in (1, 2):
        expected = reference_of(weights, "ngram", strategy).generate(prompt, max_new_tokens=few)
        check_same([engine.generate(prompt, max_new_tokens=few)], [expected])


@pytest.mark.parametrize("drafter", [None, "ngram"])
def test_sampled_text_is_that_of_the_host(weights: ModelWeights, drafter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of seed, sequence and position in every row: the same tokens, drafts or not, and others for another seed."""
    strategy = DraftStrategy(num_drafts=3, ngram_size=1) if drafter else None
    engine, backend = engine_of(weights, monkeypatch, drafter, strategy)
    reference = reference_of(weights, drafter, strategy)
    options: dict[str, Any] = {"max_new_tokens": 20, "temperature": 0.7, "seed": [2**63 + 5, 1, 1]}
    found = engine.generate(PROMPTS, **options)
    check_same(found, reference.generate(PROMPTS, **options))
    assert found[0].tokens != engine.generate(PROMPTS[0], **options | {"seed": 5}).tokens
    greedy = reference.generate(PROMPTS, max_new_tokens=20)
    assert all(one.tokens != other.tokens for one, other in zip(found, greedy, strict=True))
    for cut in ({"top_k": 3}, {"top_p": 0.4}, {"top_k": 30, "top_p": 0.9}):
        before = backend.num_launches
        found = engine.generate(PROMPTS, **options | cut)
        assert backend.num_launches - before < 20, "several rounds a launch"
        check_same(found, reference.generate(PROMPTS, **options | cut))


def test_a_launch_makes_one_round_only_where_the_host_has_to_draft(
    weights: ModelWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adaptive drafts, and drafts that do not fit a step go round by round; set_strategy changes it any time."""
    engine, backend = engine_of(weights, monkeypatch, "ngram", DraftStrategy(num_drafts="adaptive"), num_rows=4)
    reference = reference_of(weights, "ngram", DraftStrategy(num_drafts=3))
    expected = reference.generate(PROMPTS[0], max_new_tokens=12)

    def launches() -> int:
        before = backend.num_launches
        found = engine.generate(PROMPTS[0], max_new_tokens=12)
        assert found.tokens == expected.tokens
        return backend.num_launches - before - 2  # the prompt takes two

    rounds_adaptive = launches()
    assert rounds_adaptive > 3 and not backend.has_prompt_lookup
    # one step a launch is drawn by the same sampler: the backend's, from keys that the host gives
    drawn: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.4, "seed": 9, "top_k": 40, "top_p": 0.9}
    sampled = engine.generate(PROMPTS[0], **drawn).tokens
    assert sampled == reference.generate(PROMPTS[0], **drawn).tokens
    engine.set_strategy(DraftStrategy(num_drafts=3))
    assert launches() <= 2 and backend.has_prompt_lookup
    engine.set_strategy(DraftStrategy(num_drafts=4))
    assert launches() > 3 and not backend.has_prompt_lookup
    engine.set_drafter(None)
    assert launches() == 2
    assert engine.generate(PROMPTS[0], **drawn).tokens == sampled


class Letters:
    """A tokenizer of one letter a token."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(ord("a") + token) for token in ids)


def test_stop_strings_and_streams(weights: ModelWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop string found after the launch cuts what came behind it; a stream's first piece is the prompt's token."""
    letters, strategy = Letters(), DraftStrategy(num_drafts=3)
    free = reference_of(weights, tokenizer=letters).generate(PROMPTS[0], max_new_tokens=30)
    for drafter, at in ((None, 3), (None, 12), ("ngram", 9)):
        stop, options = free.text[at : at + 2], strategy if drafter else None
        engine, backend = engine_of(weights, monkeypatch, drafter, options, letters)
        expected = reference_of(weights, drafter, options, letters).generate(PROMPTS[0], max_new_tokens=30, stop=stop)
        assert expected.finish_reason == "stop" and len(expected.tokens) < 30
        check_same([engine.generate(PROMPTS[0], max_new_tokens=30, stop=stop)], [expected])
    engine, backend = engine_of(weights, monkeypatch, tokenizer=letters)
    stream = engine.stream(PROMPTS[0], max_new_tokens=30)
    assert next(stream) == free.text[0] and backend.num_launches == 1
    pieces = list(stream)
    assert "".join(pieces) == free.text[1:]
    assert [len(piece) for piece in pieces] == [8, 8, 8, 5]


@pytest.mark.parametrize("drafter", [None, "ngram"])
def test_nan_logits_raise_the_same_error_as_on_the_host(
    weights: ModelWeights, drafter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the token on whose embedding is lost; text that ends before it is not touched by it."""
    strategy = DraftStrategy(num_drafts=3) if drafter else None
    tokens = reference_of(weights).generate(PROMPTS[1], max_new_tokens=20).tokens
    lost = tokens[4]
    broken = replace(weights, embedding_VD=weights.embedding_VD.clone())
    broken.embedding_VD[lost] = float("nan")
    engine, _ = engine_of(broken, monkeypatch, drafter, strategy)
    before = tokens.index(lost)
    assert engine.generate(PROMPTS[1], max_new_tokens=before + 1).tokens == tokens[: before + 1]
    messages = []
    for one in (engine, reference_of(broken, drafter, strategy)):
        with pytest.raises(ValueError, match="logits at position") as failed:
            one.generate(PROMPTS[1], max_new_tokens=20)
        messages.append(str(failed.value))
    assert messages[0] == messages[1]
    assert engine.generate(PROMPTS[1], max_new_tokens=before + 1).tokens == tokens[: before + 1]


def test_rows_are_dealt_by_what_the_index_proposes(weights: ModelWeights) -> None:
    """Proposals and records of rows, idle ones too, for texts of any length, some over, drafts that fit or do not.

    What is proposed is the index's own answer here; kernels/test_rounds holds the kernel against it.
    """
    rng, num_cut = random.Random(0), 0
    for num_rows in (4, 16):
        backend = InterpretedBackend(weights, MAX_LENGTH, num_rows=num_rows, num_programs=1)
        backend.set_prompt_lookup(True)
        semantics, (draft, embed) = backend.state.semantics(), backend.plan.phases[:2]
        for _ in range(40):
            size, num_drafts = rng.randint(1, 5), rng.randint(1, min(7, num_rows - 1))
            texts = [[rng.randrange(rng.randint(1, 6)) for _ in range(rng.randint(1, 40))] for _ in range(3)]
            draws = [Draw(slot, 7, SamplingParams(0.5)) for slot in range(3)]
            requests = [
                RoundsRequest(text, 2 - slot, len(text) + rng.randint(1, 8), True, num_drafts, size, draw)
                for slot, (text, draw) in enumerate(zip(texts, draws, strict=True))
            ]
            inbox = rounds_inbox(requests, num_rows)
            is_over = [rng.random() < 0.3 for _ in requests]
            for sequence, request in enumerate(requests):
                backend.state.history_RL[request.slot, : len(request.tokens)] = torch.tensor(request.tokens)
                if is_over[sequence]:
                    inbox[2, sequence, END] = len(request.tokens)
            backend.state.set_inbox(inbox)
            for phase in (draft, embed):
                for item in range(phase.num_items):
                    for _ in semantics[phase.op](phase, (item,), 0) or ():
                        pass
            proposed = [
                NgramIndex(size).propose(one.tokens, min(num_drafts, one.end - len(one.tokens) - 1)) for one in requests
            ]
            wanted = [0 if over else 1 + len(tokens) for over, tokens in zip(is_over, proposed, strict=True)]
            rows, first = backend.state.rows_RF, 0
            for sequence, number in enumerate(allocate_rows(wanted, num_rows)):
                request, last = requests[sequence], len(requests[sequence].tokens) - 1
                for row, token in enumerate([request.tokens[-1], *proposed[sequence]][:number]):
                    assert rows[first + row, :FIRST_ROW].tolist() == [token, request.slot, last + row, last]
                    assert backend.state.sampling_RF[first + row, SEED] == request.draw.seed  # type: ignore[union-attr]
                assert rows[sequence, FIRST_ROW:6].tolist() == [first, number]
                first += number
                num_cut += 0 < number < wanted[sequence]
            assert (rows[first:, TOKEN] == -1).all() and not backend.state.sampling_RF[first:].any()
            assert not rows[len(requests) :, NUM_ROWS].any()
            assert backend.state.is_over() == all(is_over)
    assert num_cut > 20


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 16), min_size=1, max_size=16))
def test_rows_are_dealt_as_evenly_as_they_are_wanted(wanted: list[int]) -> None:
    """Nobody gets more than it wants or none; no row is left that is wanted; nobody has two more than one who wants."""
    allocated = allocate_rows(wanted, 16)
    assert all(min(1, number) <= got <= number for got, number in zip(allocated, wanted, strict=True))
    assert sum(allocated) == min(16, sum(wanted)) or allocated == wanted
    short = [got for got, number in zip(allocated, wanted, strict=True) if got < number]
    assert not short or max(allocated) <= min(short) + 1
    for (one, first), (other, second) in pairwise(zip(allocated, wanted, strict=True)):
        assert one >= other or first < second, "of two that want as many the first has no fewer"


@pytest.mark.parametrize(("num_sequences", "sizes"), [(1, [1]), (16, [16]), (17, [8, 9]), (40, [13, 13, 14])])
def test_sequences_without_a_row_make_another_group(num_sequences: int, sizes: list[int]) -> None:
    groups = contiguous_groups(num_sequences, 16)
    assert [len(group) for group in groups] == sizes
    assert [index for group in groups for index in group] == list(range(num_sequences))


@pytest.mark.parametrize("num_programs", [1, 3, 8])
def test_many_sequences_take_no_more_steps_than_without_drafts(
    weights: ModelWeights, num_programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight that share steps of sixteen rows take as many as the longest has rounds; seven in steps of four are two
    groups.
    """
    rng = random.Random(3)
    for num_sequences, num_rows, num_drafts in ((8, 16, 7), (7, 4, 3)):
        prompts = [[rng.randrange(24) for _ in range(rng.randint(2, 4))] for _ in range(num_sequences)]
        strategy = DraftStrategy(num_drafts=num_drafts, ngram_size=1)
        backend = InterpretedBackend(weights, 24, num_rows=num_rows, num_programs=num_programs, num_slots=8)
        with monkeypatch.context() as patch:
            patch.setattr("speedstack.runtime.engine.make_backend", lambda *args, backend=backend: backend)
            engine = Engine(weights, "ngram", None, "reference", 24, num_sequences, strategy)
        found = engine.generate(prompts, max_new_tokens=14)
        host = Engine(weights, "ngram", None, "reference", 24, num_sequences, strategy)
        host.backend.rows_a_step = num_rows
        expected = host.generate(prompts, max_new_tokens=14)
        assert [one.tokens for one in found] == [one.tokens for one in expected]
        rounds = [one.stats.num_rounds for one in found]
        num_steps = backend.num_steps - num_prompt_steps(prompts, num_rows)
        assert max(rounds) <= 13 and sum(rounds) < 13 * num_sequences, "a round commits a token or more"
        if num_sequences <= num_rows:
            check_same(found, expected)
            assert num_steps == max(rounds)
        # Groups are made anew when the host has heard of who is over.
        assert max(rounds) <= num_steps <= 13 * -(-num_sequences // num_rows)
        verified = sum(one.stats.num_rows - one.stats.num_rounds for one in found)
        assert verified < sum(one.stats.num_drafted for one in found), "rows were short"


def test_the_inbox_names_keys_and_ends() -> None:
    requests = [
        RoundsRequest([4, 9], 2, 7, True, 2, 3, Draw(2**64 - 1, 2**40, SamplingParams(0.5, top_k=7, top_p=0.25))),
        RoundsRequest([8], 0, 5, False, 1, 3),
    ]
    rows, sampling, sequences, draws = rounds_inbox(requests, 6)
    assert (rows[:, TOKEN] == -1).all() and not rows[:, 1:].any() and not sampling.any()
    assert draws[0].tolist() == [-1, -1, 0, 256, 0x3F000000, 7, 2**22, 0] and not draws[1:].any()
    assert sequences[0].tolist()[:7] == [3, 9, 2, 2, 7, 3, 1] and sequences[1].tolist()[:7] == [2, 8, 0, 1, 5, 3, 0]
    assert sequences[:, CAPACITY].tolist() == [3, 2, 0, 0, 0, 0]
    assert (sequences[:2, LENGTH] < sequences[:2, END]).all()
    # what lets the proof take every text for one sequence's
    with pytest.raises(AssertionError, match="a slot of its own"):
        rounds_inbox([requests[0], replace(requests[1], slot=2)], 6)


def faulty(plan: Plan, name: str) -> Plan:
    """The plan with one phase that does not wait."""
    phases = list(plan.phases)
    phases[plan.phase_named[name]] = replace(phases[plan.phase_named[name]], waits=())
    return replace(plan, phases=tuple(phases))


@pytest.mark.parametrize("name", ["draft", "embed", "logit_histogram", "sample", "accept"])
def test_a_missing_wait_is_rejected_and_seen_by_some_schedule(weights: ModelWeights, name: str) -> None:
    cut = Draw(1, 2, SamplingParams(0.7, top_p=0.9, top_k=300))
    requests = [RoundsRequest(PROMPTS[0], 0, 30, True, 3, 3), RoundsRequest(PROMPTS[2], 1, 30, True, 3, 3)]
    requests.append(RoundsRequest(PROMPTS[1], 2, 30, True, 0, 3, cut))
    backend = InterpretedBackend(weights, MAX_LENGTH)
    backend.set_prompt_lookup(True)
    assert backend.rounds is not None
    sound = backend.plan

    def run(plan: Plan, seed: int) -> Any:
        backend.use(plan)
        backend.seed = seed
        for cache in backend.state.caches:
            for part in cache:
                part.fill_(0.5)
        backend.rounds.forget([0, 1, 2])  # type: ignore[union-attr]
        return backend.rounds.run(requests, 5)  # type: ignore[union-attr]

    expected = run(sound, 0)
    assert sum(one.num_accepted for rounds in expected for one in rounds) > 0
    assert all(run(sound, seed) == expected for seed in range(1, 6))
    broken = faulty(sound, name)
    failure = prove(broken).failure
    assert failure is not None and name in failure.edge
    for seed in range(40):
        try:
            if run(broken, seed) != expected:
                return
        except (AssertionError, IndexError, RuntimeError, StopIteration):
            return  # what was read too early made no sense
    pytest.fail("no schedule shows it")
