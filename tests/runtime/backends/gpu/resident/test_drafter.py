"""The resident kernel drafts with a DFlash drafter: what the plan's semantics do, buffer by buffer; and texts.

Legend: R rows.
"""

from typing import Any, Literal

import numpy as np
import pytest
import torch

from speedstack.runtime import Engine
from speedstack.runtime.backends.base import Round, RoundsRequest
from speedstack.runtime.backends.gpu.multi_step import rounds_inbox
from speedstack.runtime.backends.gpu.resident import ResidentBackend
from speedstack.runtime.backends.gpu.semantics.layers import StepSemantics
from speedstack.runtime.plan.record_layout import NUM_ROWS, OUTCOME, RECORD, TOKEN
from speedstack.runtime.rounds.speculation import DraftStrategy
from tests.runtime.backends.gpu.drafter_cases import (
    MAX_LENGTH,
    OPTIONS,
    PROMPTS,
    HostRounds,
    drafter,
    prompt_steps,
    read,
    target,
)
from tests.runtime.backends.gpu.test_rounds import check_same
from tests.runtime.plan.interpret import interpret

pytest.importorskip("triton", reason="triton is not installed: its kernels are not tested")
pytestmark = pytest.mark.interpret

R, SPLIT = 16, 16


def backend_of(options: str, num_programs: int, **others: Any) -> ResidentBackend:
    return ResidentBackend(
        target(), drafter(options), 2, MAX_LENGTH, num_rows=R, split_size=SPLIT, num_programs=num_programs, **others
    )


@pytest.mark.parametrize("options", OPTIONS)
def test_every_step_leaves_the_buffers_of_the_bodies(options: str) -> None:
    """Prompts by the host's steps, then rounds: blocks, proposals, rows, contexts, all that was written."""
    backend, weights, model = backend_of(options, 3), target(), drafter(options)
    plan, buffers = backend.plan, backend.memory.buffers
    semantics = StepSemantics(plan, weights, 2, read(model))
    assert semantics.drafter is not None
    host, counters, step = HostRounds(weights, model, PROMPTS), np.zeros(plan.num_counters, np.int64), 0

    def check() -> None:
        assert semantics.drafter is not None
        blocks, used = buffers["blocks"].view(R, RECORD), semantics.drafter.blocks_RF[:, TOKEN] >= 0
        fields = slice(TOKEN, NUM_ROWS + 1)
        assert blocks[:, fields].tolist() == semantics.drafter.blocks_RF[:, fields].tolist()
        assert backend.memory.rows.tolist() == semantics.rows_RF.tolist()
        assert backend.memory.sequences.tolist() == semantics.sequences_RF.tolist()
        rows_used = semantics.rows_RF[:, TOKEN] >= 0
        wide: dict[str, Any] = {
            "rtol": 1e-4,
            "atol": 3e-5,
        }  # float32 sums of up to 80 terms in another order, through four layers
        heads = semantics.drafter.num_heads
        raw = buffers["context.kv"].view(heads, -1, R)[:, :48].permute(2, 0, 1)
        torch.testing.assert_close(raw[rows_used], semantics.drafter.kv_RGC[rows_used][:, :, :48], **wide)
        for found, wanted in zip(backend.memory.contexts, semantics.caches[weights.spec.num_layers :], strict=True):
            both = torch.cat(wanted, dim=-1).permute(2, 0, 1, 3)
            torch.testing.assert_close(found, both.nan_to_num(0.0), **wide)
        if used.any():
            best = buffers["drafter.best"].view(-1, 2, R)
            values = best[:, 0].contiguous().view(torch.float32).T[used]
            torch.testing.assert_close(values, semantics.drafter.best_RT2[used][:, :, 0], **wide)
            assert best[:, 1].T[used].tolist() == semantics.drafter.best_RT2[used][:, :, 1].int().tolist()
        for sequence, count in enumerate(semantics.proposals_RR[:2, 0].tolist()):
            found = buffers["proposals"].view(R, R)[sequence, : 1 + count]
            assert found.tolist() == semantics.proposals_RR[sequence, : 1 + count].tolist()

    for rows in prompt_steps(PROMPTS, 8):
        backend.step(rows, [])
        semantics.set_rows(list(rows.tokens), list(rows.slots), list(rows.positions))
        interpret(plan, semantics.semantics(), 1, seed=step, first_step=step, counters=counters)
        step += 1
        check()
    inbox = rounds_inbox(host.requests([MAX_LENGTH, 9]), R)
    backend.memory.inbox.copy_(inbox)
    semantics.set_inbox(inbox)
    for _ in range(3):
        (report,) = backend.launch(1)
        interpret(plan, semantics.semantics(), 1, seed=step, first_step=step, counters=counters)
        step += 1
        check()
        assert report[R:] == semantics.outcome_RO.flatten().tolist()
    assert report[R + OUTCOME] == 0 < report[R], "the second is over and the first is not"


def run(backend: ResidentBackend, start: list[torch.Tensor]) -> tuple[list[list[Round]], list[torch.Tensor]]:
    """Two rounds of two sequences from the same contexts every time: the rounds, and all keys and values after it."""
    backend.memory.outbox.zero_()  # nothing is right because an earlier run left it there
    state = [*backend.memory.caches, backend.memory.contexts]
    for tensor, was in zip(state, start, strict=True):
        tensor.copy_(was)
    requests = [RoundsRequest(PROMPTS[0], 1, MAX_LENGTH, False, 4), RoundsRequest(PROMPTS[1], 0, 11, False, 4)]
    assert backend.rounds is not None
    return backend.rounds.run(requests, 2), [tensor.clone() for tensor in state]


def test_rounds_are_the_same_under_every_schedule(num_interleavings: int) -> None:
    """With 1, 3 and 8 programs, prefetching or not: bit for bit, keys and values of rejected drafts and masks too."""
    one = backend_of("mimo", 1)
    generator = torch.Generator().manual_seed(0)
    state = [*one.memory.caches, one.memory.contexts]
    start = [torch.randn(tensor.shape, generator=generator) for tensor in state]
    expected = run(one, start)
    assert all(rounds[0].num_proposed > 0 for rounds in expected[0])
    others = [backend_of("mimo", 3, prefetch="none"), backend_of("mimo", 8)]
    for seed in range(-(-num_interleavings // 100)):
        backend = others[seed % 2]
        backend.seed = seed
        found = run(backend, start)
        assert found[0] == expected[0], seed
        assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True)), seed


def test_engine_writes_the_same_text_in_fewer_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt by the host, rounds without it, and one with it again, which drafts from the same contexts."""
    weights, model, backend = target(), drafter(), backend_of("plain", 3)
    with monkeypatch.context() as patch:
        patch.setattr("speedstack.runtime.engine.make_backend", lambda *args: backend)
        engine = Engine(weights, model, None, "reference", MAX_LENGTH, 1)
    reference = Engine(weights, model, None, "reference", MAX_LENGTH, 1)
    launches = list[int]()
    make = backend._launch

    def counted(num_steps: int) -> None:
        launches.append(num_steps)
        make(num_steps)

    monkeypatch.setattr(backend, "_launch", counted)
    cases: tuple[tuple[Literal["none", "shared"], dict[str, Any]], ...] = (
        ("none", {}),
        ("shared", {"temperature": 0.7, "seed": 1}),
    )
    for noise, options in cases:
        engine.set_strategy(DraftStrategy(noise=noise))
        reference.set_strategy(DraftStrategy(noise=noise))
        expected = reference.generate(PROMPTS[0], max_new_tokens=12, **options)
        check_same([engine.generate(PROMPTS[0], max_new_tokens=12, **options)], [expected])
        assert expected.stats.num_drafted > expected.stats.num_rounds
    assert launches[:2] == [1, 8], "a prompt, and rounds"
    assert backend.weight_bytes()["drafter"] > sum(p.nbytes for p in model.parameters())
