"""A persistent Triton kernel whose programs wait for each other, interpreted on a CPU under seeded schedules."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: its kernels are not tested")

import triton
import triton.language as tl

from speedstack.runtime.backends.gpu.interpreter import interpret_grid, interpret_triton
from speedstack.runtime.plan.verify.scheduler import Deadlock

pytestmark = pytest.mark.interpret
SIZE, NUM_STEPS = 8, 4


@triton.jit
def wait(counter, threshold):
    while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < threshold:
        pass


@triton.jit
def signal(counter):
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")


@triton.jit
def two_phases(  # type: ignore[no-untyped-def]
    a, b, counters, NUM_STEPS: tl.constexpr, SIZE: tl.constexpr, P: tl.constexpr, BROKEN: tl.constexpr
):
    """a = 2 b shifted by one + step; b = a shifted by three + 1; again and again."""
    program = tl.program_id(0)
    for step in range(NUM_STEPS):
        if BROKEN != 1:
            wait(counters + 1, P * step)
        for item in range(program, SIZE, P):
            tl.store(a + item, 2 * tl.load(b + (item + 1) % SIZE) + step)
        if BROKEN != 2:
            signal(counters)
        if BROKEN != 3:
            wait(counters, P * (step + 1))
        for item in range(program, SIZE, P):
            tl.store(b + item, tl.load(a + (item + 3) % SIZE) + 1)
        signal(counters + 1)


@triton.jit
def place(out, FIRST: tl.constexpr):  # type: ignore[no-untyped-def]
    """A loop whose bounds are no constants, at every place of a grid of two axes."""
    i, j = tl.program_id(0), tl.program_id(1)
    for k in range(i, i + j + 1):
        tl.store(out + i * tl.num_programs(1) + j, FIRST + k)


def run(num_programs: int, seed: int, broken: int = 0) -> tuple[list[int], list[int]]:
    a, b = torch.zeros(SIZE, dtype=torch.int32), torch.arange(SIZE, dtype=torch.int32)
    counters = torch.zeros(2, dtype=torch.int32)
    arguments = {"a": a, "b": b, "counters": counters, "NUM_STEPS": NUM_STEPS, "SIZE": SIZE, "P": num_programs}
    scheduler = interpret_triton(two_phases, num_programs, arguments | {"BROKEN": broken}, seed)
    assert counters.tolist() == [num_programs * NUM_STEPS] * 2 or broken == 2
    return b.tolist(), scheduler.trace


def expected() -> list[int]:
    b = list(range(SIZE))
    for step in range(NUM_STEPS):
        a = [2 * b[(i + 1) % SIZE] + step for i in range(SIZE)]
        b = [a[(i + 3) % SIZE] + 1 for i in range(SIZE)]
    return b


@pytest.mark.parametrize("num_programs", [1, 3, 8, 11])
def test_every_schedule_gives_the_sequential_result(num_programs: int) -> None:
    traces = set()
    for seed in range(6):
        result, trace = run(num_programs, seed)
        assert result == expected(), f"seed {seed}"
        traces.add(tuple(trace))
    assert num_programs == 1 or len(traces) > 3
    assert run(num_programs, 4) == run(num_programs, 4)


@pytest.mark.parametrize("broken", [1, 3])
def test_a_missing_wait_is_seen_by_some_schedule(broken: int) -> None:
    assert any(run(3, seed, broken)[0] != expected() for seed in range(10))


def test_a_missing_signal_is_a_dump_and_not_a_hang() -> None:
    with pytest.raises(Deadlock, match=r"program 2: polls address 0x[0-9a-f]+, which stays at 0") as caught:
        run(3, 0, broken=2)
    assert set(caught.value.waiting) == {0, 1, 2}
    assert run(3, 0)[0] == expected(), "the interpreter is left as it was found"


def test_counters_can_be_observed() -> None:
    """Every signal, in its order, and no poll."""
    seen = list[tuple[int, int]]()
    counters = torch.zeros(2, dtype=torch.int32)
    arguments: dict[str, object] = {
        "a": torch.zeros(SIZE, dtype=torch.int32),
        "b": torch.arange(SIZE, dtype=torch.int32),
    }
    arguments |= {"counters": counters, "NUM_STEPS": 2, "SIZE": SIZE, "P": 3, "BROKEN": 0}
    first = counters.data_ptr()
    interpret_triton(
        two_phases, 3, arguments, 0, observe=lambda place, value: seen.append(((place - first) // 4, value))
    )
    assert seen == [(counter, 3 * step + n + 1) for step in range(2) for counter in range(2) for n in range(3)]


def test_a_grid_without_waits_runs_in_order() -> None:
    out = torch.zeros(3, 2, dtype=torch.int32)
    interpret_grid(place, (3, 2), {"out": out, "FIRST": 10})
    assert out.tolist() == [[10, 11], [11, 12], [12, 13]]
