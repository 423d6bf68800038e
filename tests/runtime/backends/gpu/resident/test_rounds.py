"""The resident kernel drafts, verifies, samples and accepts: what the plan's semantics do, buffer by buffer, and texts.

Legend: R rows.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from speedstack.runtime import Engine
from speedstack.runtime.backends.base import Draw, Round, RoundsRequest, Rows
from speedstack.runtime.backends.gpu.multi_step import rounds_inbox
from speedstack.runtime.backends.gpu.resident import ResidentBackend
from speedstack.runtime.backends.gpu.semantics import multi_step
from speedstack.runtime.backends.gpu.semantics.layers import StepSemantics
from speedstack.runtime.decoding.results import Generation
from speedstack.runtime.model.weights import ModelWeights
from speedstack.runtime.plan.ir import Plan
from speedstack.runtime.plan.record_layout import OUTCOME
from speedstack.runtime.plan.verify.proof import prove
from speedstack.runtime.rounds.sampling import SamplingParams
from speedstack.runtime.rounds.speculation import DraftStrategy
from tests.runtime.backends.gpu.plan_cases import SMALL_CASES
from tests.runtime.plan.interpret import interpret

pytest.importorskip("triton", reason="triton is not installed: its kernels are not tested")
pytestmark = pytest.mark.interpret

MAX_LENGTH, NUM_ROWS = 32, 8
PROMPTS = [[5, 6, 7, 5, 6, 7, 5, 6], [9, 2, 9, 2, 4, 9]]
CUT_PROMPT = [8, 1, 8]
EOS = 3


def backend_of(weights: ModelWeights, num_programs: int, has_prompt_lookup: bool, **options: Any) -> ResidentBackend:
    backend = ResidentBackend(
        weights, None, 3, MAX_LENGTH, num_rows=NUM_ROWS, split_size=16, num_programs=num_programs, **options
    )
    backend.set_prompt_lookup(has_prompt_lookup)
    return backend


def requests_of(has_prompt_lookup: bool) -> list[RoundsRequest]:
    """Three, in no order of slots: one greedy; one drawn, that may commit five tokens; one drawn after a cut."""
    drafts = (3, 2) if has_prompt_lookup else (0, 0)
    return [
        RoundsRequest(PROMPTS[0], 1, MAX_LENGTH, False, drafts[0], 3),
        RoundsRequest(PROMPTS[1], 0, len(PROMPTS[1]) + 5, True, drafts[1], 2, Draw(2**63 + 1, 77, SamplingParams(0.8))),
        RoundsRequest(CUT_PROMPT, 2, MAX_LENGTH, False, 0, 2, Draw(3, 78, SamplingParams(1.5, top_p=0.9, top_k=20))),
    ]


def fill(backend: ResidentBackend) -> None:
    """Contexts that no prompt has: what is computed from them is all the same to what is tested here."""
    backend.memory.outbox.zero_()  # nothing is right because an earlier run left it there
    for cache in backend.memory.caches:
        cache.fill_(0.5)


@pytest.mark.parametrize("has_prompt_lookup", [False, True], ids=["plain", "look-up"])
def test_every_round_leaves_the_buffers_of_the_bodies(has_prompt_lookup: bool) -> None:
    """After every number of rounds: rows, sequences, texts, and reports of what stood."""
    weights = SMALL_CASES["dense"]()
    weights = replace(weights, spec=replace(weights.spec, eos_token_ids=(EOS,)))
    backend, requests, R = backend_of(weights, 3, has_prompt_lookup), requests_of(has_prompt_lookup), NUM_ROWS
    semantics = StepSemantics(backend.plan, weights)
    for keys, values in semantics.caches:
        keys.fill_(0.5)
        values.fill_(0.5)
    semantics.set_inbox(rounds_inbox(requests, R))
    for request in requests:
        semantics.history_RL[request.slot, : len(request.tokens)] = torch.tensor(request.tokens)
    accepted = 0
    fill(backend)
    backend.memory.inbox.copy_(rounds_inbox(requests, R))
    if has_prompt_lookup:
        backend.memory.buffers["history"].copy_(semantics.history_RL[:3])
    counters = np.zeros(backend.plan.num_counters, np.int64)
    for step in range(7):
        (report,) = backend.launch(1)
        interpret(backend.plan, semantics.semantics(), 1, seed=step, first_step=step, counters=counters)
        wanted_inbox = (semantics.rows_RF, semantics.sampling_RF, semantics.sequences_RF, semantics.draws_RF)
        for found, wanted in zip(backend.memory.inbox, wanted_inbox, strict=True):
            assert found.tolist() == wanted.tolist(), step
        if has_prompt_lookup:
            for request, length in zip(requests, semantics.sequences_RF[:, multi_step.LENGTH].tolist(), strict=False):
                text = backend.memory.buffers["history"][request.slot, :length]
                assert text.tolist() == semantics.history_RL[request.slot, :length].tolist()
        assert report[R:] == semantics.outcome_RO.flatten().tolist()
        used = [row for row in range(R) if semantics.chosen_R[row] >= 0]
        assert [report[row] for row in used] == semantics.chosen_R[used].tolist()
        accepted += int(semantics.outcome_RO[:, 1].sum())
    assert accepted > 2 or not has_prompt_lookup
    assert report[R + OUTCOME] == 0 < report[R], "the second is over and the first is not"


def run(backend: ResidentBackend, num_rounds: int = 4) -> tuple[list[list[Round]], list[torch.Tensor]]:
    fill(backend)
    assert backend.rounds is not None
    backend._rounds.forget([0, 1, 2])
    has_prompt_lookup = "history" in backend.plan.buffer_named
    rounds = backend.rounds.run(requests_of(has_prompt_lookup), num_rounds)
    return rounds, [cache.clone() for cache in backend.memory.caches]


def same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return a[0] == b[0] and all(torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True))


def test_rounds_are_the_same_under_every_schedule() -> None:
    """With 1, 3 and 8 programs, prefetching or not: bit for bit, keys and values too, rejected drafts' included."""
    weights = SMALL_CASES["qwen3-mxfp4"]()
    expected = run(backend_of(weights, 1, True))
    assert any(one.num_accepted for rounds in expected[0] for one in rounds)
    others = [backend_of(weights, 3, True, prefetch="none"), backend_of(weights, 8, True)]
    for seed in range(3):
        backend = others[seed % 2]
        backend.seed = seed
        assert same(run(backend), expected), f"seed {seed}, {backend.plan.num_programs} programs"


@pytest.mark.parametrize("has_prompt_lookup", [False, True], ids=["plain", "look-up"])
def test_a_launch_ends_with_its_last_sequence(has_prompt_lookup: bool) -> None:
    """What comes next is as after as many steps: counters, rounds, and steps of the host's."""
    weights = SMALL_CASES["dense"]()
    requests = [replace(one, end=len(one.tokens) + 2 + 2 * n) for n, one in enumerate(requests_of(has_prompt_lookup))]
    longest = max(one.end - len(one.tokens) for one in requests)
    ways: list[dict[str, Any]] = [{}, {"prefetch": "none"}]
    for number, options in enumerate(ways):
        backend = backend_of(weights, 3, has_prompt_lookup, seed=number, **options)
        backend.step(Rows([1], [0], [0]), [0])
        rates, expected, num_made = backend.counters.clone(), None, 1
        for _ in range(2):
            fill(backend)
            backend._rounds.forget([0, 1])
            found = backend.rounds.run(requests, 8)  # type: ignore[union-attr]
            expected = expected or found
            assert found == expected and sum(len(one.tokens) for one in found[1]) == 4
            num_rounds = max(len(rounds) for rounds in found)
            num_made += num_rounds
            assert backend.next_step == num_made and backend.memory.num_made == num_rounds <= longest < 8
            assert torch.equal(backend.counters, rates * num_made)
        _, best = backend.step(Rows([5, 9], [0, 1], [6, 7]), [0, 1])
        backend.repeat(2)
        assert torch.equal(backend.counters, rates * (num_made + 3)) and backend.next_step == num_made + 3
        assert backend.memory.chosen[0, :2].tolist() == best


@pytest.mark.parametrize("name", ["draft", "accept"])
def test_a_missing_wait_is_rejected_and_seen_by_some_schedule(name: str) -> None:
    """Drafting before the last round has been accepted, and accepting what has not been sampled yet."""
    from speedstack.runtime.backends.gpu.bindings.layers import bind
    from speedstack.runtime.backends.gpu.task_table import build_tasks

    backend = backend_of(SMALL_CASES["dense"](), 3, True, prefetch="none")
    expected, sound = run(backend), backend.plan

    def plant(plan: Plan) -> None:
        backend.plan = plan
        backend.tasks = build_tasks(plan, bind(plan, backend.weights, backend.memory), backend.device)

    phases = list(sound.phases)
    phases[sound.phase_named[name]] = replace(phases[sound.phase_named[name]], waits=())
    plant(replace(sound, phases=tuple(phases)))
    failure = prove(backend.plan).failure
    assert failure is not None and name in failure.edge
    for seed in range(40):
        backend.seed, backend.next_step = seed, 0
        backend.counters.zero_()
        if not same(run(backend), expected):
            return
    pytest.fail("no schedule shows it")


def texts(found: Sequence[Generation]) -> list[Any]:
    return [(one.tokens, one.finish_reason) for one in found]


def counts(found: Sequence[Generation]) -> list[Any]:
    stats = [one.stats for one in found]
    return [(s.num_rounds, s.num_rows, s.num_drafted, s.drafted_by_position, s.accepted_by_position) for s in stats]


def test_an_engine_writes_the_references_text_and_counts_its_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy and sampled, with prompt lookup in the kernel, without, and an end-of-sequence token on the way."""
    weights, strategy = SMALL_CASES["dense"](), DraftStrategy(num_drafts=5)
    launches = list[int]()
    launch = ResidentBackend._launch

    def counting(self: ResidentBackend, num_steps: int) -> None:
        launches.append(num_steps)
        launch(self, num_steps)

    monkeypatch.setattr(ResidentBackend, "_launch", counting)

    def write(backend: str, drafter: Any, **options: Any) -> list[Generation]:
        options_of_drafter = strategy if drafter else None
        engine = Engine(weights, drafter, None, backend, MAX_LENGTH, 2, options_of_drafter)
        return engine.generate(PROMPTS, max_new_tokens=10, **options)

    one, other = (found.tokens for found in write("reference", None))
    eos = next(token for token in one[4:] if token not in other)
    others = [token for token in range(weights.spec.vocab_size) if token not in (*one, *other)]
    weights = replace(weights, spec=replace(weights.spec, eos_token_ids=(*others[:4], eos)))
    expected, host = write("reference", None), write("reference", "ngram")
    assert {one.finish_reason for one in expected} == {"eos", "length"}
    assert texts(write("resident", None)) == texts(expected) == texts(host)
    # Both prompts, then both sequences until the longer one is done
    assert launches == [1, 8, 1]
    launches.clear()
    found = write("resident", "ngram")
    assert texts(found) == texts(host) and counts(found) == counts(host)
    assert sum(launches) == 1 + max(one.stats.num_rounds for one in host) and len(launches) == 3
    assert sum(sum(one.stats.accepted_by_position) for one in found) > 0
    drawn: dict[str, Any] = {"temperature": 0.7, "seed": 4}
    for cut in ({}, {"top_k": 4, "top_p": 0.95}):
        launches.clear()
        found = texts(write("resident", "ngram", **drawn, **cut))
        assert found == texts(write("reference", None, **drawn, **cut)) != texts(expected)
        assert max(launches) > 1, "several rounds a launch"
