"""Faults planted in what the resident kernel executes: refused, named, or seen by some schedule."""

import re
from dataclasses import replace
from typing import Any

import pytest

from speedstack.runtime import Engine
from speedstack.runtime.backends.gpu.resident import ResidentBackend
from speedstack.runtime.plan.ir import Plan
from speedstack.runtime.plan.verify.proof import prove
from tests.runtime.backends.gpu.plan_cases import SMALL_CASES
from tests.runtime.backends.gpu.resident_cases import outcome, same, small

pytestmark = pytest.mark.interpret


def altered(plan: Plan, name: str, **changes: Any) -> Plan:
    """The plan with one phase changed."""
    phases = list(plan.phases)
    index = plan.phase_named[name]
    phases[index] = replace(phases[index], **changes)
    return replace(plan, phases=tuple(phases))


def plant(backend: ResidentBackend, plan: Plan) -> None:
    """Has the kernel execute another plan, as the backend would never let it."""
    from speedstack.runtime.backends.gpu.bindings.layers import bind
    from speedstack.runtime.backends.gpu.task_table import build_tasks

    backend.plan = plan
    backend.tasks = build_tasks(plan, bind(plan, backend.weights, backend.memory), backend.device)
    backend.counters.zero_()
    backend.next_step = 0


def test_a_missing_signal_is_a_dump_and_not_a_hang() -> None:
    """From the scheduler, and from the kernel's own budget; after that the backend works again."""
    from speedstack.runtime.plan.verify.scheduler import Deadlock

    backend, start = small("qwen3-mxfp4", 3)
    expected, sound = outcome(backend, start, 2), backend.plan
    plant(backend, altered(sound, "L00.combine", signals=()))
    assert prove(backend.plan).failure is not None
    with pytest.raises(Deadlock, match="program 2: polls address") as caught:
        outcome(backend, start, 2)
    assert set(caught.value.waiting) == {0, 1, 2}
    backend.max_polls, backend.interpreter_options = 300, {"patience": None}
    backend.counters.zero_()
    backend.next_step = 0
    with pytest.raises(RuntimeError, match="the resident kernel timed out") as failed:
        outcome(backend, start, 2)
    for program in range(3):
        line = f"  program {program}: step 0, L00.o_proj: L00.combine[0] is 0 and has to reach 3"
        assert line in str(failed.value).splitlines()
    plant(backend, sound)
    assert same(outcome(backend, start, 2), expected)


def test_an_item_that_times_out_is_named() -> None:
    backend, start = small("mimo", 3, max_polls=300)
    backend.interpreter_options = {"patience": None}
    phase = backend.plan.phases[backend.plan.phase_named["L00.attention"]]
    (wait,) = phase.waits
    plant(backend, altered(backend.plan, phase.name, waits=(replace(wait, offset=wait.offset + 1),)))
    with pytest.raises(RuntimeError) as failed:
        outcome(backend, start, 2)
    reached, missing = wait.offset, wait.offset + 1
    assert re.search(
        rf"program \d: step 0, L00\.attention\[\d, \d, \d\]: L00\.qkv\[\d\] is {reached} and has to reach {missing}",
        str(failed.value),
    )


@pytest.mark.parametrize(("name", "fault"), [
    ("L00.combine", "lowered"), ("lm_head", "lowered"), ("accept", "lowered"),
    ("L00.o_proj", "early"), ("L00.down", "early"), ("L00.attention", "early"),
])  # fmt: skip
def test_a_read_before_its_time_is_seen_by_some_schedule(name: str, fault: str) -> None:
    """A threshold lower by one, or no wait at all: the proof rejects it, and a handful of schedules shows it."""
    backend, start = small("qwen3-mxfp4", 3, prefetch="none")
    expected, sound = outcome(backend, start, 3), backend.plan
    (wait,) = sound.phases[sound.phase_named[name]].waits
    waits = () if fault == "early" else (replace(wait, offset=wait.offset - 1),)
    plant(backend, altered(sound, name, waits=waits))
    assert prove(backend.plan).failure is not None
    for seed in range(40):
        backend.seed = seed
        backend.counters.zero_()
        backend.next_step = 0
        if not same(outcome(backend, start, 3), expected):
            return
    pytest.fail("no schedule shows it")


def test_experts_are_chosen_early_only_behind_a_wait() -> None:
    from speedstack.runtime.backends.gpu.task_table import check_early_choices

    plan = small("qwen3-mxfp4", 3)[0].plan
    check_early_choices(plan)
    (wait,) = plan.phases[plan.phase_named["L00.gate_up"]].waits
    for waits in ((), (replace(wait, offset=wait.offset - 1),)):
        with pytest.raises(AssertionError, match=r"L00\.down looks before anything has waited for L00\.router"):
            check_early_choices(altered(plan, "L00.gate_up", waits=waits))


def test_a_plan_that_is_refused_leaves_the_last_one_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    from speedstack.runtime.backends.gpu import task_table

    engine = Engine(SMALL_CASES["dense"](), None, None, "resident", 32, 2)
    prompt = [5, 6, 7, 5, 6]
    before = engine.generate(prompt, max_new_tokens=6).tokens
    with monkeypatch.context() as patch:
        patch.setattr(task_table, "MAX_VARIANTS", len(engine.backend.tasks.variants))  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match="use backend='graph'"):
            engine.set_drafter("ngram")
    assert engine.generate(prompt, max_new_tokens=6).tokens == before
    engine.set_drafter("ngram")
    assert engine.generate(prompt, max_new_tokens=6).tokens == before
