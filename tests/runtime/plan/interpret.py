"""Executes a plan with semantics in PyTorch under the seeded scheduler: who waits for whom is then up to the plan."""

from collections.abc import Callable, Mapping

import numpy as np

from speedstack.runtime.backends.gpu.semantics.multi_step import ItemSemantics
from speedstack.runtime.plan.ir import Phase, Plan, Signal, Wait, at
from speedstack.runtime.plan.verify.scheduler import Scheduler


def items_of(phase: Phase, program: int, num_programs: int) -> range:
    """Items of one program, in order."""
    return range((program - phase.rotation) % num_programs, phase.num_items, num_programs)


def interpret(
    plan: Plan,
    semantics: Mapping[str, ItemSemantics],
    num_steps: int,
    seed: int = 0,
    first_step: int = 0,
    counters: np.ndarray | None = None,
    is_over: Callable[[int], bool] = lambda step: False,
) -> None:
    """Executes the task lists of a plan; `semantics` compute the items, by op.

    Items beyond a dynamic axis' cut are handed to the semantics too, which do nothing for them.

    Args:
        counters: int64 [plan.num_counters], as an earlier call left them; None are zeros.
        first_step: number of the first step, for counters that have counted earlier ones.
        is_over: whether the launch is over before this step, by what `Phase.early_exit` reads; every program asks.

    Raises:
        Deadlock: nobody can go on.
        ValueError: an op without a body.
    """
    missing = sorted({phase.op for phase in plan.phases} - set(semantics))
    if missing:
        raise ValueError(f"no body for {', '.join(missing)}")
    counts = np.zeros(plan.num_counters, np.int64) if counters is None else counters
    scheduler = Scheduler(seed)
    base = plan.counter_base

    def number(what: Wait | Signal, index: tuple[int, ...]) -> int:
        return base[what.counter] + at(what.start, what.strides, index)

    def wait(program: int, phase: Phase, what: Wait, index: tuple[int, ...], step: int) -> None:
        element, threshold = number(what, index), what.threshold(step)
        scheduler.wait(
            program,
            lambda: bool(counts[element] >= threshold),
            f"step {step}, {phase.name}{list(index) or ''}: {what.counter}[{element - base[what.counter]}] "
            f"is {counts[element]} and has to reach {threshold}",
        )

    def signal(program: int, what: Signal, index: tuple[int, ...]) -> None:
        scheduler.pause(program)
        counts[number(what, index)] += 1

    def run(program: int) -> None:
        for step in range(first_step, first_step + num_steps):
            for phase in plan.phases:
                for what in phase.waits:
                    if not what.strides:
                        wait(program, phase, what, (), step)
                if phase.early_exit is not None and is_over(step):
                    return
                for item in items_of(phase, program, plan.num_programs):
                    index = phase.index(item)
                    for what in phase.waits:
                        if what.strides:
                            wait(program, phase, what, index, step)
                    for _ in semantics[phase.op](phase, index, step) or ():
                        scheduler.pause(program)
                    for each in phase.signals:
                        if each.each == "item":
                            signal(program, each, index)
                for each in phase.signals:
                    if each.each == "program":
                        signal(program, each, ())

    scheduler.run(plan.num_programs, run)
