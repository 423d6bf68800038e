"""Rounds without the host with a DFlash drafter: the engine writes and counts what it does with the host between them.

A backend that interprets plans stands for the resident kernel; resident/test_drafter holds the kernel against the same.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from speedstack.dflash.model import DFlashDraftModel
from speedstack.runtime import Engine
from speedstack.runtime.backends.gpu.multi_step import ROUNDS_A_LAUNCH
from speedstack.runtime.model.weights import ModelWeights
from speedstack.runtime.rounds.sampling import SamplingParams
from speedstack.runtime.rounds.speculation import DraftStrategy
from tests.runtime.backends.gpu.drafter_cases import MAX_LENGTH, OPTIONS, PROMPTS, drafter, target
from tests.runtime.backends.gpu.interpreted_backend import InterpretedBackend
from tests.runtime.backends.gpu.test_rounds import check_same

PARAMS = SamplingParams()
ALL = [*PROMPTS, [3, 3]]


def engines_of(
    model: DFlashDraftModel,
    monkeypatch: pytest.MonkeyPatch,
    strategy: DraftStrategy | None = None,
    weights: ModelWeights | None = None,
    **options: Any,
) -> tuple[Engine, InterpretedBackend, Engine]:
    """An engine on an interpreted plan, its backend, and one with the reference backend."""
    weights = target() if weights is None else weights
    backend = InterpretedBackend(weights, MAX_LENGTH, options.pop("num_rows", 16), drafter=model, **options)
    with monkeypatch.context() as patch:
        patch.setattr("speedstack.runtime.engine.make_backend", lambda *args: backend)
        engine = Engine(weights, model, None, "reference", MAX_LENGTH, 3, strategy)
    return engine, backend, Engine(weights, model, None, "reference", MAX_LENGTH, 3, strategy)


@pytest.mark.parametrize("options", OPTIONS)
def test_texts_drafts_and_acceptance_are_the_hosts(options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sequence to the end of the buffers, in a few launches; then two that share their launches."""
    engine, backend, reference = engines_of(drafter(options), monkeypatch, num_programs=3, seed=1)
    plain = Engine(target(), None, None, "reference", MAX_LENGTH, 3)
    num_new = MAX_LENGTH - len(PROMPTS[0])
    expected = reference.generate(PROMPTS[0], max_new_tokens=num_new)
    check_same([engine.generate(PROMPTS[0], max_new_tokens=num_new)], [expected])
    assert expected.tokens == plain.generate(PROMPTS[0], max_new_tokens=num_new).tokens
    assert 0 < sum(expected.stats.accepted_by_position) < sum(expected.stats.drafted_by_position)
    assert backend.num_host_drafts == 0
    assert backend.num_launches <= 1 + -(-num_new // ROUNDS_A_LAUNCH), "a launch makes several rounds"
    two = engine.generate(PROMPTS, max_new_tokens=12)
    assert [one.tokens for one in two] == [one.tokens for one in plain.generate(PROMPTS, max_new_tokens=12)]
    assert backend.num_host_drafts == 0
    assert all(one.stats.num_drafted > one.stats.num_rounds for one in two)


def test_host_rounds_and_rounds_without_it_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks of five do not fit sixteen rows with three anchors: the host drafts from the contexts of the plan.

    As sequences end, those that are left go on without it, and the other way round.
    """
    model = drafter(block_size=6)
    engine, backend, reference = engines_of(model, monkeypatch, num_programs=2)
    lengths = [20, 9, 14]

    def run(one: Engine) -> list[list[int]]:
        waiting = [one._sequence(p, n, PARAMS, 0, (), True) for p, n in zip(ALL, lengths, strict=True)]
        for _ in one._run(list(waiting)):
            pass
        return [sequence.result().tokens for sequence in waiting]

    found = run(engine)
    assert found == run(reference)
    hosts = backend.num_host_drafts
    assert hosts > 0, "three sequences need the host"
    launches = backend.num_launches
    again = engine.generate(ALL[0], max_new_tokens=20, ignore_eos=True)
    assert again.tokens == found[0] and backend.num_host_drafts == hosts
    assert backend.num_launches - launches < 8
    # Drafts with shared noise need the host for every round, with the same contexts again.
    for one in (engine, reference):
        one.set_strategy(DraftStrategy(noise="shared"))
    drawn: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.8, "seed": 5, "top_k": 3}
    check_same([engine.generate(ALL[0], **drawn)], [reference.generate(ALL[0], **drawn)])
    assert backend.num_host_drafts > hosts


def test_sampled_text_is_that_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, backend, reference = engines_of(drafter(), monkeypatch, num_programs=3)
    drawn: dict[str, Any] = {"max_new_tokens": 20, "temperature": 0.7, "seed": 2**63 + 5}
    check_same([engine.generate(PROMPTS[0], **drawn)], [reference.generate(PROMPTS[0], **drawn)])
    assert backend.num_host_drafts == 0


def test_end_of_sequence_and_nan_end_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, model = target(), drafter()
    free = Engine(weights, model, None, "reference", MAX_LENGTH, 3).generate(PROMPTS[0], max_new_tokens=20)
    for eos in sorted(set(free.tokens)):
        ending = replace(weights, spec=replace(weights.spec, eos_token_ids=(eos,)))
        engine, _, reference = engines_of(model, monkeypatch, weights=ending, num_programs=2)
        expected = reference.generate(PROMPTS[0], max_new_tokens=20)
        check_same([engine.generate(PROMPTS[0], max_new_tokens=20)], [expected])
        assert expected.finish_reason == "eos"
    broken = replace(weights, embedding_VD=weights.embedding_VD.clone())
    lost = free.tokens[3]
    broken.embedding_VD[lost] = float("nan")
    engine, _, _ = engines_of(model, monkeypatch, weights=broken, num_programs=2)
    with pytest.raises(ValueError, match="logits at position"):
        engine.generate(PROMPTS[0], max_new_tokens=20)


@pytest.mark.parametrize(
    "strategy",
    [DraftStrategy(num_drafts="adaptive"), DraftStrategy(noise="shared"), DraftStrategy(num_drafts=2)],
    ids=["adaptive", "shared noise", "two"],
)
def test_the_host_drafts_where_a_launch_cannot(strategy: DraftStrategy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host, where a launch cannot; the text is the same."""
    engine, backend, reference = engines_of(drafter(), monkeypatch, strategy, num_programs=2)
    options: dict[str, Any] = {"max_new_tokens": 10, "temperature": 0.7, "seed": 3}
    check_same([engine.generate(PROMPTS[0], **options)], [reference.generate(PROMPTS[0], **options)])
    assert (backend.num_host_drafts == 0) == (strategy.num_drafts == 2)


def test_a_context_of_nan_drafts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text goes on a token a step, as it does with the host."""
    model = drafter()
    model.norm.weight.fill_(float("nan"))
    engine, backend, reference = engines_of(model, monkeypatch, num_programs=3)
    found = engine.generate(PROMPTS[0], max_new_tokens=10)
    check_same([found], [reference.generate(PROMPTS[0], max_new_tokens=10)])
    assert found.stats.num_rounds == 9 and backend.num_host_drafts == 0
    assert torch.isnan(model.norm.weight).all()
