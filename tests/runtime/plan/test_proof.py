"""The proof against every interleaving: valid plans pass, and no harmful change to one does.

Plans are small and random: two or three programs, a few phases, counters a program or an item, dynamic phases, buffers
that share memory when their lives do not overlap. The oracle is an exhaustive search (`exhaustive.py`).
"""

import random
from collections import Counter as Tally
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speedstack.runtime.plan.ir import Axis, Buffer, Counter, Phase, Plan, Read, Region, Signal, Wait
from speedstack.runtime.plan.verify.proof import prove
from tests.runtime.plan.exhaustive import Lists, search

SEEDS = st.integers(0, 2**32 - 1)


def random_plan(rng: random.Random) -> Plan:
    """A ring of phases that is right by construction.

    Each phase reads what the one before left, whole or piece by piece, and perhaps something older. All programs wait
    for all of the phase before, or an item for the items whose pieces it reads; the first phase waits for the last one
    of the step before. A phase may change the buffer of the one before in place, and a buffer may take the memory of
    one whose last reader came earlier.
    """
    P, N = rng.choice([2, 2, 3]), rng.randint(2, 4)
    sizes = [rng.randint(1, 3) for _ in range(N)]
    dynamic = [rng.random() < 0.25 and size > 1 for size in sizes]
    by_item, in_place = [False] * N, [False] * N
    for i in range(N - 1):
        if not dynamic[i] and not dynamic[i + 1] and sizes[i] == sizes[i + 1]:
            by_item[i] = rng.random() < 0.5  # phase i signals by item, phase i + 1 waits by item
            in_place[i + 1] = rng.random() < 0.4
    out = list(range(N))  # the buffer that a phase leaves its result in
    for i in range(1, N):
        out[i] = out[i - 1] if in_place[i] else i
    last_reader = [0] * N
    reads_older: dict[int, int] = {}
    for i in range(1, N):
        last_reader[out[i - 1]] = i
        # Counters of pieces say nothing of other phases' pieces; a result changed in place is gone.
        older = [j for j in range(i - 1) if not in_place[j + 1]]
        if older and not by_item[i - 1] and not any(by_item[older[0] : i]) and rng.random() < 0.5:
            reads_older[i] = rng.choice(older)
            last_reader[out[reads_older[i]]] = i
    last_reader[out[N - 1]] = N  # read by the first phase of the next step
    memory = [f"m{i}" for i in range(N)]
    for i in range(1, N):
        free = [j for j in range(1, i) if last_reader[j] < i and memory.count(f"m{j}") == 1 and out[j] == j]
        if free and not any(by_item) and rng.random() < 0.7:
            memory[i] = f"m{rng.choice(free)}"
    buffers = tuple(Buffer(f"b{i}", sizes[i], 4, memory[i]) for i in range(N))
    phases, counters = [], []
    for i in range(N):
        before, size, lag = (i - 1) % N, sizes[i], i == 0
        counters.append(Counter(f"c{i}", size if by_item[i] else 1))
        if by_item[before] and not lag:
            waits = [Wait(f"c{before}", 1, 1, 0, (1,))]
            reads = [Read(Region(f"b{out[before]}", 1, 0, (1,)), f"p{before}")]
        else:
            waits = [Wait(f"c{before}", P, 0 if lag else P)]
            # Pieces up to the phase that writes this buffer again: it then waits for nobody else's reads of it here.
            piece = out[before] == out[i] or (lag and all(by_item[: out[before]]))
            piece |= not dynamic[i] and sizes[before] == size and rng.random() < 0.3
            region = Region(f"b{out[before]}", 1, 0, (1,)) if piece else Region(f"b{out[before]}", sizes[before])
            reads = [Read(region, f"p{before}", int(lag))]
        if i in reads_older:
            j = reads_older[i]
            reads.append(Read(Region(f"b{out[j]}", sizes[out[j]]), f"p{j}"))
        shared_out = Region(f"b{out[i]}", size, exclusive="a list")
        write = shared_out if dynamic[i] else Region(f"b{out[i]}", 1, 0, (1,))
        signal = Signal(f"c{i}", "item", 0, (1,)) if by_item[i] else Signal(f"c{i}", "program")
        phases.append(
            Phase(f"p{i}", "op", (Axis("x", size, dynamic[i]),), reads=tuple(reads), writes=(write,),
                  waits=tuple(waits), signals=(signal,), rotation=rng.randrange(P))
        )  # fmt: skip
        if i >= 2 and rng.random() < 0.3 and not by_item[i - 2]:  # one more wait, which may or may not be needed
            phases[i] = replace(phases[i], waits=(*phases[i].waits, Wait(f"c{i - 2}", P, P)))
    return Plan("random", P, 1, 1, 1, buffers, tuple(counters), tuple(phases))


def with_phase(plan: Plan, index: int, **changes: Any) -> Plan:
    phases = list(plan.phases)
    phases[index] = replace(phases[index], **changes)
    return replace(plan, phases=tuple(phases))


def mutants(plan: Plan) -> list[tuple[str, Plan]]:
    """Every single change of five kinds, named."""
    result = []
    for i, phase in enumerate(plan.phases):
        for j in range(len(phase.signals)):
            result.append(("drop a signal", with_phase(plan, i, signals=phase.signals[:j] + phase.signals[j + 1 :])))
        for j, wait in enumerate(phase.waits):
            for kind, changed in (
                ("lower a threshold", [replace(wait, offset=wait.offset - 1)]),
                ("skip an epoch", [replace(wait, offset=wait.offset - wait.per_step)]),
                ("stand still", [replace(wait, per_step=0)]),
                ("drop a wait", []),
                ("raise a threshold", [replace(wait, offset=wait.offset + 1)]),
            ):
                result.append((kind, with_phase(plan, i, waits=(*phase.waits[:j], *changed, *phase.waits[j + 1 :]))))
    for i in range(len(plan.phases)):
        for j in range(i):
            phases = list(plan.phases)
            phases[i], phases[j] = phases[j], phases[i]
            result.append(("swap two phases", replace(plan, phases=tuple(phases))))
            buffers = list(plan.buffers)
            if buffers[i].allocation != buffers[j].allocation:
                buffers[i] = replace(buffers[i], memory=buffers[j].allocation, offset=buffers[j].offset)
                result.append(("alias two buffers", replace(plan, buffers=tuple(buffers))))
    return result


def harm_of(plan: Plan) -> str | None:
    """What the search finds, over several draws of the lists where there are any."""
    has_lists = any(axis.is_dynamic for phase in plan.phases for axis in phase.axes)
    for seed in range(4 if has_lists else 1):
        found = search(plan, lists=Lists(seed)).harm
        if found is not None:
            return found.kind
    return None


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_valid_plans_pass_and_do_no_harm(seed: int) -> None:
    plan = random_plan(random.Random(seed))
    proof = prove(plan)
    assert proof.is_safe, proof.failure
    assert harm_of(plan) is None


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(2, 4))
def test_what_is_accepted_after_several_changes_does_no_harm(seed: int, num_changes: int) -> None:
    rng = random.Random(seed)
    plan = random_plan(rng)
    for _ in range(num_changes):
        gentle = [mutant for kind, mutant in mutants(plan) if kind not in ("raise a threshold", "stand still")]
        plan = rng.choice([m for m in gentle if prove(m).is_safe] or gentle)
    if prove(plan).is_safe:
        assert harm_of(plan) is None


def test_every_harmful_mutation_is_rejected() -> None:
    """All single mutations of 30 random plans; the ones that the search shows harmful must all be rejected."""
    harmful, killed, harmless_rejected, harmless = Tally[str](), Tally[str](), 0, 0
    for seed in range(30):
        for kind, mutant in mutants(random_plan(random.Random(seed))):
            failure, harm = prove(mutant).failure, harm_of(mutant)
            if harm is None:
                harmless += 1
                harmless_rejected += failure is not None
                continue
            harmful[kind] += 1
            assert failure is not None, f"seed {seed}: {kind} does harm ({harm}) and is accepted"
            assert all(failure.edge) and failure.edge[0] in failure.message
            killed[kind] += 1
    print(f"killed {killed.total()} of {harmful.total()} harmful mutations; {harmless_rejected} of {harmless} harmless")
    assert killed == harmful
    for kind in ("drop a signal", "lower a threshold", "skip an epoch", "alias two buffers", "swap two phases"):
        assert harmful[kind] >= 15, kind


def two_phases(first: Wait, second: Wait, num_programs: int = 2) -> Plan:
    """p0 writes what p1 reads, one item each, on different programs."""
    phases = (
        Phase("p0", "op", (Axis("x", 1),), reads=(Read(Region("b1", 1), "p1", 1),), writes=(Region("b0", 1),),
              waits=(first,), signals=(Signal("c0", "program"),)),
        Phase("p1", "op", (Axis("x", 1),), reads=(Read(Region("b0", 1), "p0"),), writes=(Region("b1", 1),),
              waits=(second,), signals=(Signal("c1", "program"),), rotation=1),
    )  # fmt: skip
    buffers = (Buffer("b0", 1, 4), Buffer("b1", 1, 4))
    return Plan("two", num_programs, 1, 1, 1, buffers, (Counter("c0"), Counter("c1")), phases)


def test_a_program_without_items_must_not_run_ahead() -> None:
    """Waiting before items only, a program that has none would signal for the one that has."""
    entering = two_phases(Wait("c1", 3, 0), Wait("c0", 3, 3), 3)
    assert prove(entering).is_safe and harm_of(entering) is None
    by_item = two_phases(Wait("c1", 3, 0, 0, (1,)), Wait("c0", 3, 3, 0, (1,)), 3)
    failure = prove(by_item).failure
    assert failure is not None and failure.kind == "fooled wait", failure
    assert failure.edge == ("p0", "c0")
    assert "program 2 may signal c0[0] in p0 before program 0 did in p0" in failure.message
    assert harm_of(by_item) == "wrong value"


def test_what_ends_a_launch_is_read_by_programs_without_items_too() -> None:
    """Leaving needs its own order: behind who wrote what says so, and before who overwrites it, on every program."""
    last, all_of_p0 = Wait("c1", 3, 0), Wait("c0", 3, 3)
    plan = two_phases(last, all_of_p0, 3)
    leaving = with_phase(plan, 0, early_exit=Read(Region("b1", 1), "p1", 1))
    assert prove(leaving).is_safe and harm_of(leaving) is None
    # p0 signals for its item alone: programs 1 and 2, which have none, may read what p1 already overwrites
    for safe, harm, change in (
        (True, None, {}),
        (False, "wrong value", {"early_exit": Read(Region("b1", 1), "p1", 1)}),
    ):
        by_item = with_phase(plan, 0, signals=(Signal("c0", "item"),), **change)
        by_item = with_phase(by_item, 1, waits=(Wait("c0", 1, 1),))
        failure = prove(by_item).failure
        assert (failure is None) == safe and harm_of(by_item) == harm, failure
        assert failure is None or (failure.kind, failure.edge) == ("race", ("p1", "p0"))
    early = prove(with_phase(leaving, 0, waits=(), reads=())).failure
    assert early is not None and early.kind == "race" and "p0, on program" in early.message
    # with nothing else to meet in: what p1 wrote may not be there yet
    alone = prove(with_phase(with_phase(leaving, 0, waits=(), reads=(), writes=()), 1, reads=())).failure
    assert alone is not None and (alone.kind, alone.edge) == ("race", ("p0", "p1"))
    stale = prove(with_phase(leaving, 0, early_exit=Read(Region("b1", 1), "p0", 1))).failure
    assert stale is not None and stale.kind == "wrong value"


def test_a_launch_ends_between_two_steps() -> None:
    """Counters of a step that programs leave in its middle would be those of no number of steps."""
    plan = two_phases(Wait("c1", 2, 0), Wait("c0", 2, 2))
    failure = prove(with_phase(plan, 1, early_exit=Read(Region("b0", 1), "p0"))).failure
    assert failure is not None and (failure.kind, failure.edge) == ("torn step", ("p1", "b0"))
    with pytest.raises(ValueError, match="what says so is the same for all items"):
        prove(with_phase(plan, 0, early_exit=Read(Region("b1", 1, 0, (1,)), "p1", 1)))
    with pytest.raises(ValueError, match="p0 names 'b9'"):
        prove(with_phase(plan, 0, early_exit=Read(Region("b9", 1), "p1", 1)))


def test_messages_name_the_edge() -> None:
    plan = two_phases(Wait("c1", 2, 0), Wait("c0", 2, 2))

    def failure(mutant: Plan) -> Any:
        found = prove(mutant).failure
        assert found is not None
        return found

    late = failure(with_phase(plan, 1, waits=(Wait("c0", 2, 4),)))
    assert (late.kind, late.edge) == ("deadlock", ("p1", "c0"))
    assert "p1 waits for c0[0] to reach 4, and only 2 signals come before it" in late.message
    early = failure(with_phase(plan, 1, waits=()))
    assert (early.kind, early.edge) == ("race", ("p1", "p0"))
    assert "reads b0, which p0 on program 0 may not have written yet" in early.message
    slow = failure(with_phase(plan, 1, waits=(Wait("c0", 1, 2),)))
    assert (slow.kind, slow.edge) == ("wrong epoch", ("p1", "c0"))


def test_items_of_one_phase_must_not_meet() -> None:
    axes = (Axis("x", 3),)
    base = Phase("p0", "op", axes, waits=(Wait("c0", 2, 0),), signals=(Signal("c0", "program"),))
    for writes, reads, meets in (
        (Region("b", 1, 0, (1,)), (), False),
        (Region("b", 2, 0, (1,)), (), True),
        (Region("b", 1, 0, (1,)), (Read(Region("b", 1, 0, (1,)), None),), False),
        (Region("b", 1, 0, (1,)), (Read(Region("b", 1, 1, (1,)), None),), True),
        (Region("b", 1, 0, (2,)), (Read(Region("b", 1, 1, (2,)), None),), False),
        (Region("b", 6), (), True),
        (Region("b", 6, exclusive="a list"), (), False),
    ):
        phase = replace(base, writes=(writes,), reads=reads)
        plan = Plan("one", 2, 1, 1, 1, (Buffer("b", 6, 4),), (Counter("c0"),), (phase,))
        failure = prove(plan).failure
        assert (failure is not None) == meets, (writes, reads, failure)
        assert failure is None or "meet in b" in failure.message


def test_plans_that_name_what_is_not_there_are_refused() -> None:
    plan = two_phases(Wait("c1", 2, 0), Wait("c0", 2, 2))
    with pytest.raises(ValueError, match="p0 names 'c9'"):
        prove(with_phase(plan, 0, waits=(Wait("c9", 2, 0),)))
    with pytest.raises(ValueError, match="p1 names 'p9'"):
        prove(with_phase(plan, 1, reads=(Read(Region("b0", 1), "p9"),)))
    with pytest.raises(ValueError, match="p1 reads what is older than one step"):
        prove(with_phase(plan, 1, reads=(Read(Region("b0", 1), "p0", 2),)))
    with pytest.raises(ValueError, match="outside counter 'c0'"):
        prove(with_phase(plan, 0, signals=(Signal("c0", "program", 1),)))
