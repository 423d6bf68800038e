"""Every interleaving of a small plan: the oracle that the proof is measured against.

A program is a list of events: an item reads when its waits are over, then writes and signals. All schedules of all
programs are walked over the first steps, with memory as it is (allocations, not buffers). Harm is a deadlock, or a read
that sees another value than the one its producer wrote. Values are names: (step, phase, item) of the write.

Two reductions change no verdict. A wait is part of the read behind it: counters only grow, so waiting longer is always
possible. An event that only signals is taken as soon as it can be: that enables others and hides nothing.

The number of states grows with the product of the lists' lengths: two programs with forty events each are a thousand,
three are sixty thousand. Plans of real models have millions of events; for those there is the proof.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass

from speedstack.runtime.plan.ir import Phase, Plan, Read, Signal, Wait
from speedstack.runtime.plan.verify.access_tables import Access, Tables, check_well_formed
from tests.runtime.plan.interpret import items_of

Place = tuple[str, int]  # a buffer, and a byte of it
_INITIAL = -1
_ITEMS = 1000


@dataclass(frozen=True)
class Harm:
    """A schedule that goes wrong. trace: the program of each event up to there."""

    kind: str
    message: str
    trace: tuple[int, ...]


@dataclass(frozen=True)
class Search:
    """What was found, and over how many states."""

    harm: Harm | None
    num_states: int


@dataclass(frozen=True)
class _Event:
    name: str
    waits: tuple[tuple[int, int], ...] = ()  # counter, threshold
    expects: tuple[tuple[int, int], ...] = ()  # piece, value
    writes: tuple[tuple[int, int], ...] = ()  # piece, value
    signals: tuple[int, ...] = ()

    @property
    def is_silent(self) -> bool:
        return not self.expects and not self.writes


@dataclass(frozen=True)
class Lists:
    """What a run brings: a seed for which items of dynamic phases exist and how they share exclusive regions out."""

    seed: int

    def exists(self, phase: Phase, step: int, item: int) -> bool:
        """Dynamic axes are cut at a length of at least one."""
        for axis, coordinate in zip(phase.axes, phase.index(item), strict=True):
            if axis.is_dynamic and coordinate >= self._draw(1, axis.size, phase.name, step, axis.name):
                return False
        return True

    def owner(self, phase: Phase, step: int, place: Place, items: list[int]) -> int:
        """Which of the items of an exclusive region this place falls to."""
        return items[self._draw(0, len(items) - 1, phase.name, step, place)]

    def _draw(self, low: int, high: int, *key: object) -> int:
        return random.Random(repr((self.seed, *key))).randint(low, high)


def search(plan: Plan, num_steps: int = 3, lists: Lists | None = None, max_states: int = 200_000) -> Search:
    """Walks all interleavings of the first `num_steps` steps until one does harm.

    Raises ValueError for a plan that is not well-formed, or with more than `max_states` states.
    """
    check_well_formed(plan)
    programs, num_pieces = _Expansion(plan, num_steps, lists or Lists(0)).programs()
    start = (tuple([0] * plan.num_programs), tuple([_INITIAL] * num_pieces), tuple([0] * plan.num_counters))
    # Counters follow from the positions; they are carried along only to save counting.
    seen: set[tuple[tuple[int, ...], tuple[int, ...]]] = {start[:2]}
    stack: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = [(*start, ())]
    while stack:
        at, memory, counters, trace = stack.pop()
        ready = [
            program
            for program, events in enumerate(programs)
            if at[program] < len(events)
            and all(counters[counter] >= threshold for counter, threshold in events[at[program]].waits)
        ]
        if not ready and any(at[program] < len(events) for program, events in enumerate(programs)):
            stuck = [events[at[p]].name for p, events in enumerate(programs) if at[p] < len(events)]
            return Search(Harm("deadlock", "stuck before " + ", ".join(stuck), trace), len(seen))
        silent = next((program for program in ready if programs[program][at[program]].is_silent), None)
        for program in ready if silent is None else [silent]:
            event = programs[program][at[program]]
            for piece, value in event.expects:
                if memory[piece] != value:
                    message = f"{event.name} sees {memory[piece]} in piece {piece} instead of {value}"
                    return Search(Harm("wrong value", message, (*trace, program)), len(seen))
            next_memory, next_counters = memory, counters
            if event.writes:
                pieces = list(memory)
                for piece, value in event.writes:
                    pieces[piece] = value
                next_memory = tuple(pieces)
            if event.signals:
                counts = list(counters)
                for counter in event.signals:
                    counts[counter] += 1
                next_counters = tuple(counts)
            next_at = (*at[:program], at[program] + 1, *at[program + 1 :])
            if (next_at, next_memory) not in seen:
                seen.add((next_at, next_memory))
                if len(seen) > max_states:
                    raise ValueError(f"more than {max_states} states: choose a smaller plan")
                stack.append((next_at, next_memory, next_counters, (*trace, program)))
    return Search(None, len(seen))


class _Expansion:
    """A plan's programs as lists of events, for given lists.

    A piece is what no cell boundary of any buffer cuts: bytes from one boundary in an allocation to the next. Pieces of
    a buffer are named by where they lie in it, so that what reads should see does not depend on who shares its memory.
    """

    def __init__(self, plan: Plan, num_steps: int, lists: Lists) -> None:
        self.plan, self.num_steps, self.lists = plan, num_steps, lists
        self.tables = Tables(plan)
        self.pieces: dict[tuple[str, int], int] = {}  # (allocation, byte) -> number
        boundaries: dict[str, set[int]] = {}
        for buffer in plan.buffers:
            ends = range(buffer.offset, buffer.offset + buffer.num_bytes + 1, buffer.cell_bytes)
            boundaries.setdefault(buffer.allocation, set()).update(ends)
        self.boundaries = {allocation: sorted(ends) for allocation, ends in boundaries.items()}
        self.written: dict[tuple[int, int], dict[Place, int]] = {}

    def programs(self) -> tuple[list[list[_Event]], int]:
        """The lists, and the number of pieces of memory."""
        events: list[list[_Event]] = [[] for _ in range(self.plan.num_programs)]
        state: dict[Place, int] = {}  # of buffers that share nothing, in the sequential order
        for step in range(self.num_steps):
            for number, phase in enumerate(self.plan.phases):
                for program in range(self.plan.num_programs):
                    events[program] += self.events(step, number, program, state)
                state.update(self.writes_of(step, number))
                assert phase.num_items < _ITEMS
        return events, len(self.pieces)

    def existing(self, step: int, phase: Phase) -> list[int]:
        return [item for item in range(phase.num_items) if self.lists.exists(phase, step, item)]

    def writes_of(self, step: int, number: int) -> dict[Place, int]:
        """What a phase leaves behind, by place: the values that readers of it should see."""
        if (step, number) not in self.written:
            phase, values = self.plan.phases[number], dict[Place, int]()
            accesses = self.tables.table(phase).accesses[len(phase.reads) :]
            for access in accesses:
                for item in self.existing(step, phase):
                    values |= {
                        place: _value(step, number, item) for place, _ in self.touched(step, phase, access, item)
                    }
            self.written[step, number] = values
        return self.written[step, number]

    def touched(self, step: int, phase: Phase, access: Access, item: int) -> list[tuple[Place, int]]:
        """Places and pieces of an item's region; of an exclusive one, those that fall to this item."""
        buffer = self.plan.buffer_named[access.region.buffer]
        low, high = int(access.low[item]), int(access.high[item])
        result = []
        for byte in self.boundaries[buffer.allocation]:
            if low <= byte < high:
                place = (buffer.name, byte - buffer.offset)
                if not access.exclusive or self.lists.owner(phase, step, place, self.existing(step, phase)) == item:
                    result.append((place, self.pieces.setdefault((buffer.allocation, byte), len(self.pieces))))
        return result

    def events(self, step: int, number: int, program: int, state: dict[Place, int]) -> list[_Event]:
        phase, base = self.plan.phases[number], self.plan.counter_base
        table, existing = self.tables.table(phase), self.existing(step, phase)

        def counters(whats: Iterable[Wait | Signal], item: int) -> list[int]:
            return [base[what.counter] + int(self.tables.elements(phase, what)[item]) for what in whats]

        entry_waits = [wait for wait in phase.waits if not wait.strides]
        item_waits = [wait for wait in phase.waits if wait.strides]
        item_signals = [signal for signal in phase.signals if signal.each == "item"]
        entry = tuple((base[wait.counter] + wait.start, wait.threshold(step)) for wait in entry_waits)
        result: list[_Event] = []
        if phase.early_exit is not None:
            (access,) = self.tables.entry(phase.early_exit).accesses
            expects = self.expected(step, phase, phase.early_exit, access, 0, state)
            result.append(_Event(f"step {step} entry of {phase.name} on {program}", entry, tuple(expects)))
        for item in items_of(phase, program, self.plan.num_programs):
            name, signals = f"step {step} {phase.name}[{item}] on {program}", tuple(counters(item_signals, item))
            if item not in existing:
                result.append(_Event(name, entry, signals=signals))
                continue
            numbers = counters(item_waits, item)
            waits = tuple((n, wait.threshold(step)) for n, wait in zip(numbers, item_waits, strict=True))
            result.append(_Event(name, entry + waits, self.expectations(step, phase, item, state)))
            pieces = [
                piece
                for access in table.accesses[len(phase.reads) :]
                for _, piece in self.touched(step, phase, access, item)
            ]
            value = _value(step, number, item)
            result.append(_Event(name, writes=tuple((piece, value) for piece in pieces), signals=signals))
        arrivals = tuple(base[s.counter] + s.start for s in phase.signals if s.each == "program")
        return [*result, _Event(f"step {step} end of {phase.name} on {program}", entry, signals=arrivals)]

    def expectations(self, step: int, phase: Phase, item: int, state: dict[Place, int]) -> tuple[tuple[int, int], ...]:
        """Pieces that an item reads and what it should find there; left out where no existing item wrote."""
        expects = []
        for read, access in zip(phase.reads, self.tables.table(phase).accesses, strict=False):
            expects += self.expected(step, phase, read, access, item, state)
        return tuple(expects)

    def expected(
        self, step: int, phase: Phase, read: Read, access: Access, item: int, state: dict[Place, int]
    ) -> list[tuple[int, int]]:
        """The same of one read."""
        expects = []
        for place, piece in self.touched(step, phase, access, item):
            if read.producer is None:
                expects.append((piece, state.get(place, _INITIAL)))
            elif step < read.steps_ago:
                expects.append((piece, _INITIAL))
            else:
                values = self.writes_of(step - read.steps_ago, self.plan.phase_named[read.producer])
                if place in values:
                    expects.append((piece, values[place]))
        return expects


def _value(step: int, number: int, item: int) -> int:
    return (step * _ITEMS + number) * _ITEMS + item
