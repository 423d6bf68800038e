"""Runs a Triton kernel whose programs wait for each other on a CPU, under a scheduler that a seed decides.

Triton's own interpreter (TRITON_INTERPRET=1) runs programs one after the other, so that the first wait would hang. Here
each program is a thread of a `Scheduler` and hands over before every atomic operation and every store. An atomic add of
zero is a poll; a program that polls one address in vain and does nothing else in between waits. When nobody does
anything but poll in vain, that is a deadlock, with the addresses in its dump.

Written for the interpreter of Triton 3.6 and later: it uses the grid index, which it sets whenever a thread gets its
turn, and methods of the builder. Arguments are CPU tensors; nothing is copied.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from speedstack.runtime.interpret import Scheduler

_SPINNING = 2  # polls in vain after which a program is taken to wait
_PATIENCE = 4  # rounds of polls in vain by everybody before they are a deadlock


class _Polls:
    """Who polls in vain."""

    def __init__(self, num_programs: int) -> None:
        self.num_programs = num_programs
        self.address = [0] * num_programs
        self.value = [0] * num_programs
        self.in_vain = [0] * num_programs
        self.progress = 0  # counts whatever is not a poll in vain
        self.since_progress = 0

    def record(self, program: int, is_poll: bool, address: int, value: int) -> None:
        if is_poll and (self.address[program], self.value[program]) == (address, value):
            self.in_vain[program] += 1
            self.since_progress += 1
        else:
            self.acted(program)
            self.address[program], self.value[program] = address, value

    def acted(self, program: int) -> None:
        self.in_vain[program] = 0
        self.address[program] = 0
        self.progress += 1
        self.since_progress = 0

    def is_spinning(self, program: int) -> bool:
        return self.in_vain[program] >= _SPINNING


def interpret_triton(kernel: Any, num_programs: int, arguments: Mapping[str, Any], seed: int = 0) -> Scheduler:
    """Runs `kernel` with grid (num_programs,) and arguments by its parameters' names; returns the scheduler.

    Raises:
        Deadlock: nobody does anything but poll.
        ValueError: the kernel is compiled, because TRITON_INTERPRET=1 was not set when its module was imported.
    """
    from triton.runtime import interpreter

    if not isinstance(kernel, interpreter.InterpretedFunction):
        raise ValueError("the kernel is compiled; set TRITON_INTERPRET=1 before its module is imported")
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
            return all_spin and polls.since_progress < _PATIENCE * num_programs

        address = int(np.asarray(ptr.data).flat[0])
        scheduler.wait(program, can_go, f"polls address {address:#x}, which stays at {polls.value[program]}")
        result = atomic_rmw(op, ptr, value, mask, sem, scope)
        polls.record(program, is_poll, address, int(np.asarray(result.data).flat[0]))
        return result

    def store(*args: Any, **kwargs: Any) -> Any:
        polls.acted(current[0])
        scheduler.pause(current[0])
        return masked_store(*args, **kwargs)

    hooks: dict[str, Callable[..., Any]] = {"create_atomic_rmw": atomic, "create_masked_store": store}
    patches = interpreter._patch_lang(kernel.fn)
    try:
        # Device functions would patch the language once more at each call, for milliseconds, and never undo it.
        patches.set_attr(interpreter, "_patch_lang", lambda function: None)
        # A scalar is an array of one element, which NumPy 2.4 no longer takes for an integer.
        patches.set_attr(interpreter.tl.core.tensor, "__index__", lambda self: int(np.asarray(self.handle.data).item()))
        for name, hook in hooks.items():
            setattr(builder, name, hook)
        function = kernel.rewrite()
        constexprs = interpreter.GridExecutor(kernel.fn, kernel.arg_names, (num_programs,)).constexprs
        converted = {n: a if n in constexprs else interpreter._implicit_cvt(a) for n, a in arguments.items()}
        builder.set_grid_dim(num_programs, 1, 1)
        scheduler.run(num_programs, lambda program: function(**converted))
    finally:
        for name in hooks:
            builder.__dict__.pop(name, None)
        patches.restore()
    return scheduler
