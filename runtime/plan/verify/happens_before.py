"""Walks a plan's phases in sequential order and tracks what every program knows; `plan/verify/proof.py` says why.

Clocks are int64 [program, program]: the column program's last event known to the row program. Events are numbered along
the walk, phase by phase and round by round of items, so a number identifies an event of a program.
"""

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from speedstack.runtime.plan.ir import Phase, Plan, Read, Signal, Wait
from speedstack.runtime.plan.verify.access_tables import Access, Ints, ItemTable, Tables, conflict_within

MAX_STEPS = 6
_NEVER = -(2**62)  # a clock's entry for a program of which nothing is known


@dataclass(frozen=True)
class Failure:
    """Why a plan is rejected. edge: the phase where it failed, and the other phase, counter or buffer."""

    kind: str
    step: int
    edge: tuple[str, str]
    message: str


class Rejected(Exception):
    """Carries the failure out of the walk."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


@dataclass
class _Group:
    """Signals that one phase of one step adds to one counter. last: each program's last one, as an event.

    count: signals up to here. knows: what is known once these and all earlier ones have arrived.
    """

    instance: int
    count: int
    last: Ints
    knows: Ints


@dataclass
class _Cases:
    """Groups of a phase's items. programs, knows: per group; case_of: each item's group."""

    programs: Ints
    knows: Ints
    case_of: Ints


@dataclass
class _Touched:
    """A past access that some program may not know to be over."""

    instance: int
    phase: Phase
    table: ItemTable
    access: Access
    last: Ints


@dataclass
class Walk:
    """One proof. `run` returns if the plan is safe and raises Rejected otherwise.

    groups: signals by counter and element. touched: accesses that some program may not know to be over. written: writes
    of the last steps. instance: phases walked, over all steps.
    """

    plan: Plan
    num_waits: int = 0
    num_conflicts: int = 0
    num_steps: int = 0
    instance: int = 0
    groups: dict[tuple[str, int], list[_Group]] = field(default_factory=lambda: defaultdict(list))
    touched: dict[str, list[_Touched]] = field(default_factory=lambda: defaultdict(list))
    written: dict[str, list[tuple[int, Access]]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        self.tables = Tables(self.plan)
        P = self.plan.num_programs
        # A phase instance numbers its events round by round; the last number is its end.
        self.stride = max(phase.num_items for phase in self.plan.phases) // P + 3
        self.clock = np.full((P, P), _NEVER, np.int64)

    def run(self) -> None:
        for phase in self.plan.phases:
            clash = conflict_within(self.tables.table(phase))
            if clash is not None:
                write, other, i, j = clash
                self.reject("race", 0, phase, write.region.buffer,
                            f"items {i} and {j} of {phase.name} meet in {write.region.buffer}: one writes what the "
                            f"other {'writes' if other.is_write else 'reads'}")  # fmt: skip
        for phase in self.plan.phases[1:]:
            if phase.early_exit is not None:
                self.reject("torn step", 0, phase, phase.early_exit.region.buffer,
                            f"programs may leave at {phase.name}, when their step has begun: counters would have "
                            "counted a part of it")  # fmt: skip
        self.check_rates()
        before: tuple | None = None
        for step in range(MAX_STEPS):
            for phase in self.plan.phases:
                self.phase(phase, step)
                self.instance += 1
            self.num_steps = step + 1
            state = self.state()
            if state is not None and state == before:
                return
            before = state
        last = self.plan.phases[-1]
        self.reject("not periodic", MAX_STEPS - 1, last, last.name, f"steps do not repeat within {MAX_STEPS}")

    def reject(self, kind: str, step: int, phase: Phase, other: str, message: str) -> None:
        raise Rejected(Failure(kind, step, (phase.name, other), f"step {step}: {message}"))

    def check_rates(self) -> None:
        """Every threshold grows as fast as its counter."""
        rates: dict[tuple[str, int], int] = defaultdict(int)
        for phase in self.plan.phases:
            for signal in phase.signals:
                if signal.each == "program":
                    rates[signal.counter, signal.start] += self.plan.num_programs
                else:
                    for element, count in enumerate(np.bincount(self.tables.elements(phase, signal))):
                        rates[signal.counter, element] += int(count)
        for phase in self.plan.phases:
            for wait in phase.waits:
                for element in np.unique(self.tables.elements(phase, wait)):
                    rate = rates[wait.counter, int(element)]
                    if wait.per_step != rate:
                        self.reject("wrong epoch", 0, phase, wait.counter,
                                    f"{phase.name} waits for {wait.counter}[{element}] to grow by {wait.per_step} a "
                                    f"step, and it grows by {rate}")  # fmt: skip

    def phase(self, phase: Phase, step: int) -> None:
        table = self.tables.table(phase)
        base = self.instance * self.stride
        for wait in phase.waits:
            if not wait.strides:
                np.maximum(self.clock, self.wait(phase, wait, wait.start, step), out=self.clock)
        if phase.early_exit is not None:
            self.enter(phase, phase.early_exit, step)
        cases = self.cases(phase, table, step)
        has_items = table.last_round >= 0
        last = np.where(has_items, base + 1 + table.last_round, _NEVER)
        for number, access in enumerate(table.accesses):
            self.check_order(phase, step, table, access, cases)
            if not access.is_write:
                self.check_value(phase, step, access, phase.reads[number])
        for access in table.accesses:
            self.touched[access.memory].append(_Touched(self.instance, phase, table, access, last))
            if access.is_write:
                self.written[access.memory].append((self.instance, access))
        end = base + self.stride - 1
        for signal in phase.signals:
            if signal.each == "item":
                self.signal_items(phase, signal, step, table, cases, base)
        if not table.has_dynamic_axis and any(wait.strides for wait in phase.waits):  # all items ran, and waited
            np.maximum.at(self.clock, cases.programs, cases.knows)
        for signal in phase.signals:
            if signal.each == "program":
                P = self.plan.num_programs
                everyone = np.arange(P)
                self.add_group(phase, signal, signal.start, step, P, everyone, self.clock, np.full(P, end, np.int64))
        np.fill_diagonal(self.clock, end)
        self.forget()

    def enter(self, phase: Phase, read: Read, step: int) -> None:
        """Every program reads after the entry waits, before its first item."""
        entry, everyone = self.tables.entry(read), np.arange(self.plan.num_programs)
        (access,) = entry.accesses
        self.check_order(phase, step, entry, access, _Cases(everyone, self.clock, everyone))
        self.check_value(phase, step, access, read)
        last = np.full(self.plan.num_programs, self.instance * self.stride, np.int64)
        self.touched[access.memory].append(_Touched(self.instance, phase, entry, access, last))

    def cases(self, phase: Phase, table: ItemTable, step: int) -> _Cases:
        """Groups items of one program with the same waits: they know the same."""
        waits = [wait for wait in phase.waits if wait.strides]
        key = np.array(table.programs)
        for wait in waits:
            elements = self.tables.elements(phase, wait)
            key = key * (int(elements.max()) + 1) + elements
        _, first, case_of = np.unique(key, return_index=True, return_inverse=True)
        programs = table.programs[first]
        knows = self.clock[programs]
        for wait in waits:
            elements = self.tables.elements(phase, wait)
            learned = np.full((int(elements.max()) + 1, self.plan.num_programs), _NEVER, np.int64)
            for element in np.unique(elements):
                learned[element] = self.wait(phase, wait, int(element), step)
            knows = np.maximum(knows, learned[elements[first]])
        return _Cases(programs, knows, case_of)

    def wait(self, phase: Phase, wait: Wait, element: int, step: int) -> Ints:
        """What is known once the wait is over."""
        self.num_waits += 1
        groups = self.groups[wait.counter, element]
        threshold = wait.threshold(step)
        available = groups[-1].count if groups else 0
        if threshold > available:
            self.reject("deadlock", step, phase, wait.counter,
                        f"{phase.name} waits for {wait.counter}[{element}] to reach {threshold}, and only {available} "
                        "signals come before it")  # fmt: skip
        knows = np.full(self.plan.num_programs, _NEVER, np.int64)
        for group in groups:
            if group.count <= threshold:
                knows = group.knows
        return knows

    def signal_items(self, phase: Phase, signal: Signal, step: int, table: ItemTable, cases: _Cases, base: int) -> None:
        elements = self.tables.elements(phase, signal)
        for element in np.unique(elements):
            chosen = elements == element
            last = np.full(self.plan.num_programs, _NEVER, np.int64)
            np.maximum.at(last, table.programs[chosen], base + 1 + table.rounds[chosen])
            those = np.unique(cases.case_of[chosen])
            # Items cut from a dynamic axis signal without having waited.
            knows = self.clock[cases.programs] if table.has_dynamic_axis else cases.knows
            count = int(chosen.sum())
            self.add_group(phase, signal, int(element), step, count, cases.programs[those], knows[those], last)

    def add_group(
        self,
        phase: Phase,
        signal: Signal,
        element: int,
        step: int,
        count: int,
        programs: Ints,
        knows: Ints,
        last: Ints,
    ) -> None:
        """Adds `count` signals of one phase to one counter. knows: each program's knowledge when it signals."""
        together = np.maximum(knows.max(axis=0), last)
        groups = self.groups[signal.counter, element]
        if groups:
            before = groups[-1]
            known = (knows >= before.last) | (np.arange(self.plan.num_programs) == programs[:, None])
            if not known.all():
                late, early = np.argwhere(~known)[0]
                name = self.plan.phases[before.instance % len(self.plan.phases)].name
                self.reject("fooled wait", step, phase, signal.counter,
                            f"program {programs[late]} may signal {signal.counter}[{element}] in {phase.name} before "
                            f"program {early} did in {name}: waits for it would count the wrong signals")  # fmt: skip
            count += before.count
            together = np.maximum(together, before.knows)
        groups.append(_Group(self.instance, count, last, together))

    def check_order(self, phase: Phase, step: int, table: ItemTable, access: Access, cases: _Cases) -> None:
        """Checks that the items know every earlier access that conflicts with this one."""
        least = cases.knows.min(axis=0)
        for earlier in self.touched[access.memory]:
            if not (access.is_write or earlier.access.is_write) or not _overlap(access.hull, earlier.access.hull):
                continue
            self.num_conflicts += 1
            if not (least >= earlier.last).all():
                self.check_items(phase, step, table, access, cases, earlier)

    def check_items(
        self, phase: Phase, step: int, table: ItemTable, access: Access, cases: _Cases, earlier: _Touched
    ) -> None:
        """The same per item. Items of one case that access the same bytes are checked once."""
        lows, low_of = np.unique(access.low, return_inverse=True)
        _, examples = np.unique(cases.case_of * len(lows) + low_of, return_index=True)
        base = earlier.instance * self.stride
        needed_of: dict[tuple[int, int], Ints] = {}
        for item in examples.tolist():
            program, case = int(table.programs[item]), int(cases.case_of[item])
            low, high = int(access.low[item]), int(access.high[item])
            if (low, high) not in needed_of:
                meets = (earlier.access.low < high) & (earlier.access.high > low)
                needed = np.full(self.plan.num_programs, _NEVER, np.int64)
                np.maximum.at(needed, earlier.table.programs[meets], base + 1 + earlier.table.rounds[meets])
                needed_of[low, high] = needed
            unknown = cases.knows[case] < needed_of[low, high]
            unknown[program] = False  # a program runs its own items in order
            if unknown.any():
                verb = "writes" if access.is_write else "reads"
                did = "written" if earlier.access.is_write else "read"
                self.reject("race", step, phase, earlier.phase.name,
                            f"item {item} of {phase.name}, on program {program}, {verb} {access.region.buffer}, which "
                            f"{earlier.phase.name} on program {int(np.argmax(unknown))} may not have {did} yet (there "
                            f"as {earlier.access.region.buffer})")  # fmt: skip

    def check_value(self, phase: Phase, step: int, access: Access, read: Read) -> None:
        """Checks that the producer wrote the region last and completely."""
        if read.producer is None:
            return
        expected = (step - read.steps_ago) * len(self.plan.phases) + self.plan.phase_named[read.producer]
        for instance, write in reversed(self.written[access.memory]):
            if not _overlap(write.hull, access.hull):
                continue
            if instance == expected and write.is_covered and _contains(write.hull, access.hull):
                return
            name = self.plan.phases[instance % len(self.plan.phases)].name
            if instance == expected:
                problem = f"{read.producer} writes only part of it"
            else:
                problem = f"{name} is the last to write there ({write.region.buffer}), not {read.producer}"
            self.reject("wrong value", step, phase, name, f"{phase.name} reads {access.region.buffer}: {problem}")
        if expected >= 0:
            self.reject("wrong value", step, phase, read.producer,
                        f"{phase.name} reads {access.region.buffer}, {read.producer} has not written it")  # fmt: skip

    def forget(self) -> None:
        """Drops accesses that all programs know to be over."""
        known = self.clock.min(axis=0)
        for memory, accesses in list(self.touched.items()):
            self.touched[memory] = [touched for touched in accesses if not (touched.last <= known).all()]
            if not self.touched[memory]:
                del self.touched[memory]

    def state(self) -> tuple | None:
        """Everything later verdicts depend on, relative to the current step; None while it reaches too far back."""
        now, horizon = self.instance, 2 * len(self.plan.phases)
        for memory, writes in self.written.items():
            self.written[memory] = [write for write in writes if write[0] >= now - horizon]
        floor = -horizon * self.stride

        def relative(events: Ints) -> bytes:
            return np.maximum(events - now * self.stride, floor).tobytes()

        touched = []
        for memory, accesses in sorted(self.touched.items()):
            if any(access.instance < now - horizon for access in accesses):
                return None
            # A phase's position in the step identifies the access.
            touched.append((memory, [(a.instance - now, a.access.region, a.access.is_write) for a in accesses]))
        counters = []
        for key, groups in sorted(self.groups.items()):
            if not groups:  # waited for at zero, never signalled
                continue
            total = groups[-1].count
            recent = [group for group in groups if group.instance >= now - horizon]
            self.groups[key] = recent
            counters.append(
                (key, [(g.instance - now, total - g.count, relative(g.last), relative(g.knows)) for g in recent])
            )
        written = [
            (memory, [(instance - now, write.region) for instance, write in writes])
            for memory, writes in sorted(self.written.items())
        ]
        return relative(self.clock), repr(touched), repr(counters), repr(written)


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] < b[1] and b[0] < a[1]


def _contains(outer: tuple[int, int], inner: tuple[int, int]) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]
