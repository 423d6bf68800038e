"""Plans executed: the numbers of the reference backend under any schedule, and a wrong plan caught with a dump."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from speedstack.quant.checkpoint import load_checkpoint
from speedstack.quant.fp8 import FP8Tensor, quantize_fp8
from speedstack.runtime.backends.base import Draw, RoundsRequest, Rows
from speedstack.runtime.backends.gpu.buffers import step_inbox
from speedstack.runtime.backends.gpu.multi_step import rounds_inbox
from speedstack.runtime.backends.gpu.semantics.layers import StepSemantics
from speedstack.runtime.backends.reference import ReferenceBackend
from speedstack.runtime.model.families.registry import spec_from_config
from speedstack.runtime.model.weight_formats import WeightFormats
from speedstack.runtime.model.weights import ModelWeights, read_weights
from speedstack.runtime.plan.ir import Phase, Plan, Region, at
from speedstack.runtime.plan.step import build_plan
from speedstack.runtime.plan.verify.proof import prove
from speedstack.runtime.plan.verify.scheduler import Deadlock, Scheduler
from speedstack.runtime.rounds.sampling import GREEDY, LEAST_TEMPERATURE, SamplingParams
from tests.runtime.plan.interpret import interpret

CPU = torch.device("cpu")
INTEGERS = ("rows", "sequences", "proposals", "chosen", "outcome", "history", "blocks", "bins")
POISON = -7  # no token, nor anything that is written
SPLIT = 16  # many splits in a context of a few dozen


def weights_of(model: Any, tensors: dict[str, Any] | None = None) -> ModelWeights:
    spec = spec_from_config(model.config)
    return read_weights(spec, tensors or dict(model.state_dict()), torch.float32, CPU, tied=False)


def qwen3_moe() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(  # type: ignore[call-arg]
        vocab_size=64, hidden_size=40, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=24, num_experts=6, num_experts_per_tok=2,
        norm_topk_prob=True, mlp_only_layers=[0], max_position_embeddings=256,
    )  # fmt: skip
    return _random(Qwen3MoeForCausalLM(config))


def gpt_oss() -> Any:
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=64, hidden_size=40, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=6, num_experts_per_tok=2, sliding_window=20,
        max_position_embeddings=256,
    )  # fmt: skip
    return _random(GptOssForCausalLM(config))


def _random(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2, generator=generator)
    return model.eval()


def plan_of(weights: ModelWeights, num_programs: int, rows: int = 3) -> Plan:
    return build_plan(weights.spec, WeightFormats(), num_programs, rows, max_context=96, split_size=SPLIT)


def check_against_reference(weights: ModelWeights, num_programs: int, seed: int) -> None:
    """Prompts of three sequences, then mixed steps: logits, caches and sampled tokens are the reference's."""
    plan = plan_of(weights, num_programs)
    memory, counters = StepSemantics(plan, weights), np.zeros(plan.num_counters, np.int64)
    reference = ReferenceBackend(weights, None, plan.rows, 96)
    rng, lengths = random.Random(seed), [0, 0, 0]
    # Three rows of one sequence, two and one, one of each, one alone: 25 positions or more, past one split and a window
    for step in range(27):
        slots = sorted(rng.choice([[0, 0, 0], [0, 0, 1], [0, 1, 2], [0]]))
        positions = [lengths[slot] + slots[:row].count(slot) for row, slot in enumerate(slots)]
        tokens = [rng.randrange(weights.spec.vocab_size) for _ in slots]
        for slot in slots:
            lengths[slot] += 1
        memory.set_rows(tokens, slots, positions)
        interpret(plan, memory.semantics(), 1, seed=31 * seed + step, first_step=step, counters=counters)
        expected_RV, best = reference.step(Rows(tokens, slots, positions), range(len(slots)))
        # float32 sums in another order, through a few layers; logits up to about 20
        torch.testing.assert_close(memory.logits_RV[: len(slots)], expected_RV, rtol=1e-4, atol=1e-4)
        assert memory.chosen_R[: len(slots)].tolist() == best
    for (keys, values), cache in zip(memory.caches, reference.caches, strict=True):
        ring = keys.shape[1]
        for slot, length in enumerate(lengths):
            # the ring of a window is longer than the window
            seen = [position % ring for position in range(max(0, length - ring), length)]
            torch.testing.assert_close(keys[slot, seen], cache.k_SLGH[slot, seen], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(values[slot, seen], cache.v_SLGH[slot, seen], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_programs", [1, 3, 8])
def test_mimo_plan_computes_the_reference(num_programs: int, tiny_packed_dir: Path) -> None:
    checkpoint = load_checkpoint(tiny_packed_dir)
    check_against_reference(weights_of(checkpoint, dict(checkpoint.tensors)), num_programs, seed=num_programs)


def test_plan_of_fp8_weights_computes_the_reference(tiny_packed_dir: Path) -> None:
    checkpoint = load_checkpoint(tiny_packed_dir)
    tensors: dict[str, Any] = dict(checkpoint.tensors)
    for name, tensor in checkpoint.tensors.items():
        if isinstance(tensor, torch.Tensor) and name.endswith(("_proj.weight", "lm_head.weight")):
            tensors[name] = quantize_fp8(tensor.float())
    weights = weights_of(checkpoint, tensors)
    assert all(isinstance(matrix, FP8Tensor) for matrix in weights.linears())
    check_against_reference(weights, 3, seed=3)


@pytest.mark.parametrize("build", [qwen3_moe, gpt_oss])
def test_plans_of_other_families_compute_the_reference(build: Callable[[], Any]) -> None:
    check_against_reference(weights_of(build()), 3, seed=7)


class Guarded:
    """Runs items one by one with everything poisoned that their phase does not declare to read, and sees that nothing
    changes that it does not declare to write."""

    def __init__(self, plan: Plan, memory: StepSemantics) -> None:
        self.plan, self.memory = plan, memory
        self.num_checked = 0

    def views(self, buffer: str) -> list[torch.Tensor]:
        """Tensors of a buffer whose first dimension counts its cells."""
        memory, kind = self.memory, buffer.partition(".")[0]
        if buffer.startswith(("blocks", "drafter", "context")):
            return self.drafter_views(buffer)
        if buffer.endswith(".cache"):
            return [part.movedim(2, 0) for part in memory.caches[int(buffer[1:3])]]
        if buffer in ("chains", "notes"):  # what kernels note; the semantics sort
            return []
        whole = {
            "rows": memory.rows_RF,
            "sequences": memory.sequences_RF,
            "chosen": memory.chosen_R[:, None],
            "proposals": memory.proposals_RR,
            "outcome": memory.outcome_RO,
            "history": memory.history_RL,
            "hidden": memory.hidden_RD,
            "scaled": memory.scaled_RD,
            "squares": memory.squares_RB,
            "logits": memory.logits_RV,
            "best": memory.best_RT2,
            "peaks": memory.peaks_RT,
            "bins": memory.bins_R2N,
        }
        tensor = (memory.shared | memory.mixture.shared | memory.features | whole)[buffer]
        if kind == "qkv":
            return [tensor.flatten(1).movedim(1, 0)]
        if kind in ("partial", "attended"):
            return [tensor.flatten(0, 1)]
        is_cellwise = kind in INTEGERS or buffer.startswith(("act.moe", "routes"))
        return [tensor if is_cellwise else tensor.movedim(1, 0)]

    def drafter_views(self, buffer: str) -> list[torch.Tensor]:
        assert self.memory.drafter is not None
        one = self.memory.drafter
        return {
            "blocks": [one.blocks_RF],
            "drafter.best": [one.best_RT2.movedim(1, 0)],
            "context": [one.context_RD.T],
            "context.squares": [one.squares_RB.T],
            "context.kv": [one.kv_RGC.flatten(1).T],
            "drafter.cache": [one.keys_GSTH, one.values_GSTH],
        }[buffer]

    def cells(self, region: Region, index: tuple[int, ...]) -> set[int]:
        first = at(region.start, region.strides, index)
        return set(range(first, min(first + region.length, self.plan.buffer_named[region.buffer].num_cells)))

    def run(self, phase: Phase, index: tuple[int, ...], body: Any, step: int) -> None:
        readable: dict[str, set[int]] = {buffer.name: set() for buffer in self.plan.buffers}
        writable: dict[str, set[int]] = {buffer.name: set() for buffer in self.plan.buffers}
        for read in phase.reads:
            readable[read.region.buffer] |= self.cells(read.region, index)
        for write in phase.writes:
            writable[write.buffer] |= self.cells(write, index)
        saved = {name: [view.clone() for view in self.views(name)] for name in readable}
        for name, allowed in readable.items():
            hidden = [cell for cell in range(self.plan.buffer_named[name].num_cells) if cell not in allowed]
            for view in self.views(name):
                view[hidden] = POISON if name in INTEGERS else float("nan")
        poisoned = {name: [view.clone() for view in self.views(name)] for name in readable}
        for _ in body(phase, index, step) or ():
            pass
        for name in readable:
            for view, was, poison in zip(self.views(name), saved[name], poisoned[name], strict=True):
                same = (view == poison) | ((view != view) & (poison != poison))
                changed = (~same.flatten(1).all(1)).nonzero().flatten().tolist()
                assert set(changed) <= writable[name], f"{phase.name}{index} changes {name} {changed}"
                untouched = same.nonzero(as_tuple=True)
                view[untouched] = was[untouched]
                self.num_checked += 1


@pytest.mark.parametrize("build", [qwen3_moe, gpt_oss])
def test_items_touch_only_what_their_phases_declare(build: Callable[[], Any]) -> None:
    """The proof believes what phases declare; this is where the declarations are held against what is computed."""
    weights = weights_of(build())
    plan = plan_of(weights, 1)
    memory, reference = StepSemantics(plan, weights), ReferenceBackend(weights, None, 3, 96)
    guarded, semantics = Guarded(plan, memory), memory.semantics()
    for step, (slots, positions) in enumerate([([0, 0, 1], [0, 1, 0]), ([0, 1, 2], [2, 1, 0]), ([0], [3])]):
        tokens = [7 * step + slot for slot in slots]
        memory.set_rows(tokens, slots, positions)
        for phase in plan.phases:
            for item in range(phase.num_items):
                guarded.run(phase, phase.index(item), semantics[phase.op], step)
        expected_RV, _ = reference.step(Rows(tokens, slots, positions), range(len(slots)))
        # as above
        torch.testing.assert_close(memory.logits_RV[: len(slots)], expected_RV, rtol=1e-4, atol=1e-4)
    assert guarded.num_checked > 1000


@pytest.mark.parametrize("has_prompt_lookup", [False, True])
def test_rounds_touch_only_what_their_phases_declare(has_prompt_lookup: bool) -> None:
    """Two sequences that go on by themselves, one of which ends: they do what they do with nothing poisoned."""
    weights = weights_of(qwen3_moe())
    plan = build_plan(
        weights.spec, WeightFormats(), 1, 6, max_context=32, split_size=SPLIT, has_prompt_lookup=has_prompt_lookup
    )
    requests = [
        RoundsRequest([5, 6, 5], 1, 12, True, 2 * has_prompt_lookup, 2),
        RoundsRequest([7, 7], 0, 4, True, has_prompt_lookup, 2),
    ]
    memories = [StepSemantics(plan, weights) for _ in range(2)]
    for memory in memories:
        memory.set_inbox(rounds_inbox(requests, plan.rows))
        for request in requests:
            memory.history_RL[request.slot, : len(request.tokens)] = torch.tensor(request.tokens)
        for keys, values in memory.caches:
            keys.fill_(0.5)
            values.fill_(0.5)
    poisoned, free = memories
    guarded, semantics, counters = Guarded(plan, poisoned), poisoned.semantics(), np.zeros(plan.num_counters, np.int64)
    for step in range(4):
        for phase in plan.phases:
            for item in range(phase.num_items):
                guarded.run(phase, phase.index(item), semantics[phase.op], step)
        interpret(plan, free.semantics(), 1, first_step=step, counters=counters)
        for name in ("rows_RF", "sequences_RF", "outcome_RO", "history_RL"):
            assert torch.equal(getattr(poisoned, name), getattr(free, name)), (step, name)
    assert free.outcome_RO[0, 0] > 0 == free.outcome_RO[1, 0], "one is over"
    assert guarded.num_checked > 1000


def run_alone(weights: ModelWeights, plan: Plan, num_steps: int, seed: int) -> list[list[int]]:
    """Tokens of three sequences that go on by themselves for some steps without the host."""
    memory = StepSemantics(plan, weights)
    requests = [RoundsRequest([5 + slot], slot, plan.max_context, False) for slot in range(3)]
    memory.set_inbox(rounds_inbox(requests, plan.rows))
    seen: list[list[int]] = []
    semantics = dict(memory.semantics())
    sample = semantics["sample"]

    def recording(phase: Any, index: tuple[int, ...], step: int) -> Any:
        yield from sample(phase, index, step) or ()
        seen.append([step, index[0], int(memory.chosen_R[index[0]])])

    semantics["sample"] = recording
    interpret(plan, semantics, num_steps, seed=seed)
    return sorted(seen)


def test_steps_without_the_host_say_the_same_under_every_schedule() -> None:
    weights = weights_of(qwen3_moe())
    reference = ReferenceBackend(weights, None, 3, 96)
    expected, tokens = [], [5, 6, 7]
    for step in range(6):
        _, tokens = reference.step(Rows(tokens, [0, 1, 2], [step] * 3), range(3))
        expected += [[step, row, token] for row, token in enumerate(tokens)]
    assert len({token for _, _, token in expected}) > 4, "a text that could be wrong"
    for seed in range(8):
        assert run_alone(weights, plan_of(weights, 1 + seed % 5), 6, seed) == expected, f"seed {seed}"


def without_wait(plan: Plan, name: str) -> Plan:
    phases = list(plan.phases)
    phases[plan.phase_named[name]] = replace(phases[plan.phase_named[name]], waits=())
    return replace(plan, phases=tuple(phases))


@pytest.mark.parametrize("name", ["L00.qkv", "L00.attention", "L01.combine", "L01.o_proj", "L01.gate_up", "L01.down"])
def test_a_missing_wait_is_seen_by_some_schedule(name: str) -> None:
    """What the proof rejects does happen: a handful of schedules is enough to get another text, or none."""
    weights = weights_of(qwen3_moe())
    plan = plan_of(weights, 3)
    broken = without_wait(plan, name)
    failure = prove(broken).failure
    assert failure is not None and name in failure.message
    expected = run_alone(weights, plan, 2, 0)
    wrong = [seed for seed in range(12) if run_alone(weights, broken, 2, seed) != expected]
    assert wrong, "no schedule shows it"


def test_a_missing_signal_is_a_dump_and_not_a_hang() -> None:
    weights = weights_of(qwen3_moe())
    plan = plan_of(weights, 3)
    phases = list(plan.phases)
    index = plan.phase_named["L00.combine"]
    phases[index] = replace(phases[index], signals=())
    memory = StepSemantics(plan, weights)
    memory.set_rows([5], [0], [0])
    with pytest.raises(Deadlock) as caught:
        interpret(replace(plan, phases=tuple(phases)), memory.semantics(), 1)
    assert set(caught.value.waiting) == {0, 1, 2}
    assert "program 1: step 0, L00.o_proj: L00.combine[0] is 0 and has to reach 3" in str(caught.value)


def counting(seed: int, trace: list[int] | None = None) -> tuple[list[int], list[int]]:
    """The order in which three programs of four pieces each run, and the trace."""
    scheduler, order = Scheduler(seed, trace), list[int]()

    def body(program: int) -> None:
        for _ in range(4):
            order.append(program)
            scheduler.pause(program)

    scheduler.run(3, body)
    return order, scheduler.trace


def test_a_seed_is_a_schedule_and_a_trace_replays_it() -> None:
    orders = {seed: counting(seed) for seed in range(10)}
    assert all(counting(seed) == result for seed, result in orders.items())
    assert len({tuple(order) for order, _ in orders.values()}) > 5
    assert counting(99, orders[4][1])[0] == orders[4][0]
    assert all(sorted(order) == [0] * 4 + [1] * 4 + [2] * 4 for order, _ in orders.values())


def test_an_error_in_a_program_ends_the_run() -> None:
    scheduler = Scheduler(0)

    def body(program: int) -> None:
        scheduler.pause(program)
        if program == 1:
            raise ZeroDivisionError("one failed")
        scheduler.wait(program, lambda: False, "what never comes")

    with pytest.raises(ZeroDivisionError, match="one failed"):
        scheduler.run(3, body)


def test_how_a_token_is_drawn_is_read_off_the_records() -> None:
    """At the least temperature too, whose float32 lies a little below it."""
    weights = weights_of(qwen3_moe())
    plan = plan_of(weights, 2)
    memory = StepSemantics(plan, weights)
    chosen = (SamplingParams(LEAST_TEMPERATURE, 0.5, 3), SamplingParams(0.75, 1.0, 7))
    draws = [*(Draw(1, 2, params) for params in chosen), None]
    memory.set_inbox(step_inbox(Rows([5, 6, 7], [0, 1, 2], [0, 0, 0], draws=draws), plan.rows))
    assert [memory.params(row) for row in range(3)] == [*chosen, GREEDY]


def test_every_op_needs_a_body() -> None:
    weights = weights_of(qwen3_moe())
    plan = plan_of(weights, 2)
    semantics = StepSemantics(plan, weights).semantics()
    del semantics["router"]
    with pytest.raises(ValueError, match="no body for router"):
        interpret(plan, semantics, 1)
