"""A plan's items as arrays: their programs, counters and bytes.

A step of a large model has a hundred thousand items, but layers of one kind share them, so tables of numpy arrays are
computed once per distinct geometry.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from speedstack.runtime.plan.ir import Phase, Plan, Read, Region, Signal, Wait

Ints = np.ndarray  # int64


@dataclass(frozen=True)
class Access:
    """One region that a phase accesses. low, high: int64, first byte and byte past the last, per item."""

    memory: str
    low: Ints
    high: Ints
    exclusive: str
    region: Region
    is_write: bool

    @cached_property
    def hull(self) -> tuple[int, int]:
        return int(self.low.min()), int(self.high.max())

    @cached_property
    def is_covered(self) -> bool:
        """Whether the items cover the whole hull. An exclusive region is always covered."""
        if self.exclusive:
            return True
        order = np.argsort(self.low, kind="stable")
        reached = np.maximum.accumulate(self.high[order])
        return bool((self.low[order][1:] <= reached[:-1]).all())


@dataclass(frozen=True)
class ItemTable:
    """A phase's items. programs, rounds: each item's program, and how many items of the phase that program runs before
    it.

    accesses: the phase's reads, then its writes. Phases may share a table.
    """

    programs: Ints
    rounds: Ints
    last_round: Ints  # of every program, -1 where it has no item
    accesses: tuple[Access, ...]
    has_dynamic_axis: bool

    @property
    def num_items(self) -> int:
        return len(self.programs)


class Tables:
    """Item tables of a plan's phases, and each item's counters."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._coordinates: dict[tuple[int, ...], Ints] = {}
        self._tables: dict[tuple, ItemTable] = {}
        self._elements: dict[tuple, Ints] = {}

    def table(self, phase: Phase) -> ItemTable:
        key = (phase.axes, phase.rotation, tuple(self._geometry(phase)))
        if key not in self._tables:
            self._tables[key] = self._build(phase)
        return self._tables[key]

    def entry(self, read: Read) -> ItemTable:
        """The read that every program does on entering a phase, as an item before its others."""
        P, buffer = self.plan.num_programs, self.plan.buffer_named[read.region.buffer]
        last = min(read.region.start + read.region.length, buffer.num_cells)
        assert 0 <= read.region.start < last, f"a launch ends by what lies outside of {read.region.buffer}"
        low, high = (np.full(P, buffer.offset + cell * buffer.cell_bytes) for cell in (read.region.start, last))
        access = Access(buffer.allocation, low, high, read.region.exclusive, read.region, False)
        ahead = np.full(P, -1, np.int64)
        return ItemTable(np.arange(P), ahead, ahead, (access,), False)

    def elements(self, phase: Phase, what: Wait | Signal) -> Ints:
        """The counter element that each item waits on or signals."""
        key = (phase.axes, what.start, what.strides)
        if key not in self._elements:
            self._elements[key] = self._affine(phase, what.start, what.strides)
        return self._elements[key]

    def _geometry(self, phase: Phase) -> Iterator[tuple]:
        for region, is_write in _regions(phase):
            buffer = self.plan.buffer_named[region.buffer]
            place = (buffer.allocation, buffer.offset, buffer.cell_bytes, buffer.num_cells)
            # Layers use different names for the same places, except where a layer has its own buffer.
            yield (place, region.length, region.start, region.strides, region.exclusive, is_write)

    def _build(self, phase: Phase) -> ItemTable:
        num_programs, items = self.plan.num_programs, np.arange(phase.num_items)
        programs = (items + phase.rotation) % num_programs
        last_round = np.full(num_programs, -1, np.int64)
        np.maximum.at(last_round, programs, items // num_programs)
        accesses = []
        for region, is_write in _regions(phase):
            buffer = self.plan.buffer_named[region.buffer]
            first = self._affine(phase, region.start, region.strides)
            last = np.minimum(first + region.length, buffer.num_cells)
            assert (first >= 0).all() and (first < last).all(), f"{phase.name}: items outside {region.buffer}"
            low, high = buffer.offset + first * buffer.cell_bytes, buffer.offset + last * buffer.cell_bytes
            accesses.append(Access(buffer.allocation, low, high, region.exclusive, region, is_write))
        dynamic = any(axis.is_dynamic for axis in phase.axes)
        return ItemTable(programs, items // num_programs, last_round, tuple(accesses), dynamic)

    def _affine(self, phase: Phase, start: int, strides: tuple[int, ...]) -> Ints:
        assert len(strides) in (0, len(phase.axes)), f"{phase.name}: strides {strides} for {len(phase.axes)} axes"
        values = np.full(phase.num_items, start, np.int64)
        shape = tuple(axis.size for axis in phase.axes)
        if shape not in self._coordinates:
            self._coordinates[shape] = np.stack(np.unravel_index(np.arange(phase.num_items), shape))
        for stride, coordinate in zip(strides, self._coordinates[shape], strict=False):
            values += stride * coordinate
        return values


def _regions(phase: Phase) -> Iterator[tuple[Region, bool]]:
    """Regions with whether they are written: reads, then writes."""
    for read in phase.reads:
        yield read.region, False
    for write in phase.writes:
        yield write, True


def check_well_formed(plan: Plan) -> None:
    """Raises ValueError for a reference to something that the plan does not have."""
    sizes = {counter.name: counter.size for counter in plan.counters}
    if len(plan.phase_named) != len(plan.phases) or len(sizes) != len(plan.counters):
        raise ValueError("phases and counters must have distinct names")
    tables = Tables(plan)
    for phase in plan.phases:
        reads = [*phase.reads, *([phase.early_exit] if phase.early_exit is not None else [])]
        regions = [read.region for read in reads] + list(phase.writes)
        unknown = [region.buffer for region in regions if region.buffer not in plan.buffer_named]
        unknown += [r.producer for r in reads if r.producer is not None and r.producer not in plan.phase_named]
        whats: list[Wait | Signal] = [*phase.waits, *phase.signals]
        unknown += [what.counter for what in whats if what.counter not in sizes]
        if any(read.steps_ago not in (0, 1) for read in reads):
            raise ValueError(f"phase {phase.name} reads what is older than one step: keep it as state")
        if unknown:
            raise ValueError(f"phase {phase.name} names {unknown[0]!r}, which the plan does not have")
        for what in whats:
            elements = tables.elements(phase, what)
            if elements.min() < 0 or elements.max() >= sizes[what.counter]:
                raise ValueError(f"phase {phase.name}: index outside counter {what.counter!r}")
        if phase.early_exit is not None and phase.early_exit.region.strides:
            raise ValueError(f"phase {phase.name} ends a launch: what says so is the same for all items")


def conflict_within(table: ItemTable) -> tuple[Access, Access, int, int] | None:
    """Two accesses of one phase, at least one a write, that overlap in different items; None if there are none."""
    writes = [access for access in table.accesses if access.is_write]
    for write in writes:
        for other in table.accesses:
            if other.memory != write.memory or (write.exclusive and other.region == write.region):
                continue
            pair = _meeting(write, other)
            if pair is not None:
                return write, other, *pair
    return None


def _meeting(write: Access, other: Access) -> tuple[int, int] | None:
    """Items i of `write` and j of `other`, i != j, that access a common byte."""
    order = np.argsort(write.low, kind="stable")
    low, high = write.low[order], write.high[order]
    clash = np.nonzero(low[1:] < np.maximum.accumulate(high)[:-1])[0]
    if len(clash):  # write against itself: whatever the items, two of them meet
        return int(order[clash[0]]), int(order[clash[0] + 1])
    # The writes are disjoint and sorted, so an item overlaps a contiguous run of them.
    first = np.searchsorted(high, other.low, side="right")
    past = np.searchsorted(low, other.high, side="left")
    items = np.arange(len(first))
    found = np.where(past > first, order[np.minimum(first, len(order) - 1)], items)
    bad = np.nonzero((past - first > 1) | (found != items))[0]
    if not len(bad):
        return None
    item = int(bad[0])
    return int(order[first[item]] if order[first[item]] != item else order[first[item] + 1]), item
