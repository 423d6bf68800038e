"""Plans with a drafter: safe and tight, costed, and executed in PyTorch they draft what the drafter's module drafts.

Legend: R rows.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from speedstack.runtime.backends.gpu.multi_step import rounds_inbox
from speedstack.runtime.backends.gpu.semantics.layers import StepSemantics
from speedstack.runtime.model.config_file import read_model_config
from speedstack.runtime.model.drafter_spec import drafter_spec, why_not_planned
from speedstack.runtime.model.weight_formats import WeightFormats
from speedstack.runtime.perf.cost import step_cost, weights_bytes
from speedstack.runtime.perf.gpus import gpu_named
from speedstack.runtime.plan.ir import Plan
from speedstack.runtime.plan.record_layout import FIRST_PROPOSED, LENGTH, NUM_ROWS, TOKEN
from speedstack.runtime.plan.step import build_plan
from speedstack.runtime.plan.verify.proof import prove
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
from tests.runtime.plan.interpret import interpret
from tests.runtime.plan.test_scheduler import Guarded

SPLIT, R = 16, 16
QWEN3 = Path(__file__).parents[2] / "shapes" / "qwen3-30b-a3b.json"


def plan_of(num_programs: int, rows: int = R, options: str = "plain", **changes: Any) -> Plan:
    spec = drafter_spec(drafter(options, **changes).config)
    return build_plan(target().spec, WeightFormats(), num_programs, rows, MAX_LENGTH, SPLIT, drafter=spec)


@pytest.mark.parametrize(("num_programs", "rows"), [(1, 1), (2, 16), (3, 3), (8, 1), (37, 5), (300, 16)])
def test_any_number_of_programs_and_rows_is_safe(num_programs: int, rows: int) -> None:
    for options in OPTIONS:
        for taps in ((1, 0), (0,)):
            proof = prove(plan_of(num_programs, rows, options, target_layer_ids=taps))
            assert proof.is_safe, proof.failure


def mutants(plan: Plan, index: int) -> list[Plan]:
    """A phase without its signals, without its wait, and with thresholds that are lower and higher."""
    phase = plan.phases[index]
    (wait,) = phase.waits
    others = [(), *((replace(wait, offset=wait.offset + by),) for by in (-1, 1, -wait.per_step))]
    changed = [replace(phase, waits=one) for one in others]
    if phase.signals:
        changed.append(replace(phase, signals=()))
    return [replace(plan, phases=(*plan.phases[:index], one, *plan.phases[index + 1 :])) for one in changed]


@pytest.mark.parametrize(("taps", "idle"), [((1, 0), ["lm_head"]), ((0,), ["L01.qkv", "context"])])
def test_every_wait_and_every_signal_is_needed(taps: tuple[int, ...], idle: list[str]) -> None:
    """Fusing waits for what the next phase waits for again; with layers in between, `context` waits for nothing new."""
    plan = plan_of(3, 3, target_layer_ids=taps)
    spared = Counter[str]()
    for index, phase in enumerate(plan.phases):
        for mutant in mutants(plan, index):
            spared[phase.name] += prove(mutant).is_safe
    assert {name: count for name, count in spared.items() if count} == dict.fromkeys(idle, 3)


def test_no_two_phases_that_depend_can_be_swapped() -> None:
    plan = plan_of(3, 3)
    free = []
    for index in range(len(plan.phases) - 1):
        a, b = plan.phases[index : index + 2]
        swapped = replace(plan, phases=(*plan.phases[:index], b, a, *plan.phases[index + 2 :]))
        if prove(swapped).is_safe:
            free.append((a.name, b.name))
    # The context and the choice of tokens have nothing to do with each other.
    assert free == [("context", "lm_head"), ("lm_head", "append"), ("append", "logit_histogram")]


def test_buffers_that_live_at_once_cannot_share_memory() -> None:
    plan = plan_of(3, 3)
    names = [buffer.name for buffer in plan.buffers]
    pairs = [("blocks", "drafter.best"), ("proposals", "chosen"), ("context", "scaled"), ("context.kv", "context")]
    pairs += [("blocks", "sequences"), ("drafter.cache", "L00.cache"), ("features.1", "hidden")]
    for a, b in pairs:
        buffers = list(plan.buffers)
        buffers[names.index(b)] = replace(buffers[names.index(b)], memory=a, offset=0)
        buffers[names.index(a)] = replace(buffers[names.index(a)], memory=a, offset=0)
        failure = prove(replace(plan, buffers=tuple(buffers))).failure
        # Nobody who reads a cache names who wrote it.
        assert (failure is None) == (b == "L00.cache"), (a, b)


def test_cost_by_hand() -> None:
    """Bytes of the drafter's matrices: its own once, and again what the context projects with and the LM head."""
    spec, formats = read_model_config(QWEN3)
    D, F, width, kv = spec.hidden_size, 6144, 32 * 128, 8 * 128
    model = drafter_spec(
        replace(
            drafter().config, hidden_size=D, intermediate_size=F, num_hidden_layers=5, num_attention_heads=32,
            num_key_value_heads=8, head_dim=128, vocab_size=spec.vocab_size, num_target_layers=48, block_size=16,
            target_layer_ids=(1, 12, 23, 34, 45),
        )
    )  # fmt: skip
    with_it = build_plan(spec, formats, 132, 8, 1024, drafter=model)
    without = build_plan(spec, formats, 132, 8, 1024)
    assert prove(with_it).is_safe
    layer = (width + 2 * kv) * D + D * width + 3 * D * F
    own = 2 * (5 * D * D + 5 * layer)
    again = 2 * (5 * 2 * kv * D + spec.vocab_size * D)
    norms = 2 * (2 * 5 * D + 2 * D)
    kept = weights_bytes(with_it, 0.0) - weights_bytes(without, 0.0)
    assert kept == own + norms
    gpu = gpu_named("H200")
    costs = [step_cost(plan, gpu, 8, 1, 1024) for plan in (with_it, without)]
    read_bytes = costs[0].memory_bytes - costs[1].memory_bytes
    context = 5 * 8 * 2 * 128 * 2 * 1024
    embedded = 8 * D * 2
    assert read_bytes == own + again + norms + context + embedded


@pytest.mark.parametrize(("options", "num_programs"), [*zip(OPTIONS, (1, 3, 8), strict=True), ("mimo", 1)])
def test_a_plan_drafts_what_the_module_drafts(options: str, num_programs: int) -> None:
    """Two prompts by the host's steps, then rounds without it: proposals, what of them stands, and the contexts."""
    weights, model = target(), drafter(options)
    drafter_weights = read(model)
    plan = plan_of(num_programs, R, options)
    memory, counters = StepSemantics(plan, weights, drafter=drafter_weights), np.zeros(plan.num_counters, np.int64)
    assert memory.drafter is not None
    host, step = HostRounds(weights, model, PROMPTS), 0
    for rows in prompt_steps(PROMPTS, 8):
        memory.set_rows(list(rows.tokens), list(rows.slots), list(rows.positions))
        interpret(plan, memory.semantics(), 1, seed=step, first_step=step, counters=counters)
        assert (memory.drafter.blocks_RF[:, TOKEN] == -1).all() and not memory.hidden_RD[
            : len(rows.tokens)
        ].isnan().any()
        step += 1
    ends = [MAX_LENGTH, 14]
    memory.set_inbox(rounds_inbox(host.requests(ends), R))
    num_accepted, num_drafted = 0, 0
    for _ in range(9):
        wanted = [host.drafts(slot, end) for slot, end in enumerate(ends)]
        interpret(plan, memory.semantics(), 1, seed=step, first_step=step, counters=counters)
        step += 1
        for slot, end in enumerate(ends):
            num_rows, stood, num_proposed = memory.outcome_RO[slot].tolist()
            if len(host.texts[slot]) == end:
                assert num_rows == 0
                continue
            assert num_proposed == len(wanted[slot])
            proposed = memory.proposals_RR[slot, FIRST_PROPOSED : FIRST_PROPOSED + num_proposed]
            assert proposed.tolist() == wanted[slot]
            assert num_rows == 1 + len(wanted[slot])
            assert host.round(slot, end) == stood
            assert memory.sequences_RF[slot, LENGTH] == len(host.texts[slot])
            num_accepted, num_drafted = num_accepted + stood, num_drafted + len(wanted[slot])
    assert len(host.texts[1]) == ends[1] and memory.rows_RF[1, NUM_ROWS] == 0
    assert 3 <= num_accepted < num_drafted, "some stand and some do not"
    for layer, (keys, values) in enumerate(memory.caches[weights.spec.num_layers :]):
        for slot, text in enumerate(host.texts):
            seen, context = len(text) - 1, host.backend.drafter.contexts[slot]  # type: ignore[union-attr]
            # float32 sums of up to 80 terms in another order, through the target's layers
            torch.testing.assert_close(keys[slot, :seen], context.keys_LTGH[layer, :seen], rtol=1e-4, atol=3e-5)
            torch.testing.assert_close(values[slot, :seen], context.values_LTGH[layer, :seen], rtol=1e-4, atol=3e-5)


def test_items_touch_only_what_their_phases_declare() -> None:
    """Rounds, item by item, with everything poisoned that a phase does not declare to read."""
    weights, model = target(), drafter("mimo")
    plan = plan_of(1, 6, "mimo")
    memories = [StepSemantics(plan, weights, drafter=read(model)) for _ in range(2)]
    host = HostRounds(weights, model, [prompt[:5] for prompt in PROMPTS])
    host.num_drafts = 2
    poisoned, free = memories
    guarded, semantics, counters = Guarded(plan, poisoned), poisoned.semantics(), np.zeros(plan.num_counters, np.int64)
    for memory in memories:
        for keys, values in memory.caches:
            keys.fill_(0.5)
            values.fill_(0.5)
        memory.set_inbox(rounds_inbox(host.requests([MAX_LENGTH, 8]), plan.rows))
    own = ("D", "pick", "embed", "fuse", "context", "append")  # the others are guarded elsewhere
    for step in range(2):
        for phase in plan.phases:
            for item in range(phase.num_items):
                if phase.name.startswith(own):
                    guarded.run(phase, phase.index(item), semantics[phase.op], step)
                else:
                    list(semantics[phase.op](phase, phase.index(item), step) or ())
        interpret(plan, free.semantics(), 1, first_step=step, counters=counters)
        for name in ("rows_RF", "sequences_RF", "outcome_RO", "proposals_RR"):
            assert torch.equal(getattr(poisoned, name), getattr(free, name)), (step, name)
        assert poisoned.drafter is not None and free.drafter is not None
        assert torch.equal(poisoned.drafter.blocks_RF, free.drafter.blocks_RF), step
    assert guarded.num_checked > 1000


def test_a_context_of_nan_drafts_nothing() -> None:
    """And the text goes on a token a step, as the host's does."""
    weights, model = target(), drafter()
    plan = plan_of(3)
    memory = StepSemantics(plan, weights, drafter=read(model))
    assert memory.drafter is not None
    host = HostRounds(weights, model, PROMPTS)
    for keys, values in memory.caches[: weights.spec.num_layers]:
        keys.fill_(0.5)
        values.fill_(0.5)
    memory.set_inbox(rounds_inbox(host.requests([MAX_LENGTH] * 2), R))
    interpret(plan, memory.semantics(), 1)
    assert memory.outcome_RO[:2].tolist() == [[1, 0, 0], [1, 0, 0]]


@pytest.mark.parametrize("options", OPTIONS)
def test_what_is_held_twice_is_counted(options: str) -> None:
    """Matrices that are put together, and those of attention again, which kernels take sorted; the rest is shared."""
    model = drafter(options)
    weights = read(model)
    attentions, mlps = [one.attention for one in weights.layers], [one.mlp for one in weights.layers]
    held = [vars(one).values() for one in (weights, *attentions, *mlps)]
    own = {parameter.data_ptr() for parameter in model.parameters()}
    tensors = [each for values in held for each in values if isinstance(each, torch.Tensor)]
    copied = sum(tensor.nbytes for tensor in tensors if tensor.data_ptr() not in own)
    assert len(tensors) >= 3 + 2 * 8
    assert weights.joined_bytes() == copied + sum(one.qkv_OD.nbytes for one in attentions) > 0


def test_what_has_no_phases_is_named() -> None:
    options: tuple[tuple[str, dict[str, Any]], ...] = (
        ("Markov", {"markov_rank": 4}),
        ("pruned vocabulary", {"draft_vocab_size": 6}),
    )
    for name, changes in options:
        reason = why_not_planned(drafter(**changes).config)
        assert reason is not None and name in reason
    assert all(why_not_planned(drafter(each).config) is None for each in OPTIONS)
