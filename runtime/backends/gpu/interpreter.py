"""Runs a Triton kernel whose programs wait for each other on a CPU, scheduled by a seed.

Triton's interpreter (TRITON_INTERPRET=1) runs programs one after another, so the first wait would hang. Here each
program is a thread of a `Scheduler` and yields before every atomic and store. An atomic add of zero is a poll; a
program that only polls one address in vain is waiting. If all programs only poll in vain, that is a deadlock, reported
with the addresses.

Requires the interpreter of Triton 3.6 or later: it uses its grid index, set at each turn, and its builder. Arguments
are CPU tensors, not copied. Kernels without waits run here too (`interpret_grid`), in half the time, and with NumPy
versions that break Triton's own launcher.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from speedstack.runtime.plan.verify.scheduler import Scheduler

_SPINNING = 2  # failed polls after which a program counts as waiting
PATIENCE = 4  # rounds of failed polls by all programs that make a deadlock


class _Polls:
    """Programs whose polls fail."""

    def __init__(self, num_programs: int) -> None:
        self.num_programs = num_programs
        self.address = [0] * num_programs
        self.value = [0] * num_programs
        self.num_failed_polls = [0] * num_programs
        self.progress = 0  # counts everything except failed polls
        self.since_progress = 0

    def record(self, program: int, is_poll: bool, address: int, value: int) -> None:
        if is_poll and (self.address[program], self.value[program]) == (address, value):
            self.num_failed_polls[program] += 1
            self.since_progress += 1
        else:
            self.acted(program)
            self.address[program], self.value[program] = address, value

    def acted(self, program: int) -> None:
        self.num_failed_polls[program] = 0
        self.address[program] = 0
        self.progress += 1
        self.since_progress = 0

    def is_spinning(self, program: int) -> bool:
        return self.num_failed_polls[program] >= _SPINNING


def interpret_triton(
    kernel: Any,
    num_programs: int,
    arguments: Mapping[str, Any],
    seed: int = 0,
    patience: int | None = PATIENCE,
    observe: Callable[[int, int], None] | None = None,
) -> Scheduler:
    """Runs `kernel` with grid (num_programs,) and arguments by parameter name; returns the scheduler.

    Args:
        patience: rounds of failed polls by all programs that make a deadlock; None leaves timeouts to the kernel.
        observe: called after every atomic operation except polls, with its address and new value.

    Raises:
        Deadlock: all programs only poll.
        ValueError: TRITON_INTERPRET=1 was not set when the kernel's module was imported.
    """
    with _ready(kernel, arguments, (num_programs, 1, 1)) as (interpreter, run_program):
        builder, add = interpreter.interpreter_builder, interpreter._ir.ATOMIC_OP.ADD
        scheduler, polls, current = Scheduler(seed), _Polls(num_programs), [0]

        def on_turn(program: int) -> None:
            current[0] = program
            builder.set_grid_idx(program, 0, 0)

        scheduler.on_turn = on_turn
        atomic_rmw, masked_store = builder.create_atomic_rmw, builder.create_masked_store

        def atomic(op: Any, ptr: Any, value: Any, mask: Any, sem: Any, scope: Any) -> Any:
            program, seen = current[0], polls.progress
            is_poll = bool(op == add and not np.any(value.data))
            is_stuck = is_poll and polls.is_spinning(program)

            def can_go() -> bool:
                if not is_stuck or polls.progress != seen:
                    return True
                all_spin = all(polls.is_spinning(other) for other in scheduler.unfinished)
                return all_spin and (patience is None or polls.since_progress < patience * num_programs)

            address = int(np.asarray(ptr.data).flat[0])
            scheduler.wait(program, can_go, f"polls address {address:#x}, which stays at {polls.value[program]}")
            result = atomic_rmw(op, ptr, value, mask, sem, scope)
            old = int(np.asarray(result.data).flat[0])
            polls.record(program, is_poll, address, old)
            if observe is not None and not is_poll:
                observe(address, old + int(np.asarray(value.data).flat[0]) if op == add else old)
            return result

        def store(*args: Any, **kwargs: Any) -> Any:
            polls.acted(current[0])
            scheduler.pause(current[0])
            return masked_store(*args, **kwargs)

        hooks: dict[str, Callable[..., Any]] = {"create_atomic_rmw": atomic, "create_masked_store": store}
        try:
            for name, hook in hooks.items():
                setattr(builder, name, hook)
            scheduler.run(num_programs, lambda program: run_program())
        finally:
            for name in hooks:
                builder.__dict__.pop(name, None)
    return scheduler


def interpret_grid(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> None:
    """Runs programs that do not wait for each other in order. Raises ValueError as `interpret_triton`."""
    sizes = (*grid, 1, 1)[:3]
    with _ready(kernel, arguments, sizes) as (interpreter, run_program):
        for index in np.ndindex(*sizes):
            interpreter.interpreter_builder.set_grid_idx(*index)
            run_program()


@contextmanager
def _ready(kernel: Any, arguments: Mapping[str, Any], grid: Sequence[int]) -> Iterator[tuple[Any, Callable[[], None]]]:
    """The interpreter's module, and a function that runs the program at the grid index."""
    from triton.runtime import interpreter

    if not isinstance(kernel, interpreter.InterpretedFunction):
        raise ValueError("the kernel is compiled; set TRITON_INTERPRET=1 before its module is imported")
    language = interpreter.tl
    patches = interpreter._patch_lang(kernel.fn)
    # Triton's library functions, such as sums, refer to the language core by another name.
    core_patches = interpreter._patch_lang(language.sum.fn)
    try:
        # Otherwise device functions patch the language at each call, for milliseconds, and never undo it.
        patches.set_attr(interpreter, "_patch_lang", lambda function: None)
        # A scalar is a one-element array, which NumPy 2.4 rejects as an integer.
        patches.set_attr(language.core.tensor, "__index__", lambda self: int(np.asarray(self.handle.data).item()))
        # Versions before 3.9 treat every loop condition as true.
        patches.set_attr(language.condition, "__bool__", lambda self: bool(self.condition))
        # Overflow checks take half the time, and counters wrap on purpose.
        options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
        patches.set_attr(interpreter.interpreter_builder, "options", options)
        function = kernel.rewrite()
        constexprs = interpreter.GridExecutor(kernel.fn, kernel.arg_names, tuple(grid)).constexprs
        converted = {n: a if n in constexprs else interpreter._implicit_cvt(a) for n, a in arguments.items()}
        interpreter.interpreter_builder.set_grid_dim(*grid)
        yield interpreter, lambda: function(**converted)
    finally:
        core_patches.restore()
        patches.restore()
