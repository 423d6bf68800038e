"""A decode step as data: phases of work items, the buffers they read and write, the counters they wait on and signal.

What executes a plan: `num_programs` programs (thread blocks of a persistent kernel, or threads of an interpreter), each
of which runs, for step 0, 1, 2, ... and for every phase in order,

    wait for the phase's waits that name one counter for all items
    for item in range((program - rotation) mod num_programs, number of items, num_programs):
        wait for the counters of this item;  read;  compute;  write;  signal the counters of this item
    signal, once, the counters that count programs: also from a program that had no item

so that a program's task list follows from its number alone and nothing is scheduled at run time. Items are the cells of
the row-major product of the phase's axes. A dynamic axis is cut short at run time (experts that rows chose, sequences
and rows of this step, splits that a context has): an item beyond the cut reads and writes nothing, yet signals. Its
static size bounds it; nothing else about it is known before the launch, and nothing else may be assumed.

Counters only ever grow: they are zero when the kernel starts and are never reset, so that no reset can race. A wait's
threshold is `per_step * step + offset`. Kernels compare as signed 32-bit differences, which survives overflow.

Everything else is derived: the proof (`proof`), the cost (`cost`), what tests execute, the kernels.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal


@dataclass(frozen=True)
class Buffer:
    """`num_cells` cells of `cell_bytes` bytes, one after another from byte `offset` of the allocation `memory`.

    A cell is the piece of a tensor that items read and write: a column of all rows, a head of a row, ... Buffers may
    share an allocation; the proof sees bytes.
    """

    name: str
    num_cells: int
    cell_bytes: int
    memory: str = ""
    offset: int = 0

    @property
    def allocation(self) -> str:
        return self.memory or self.name

    @property
    def num_bytes(self) -> int:
        return self.num_cells * self.cell_bytes


@dataclass(frozen=True)
class Region:
    """Cells [first, first + length) of a buffer with first = start + sum(stride * index), cut at the buffer's end.

    exclusive: why different items of one phase never meet in this region although the formula allows it, for whatever
        lists the run brings; empty where the formula itself keeps them apart.
    """

    buffer: str
    length: int
    start: int = 0
    strides: tuple[int, ...] = ()
    exclusive: str = ""


@dataclass(frozen=True)
class Read:
    """A region read, and the phase whose writes it must see, `steps_ago` steps before this one.

    producer None: state that lives across steps and is written in place, by the host before the first.
    """

    region: Region
    producer: str | None
    steps_ago: int = 0


@dataclass(frozen=True)
class Counter:
    """`size` counters in a row, zero at the start."""

    name: str
    size: int = 1


@dataclass(frozen=True)
class Wait:
    """Until counter `name[start + sum(stride * index)]` is at least per_step * step + offset.

    Without strides every program waits once on entering the phase, items or not; with strides before each item.
    """

    counter: str
    per_step: int
    offset: int
    start: int = 0
    strides: tuple[int, ...] = ()

    def threshold(self, step: int) -> int:
        return self.per_step * step + self.offset


@dataclass(frozen=True)
class Signal:
    """Adds one to counter `name[start + sum(stride * index)]` after each item, or once a program at the phase's end."""

    counter: str
    each: Literal["item", "program"]
    start: int = 0
    strides: tuple[int, ...] = ()


@dataclass(frozen=True)
class Axis:
    """One dimension of a phase's items; `is_dynamic`: at most `size` of them exist in a step."""

    name: str
    size: int
    is_dynamic: bool = False


@dataclass(frozen=True)
class Work:
    """What a phase moves and computes, as coefficients: the same plan serves any number of rows and any context.

    weight_bytes: read once a step. repeated_bytes: the same, of weights that another phase has as well. expert_bytes:
    for each expert that some row chose, of `num_experts`, `top_k` a row.
    kv_bytes: for each position that a sequence sees, at most `window`, of keys and values, or of its text.
    activation_bytes: read and written for each row. row_flops: for each row. position_flops: for each row and position
    it sees. all_reduce_bytes: exchanged between GPUs after the phase, for each row.
    """

    weight_bytes: float = 0.0
    repeated_bytes: float = 0.0
    expert_bytes: float = 0.0
    num_experts: int = 0
    top_k: int = 0
    kv_bytes: float = 0.0
    window: int | None = None
    activation_bytes: float = 0.0
    row_flops: float = 0.0
    position_flops: float = 0.0
    all_reduce_bytes: float = 0.0


@dataclass(frozen=True)
class Phase:
    """Items that may run at the same time.

    op: names the device function; phases of one op differ in layer, sizes and counters only.
    tile: columns (or experts, vocabulary entries) that one item computes, 0 where items are not cut by columns.
    early_exit: what every program reads behind the waits on entering, with items or not, to learn whether the launch is
    over and this step is not made any more. Only of a step's first phase: who leaves there leaves counters as they are
    after whole steps, from which the next launch goes on.
    """

    name: str
    op: str
    axes: tuple[Axis, ...]
    layer: int | None = None
    tile: int = 0
    reads: tuple[Read, ...] = ()
    writes: tuple[Region, ...] = ()
    waits: tuple[Wait, ...] = ()
    signals: tuple[Signal, ...] = ()
    work: Work = field(default_factory=Work)
    rotation: int = 0
    early_exit: Read | None = None

    @property
    def num_items(self) -> int:
        """At most; dynamic axes may cut it."""
        return math.prod(axis.size for axis in self.axes)

    def index(self, item: int) -> tuple[int, ...]:
        """Coordinates of an item along the axes."""
        coordinates = []
        for axis in reversed(self.axes):
            item, coordinate = divmod(item, axis.size)
            coordinates.append(coordinate)
        return tuple(reversed(coordinates))

    def items_of(self, program: int, num_programs: int) -> range:
        """Items of one program, in its order."""
        return range((program - self.rotation) % num_programs, self.num_items, num_programs)


@dataclass(frozen=True)
class Plan:
    """See the module. rows: the capacity of a step; a step may hold fewer."""

    model_type: str
    num_programs: int
    rows: int
    max_context: int
    split_size: int
    buffers: tuple[Buffer, ...]
    counters: tuple[Counter, ...]
    phases: tuple[Phase, ...]

    @cached_property
    def buffer_named(self) -> dict[str, Buffer]:
        return {buffer.name: buffer for buffer in self.buffers}

    @cached_property
    def phase_named(self) -> dict[str, int]:
        """Position of every phase in a step."""
        return {phase.name: index for index, phase in enumerate(self.phases)}

    @cached_property
    def counter_base(self) -> dict[str, int]:
        """Index of every counter's first element in one array of all."""
        bases, total = {}, 0
        for counter in self.counters:
            bases[counter.name] = total
            total += counter.size
        return bases

    @property
    def num_counters(self) -> int:
        return sum(counter.size for counter in self.counters)

    def memory_bytes(self) -> dict[str, int]:
        """Bytes of every allocation."""
        sizes: dict[str, int] = {}
        for buffer in self.buffers:
            end = buffer.offset + buffer.num_bytes
            sizes[buffer.allocation] = max(sizes.get(buffer.allocation, 0), end)
        return sizes


def at(start: int, strides: tuple[int, ...], index: tuple[int, ...]) -> int:
    """start + sum(stride * index); no strides mean zeros."""
    return start + sum(stride * coordinate for stride, coordinate in zip(strides, index, strict=False))
