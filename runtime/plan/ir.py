"""A decode step as data: phases of work items, buffers they read and write, counters they wait on and signal.

A plan runs on `num_programs` programs (thread blocks, or threads of an interpreter). Each program runs, for step 0, 1,
2, ... and every phase in order,

    wait for the phase's waits that name one counter for all items
    for item in range((program - rotation) mod num_programs, number of items, num_programs):
        wait for the counters of this item;  read;  compute;  write;  signal the counters of this item
    signal, once, the counters that count programs: also from a program that had no item

so a program's task list is static. Items are the cells of the row-major product of the phase's axes. A dynamic axis is
cut at run time (active experts, sequences and rows of a step, splits of a context): items beyond the cut access nothing
but still signal.

Counters start at zero and only grow, so no reset can race. A wait's threshold is `per_step * step + offset`. Kernels
compare signed 32-bit differences, which survives overflow.

The proof (`plan/verify/proof.py`), the cost (`perf/cost.py`), the tests and the kernels derive from this.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal


@dataclass(frozen=True)
class Buffer:
    """`num_cells` cells of `cell_bytes` bytes from byte `offset` of the allocation `memory`.

    A cell is the unit that items access: a column of all rows, a head of a row, ... Buffers may share an allocation;
    the proof works on bytes.
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
    """Cells [first, first + length) of a buffer, first = start + sum(stride * index), cut at the buffer's end.

    exclusive: why items of one phase never overlap here, whatever the run's lists, although the formula allows it;
    empty if the formula keeps them apart.
    """

    buffer: str
    length: int
    start: int = 0
    strides: tuple[int, ...] = ()
    exclusive: str = ""


@dataclass(frozen=True)
class Read:
    """A region, and the phase whose writes it must see, `steps_ago` steps before this one.

    producer None: state that lives across steps, written in place and first by the host.
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
    """Waits until counter `name[start + sum(stride * index)]` is at least per_step * step + offset.

    Without strides, every program waits once on entering the phase, even without items; with strides, before each item.
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
    """Adds one to counter `name[start + sum(stride * index)]` after each item, or once per program at phase end."""

    counter: str
    each: Literal["item", "program"]
    start: int = 0
    strides: tuple[int, ...] = ()


@dataclass(frozen=True)
class Axis:
    """One dimension of a phase's items; with `is_dynamic`, a step has at most `size` of them."""

    name: str
    size: int
    is_dynamic: bool = False


@dataclass(frozen=True)
class Work:
    """Bytes and FLOPs of a phase as coefficients, for any number of rows and any context.

    weight_bytes: per step. repeated_bytes: the same, for weights that another phase also has. expert_bytes: per active
    expert, of `num_experts` with `top_k` per row. kv_bytes: per visible position of a sequence, at most `window`.
    activation_bytes, row_flops: per row. position_flops: per row and visible position. all_reduce_bytes: per row,
    exchanged between GPUs after the phase.
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

    op: the device function. tile: columns (or experts, vocabulary entries) per item, 0 if not cut by columns.
    early_exit: what every program reads after the entry waits, items or not, to learn whether the launch is over. Only
    a step's first phase has one: counters then stay at whole steps, where the next launch continues.
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
        """Upper bound; dynamic axes may cut it."""
        return math.prod(axis.size for axis in self.axes)

    def index(self, item: int) -> tuple[int, ...]:
        """Coordinates of an item along the axes."""
        coordinates = []
        for axis in reversed(self.axes):
            item, coordinate = divmod(item, axis.size)
            coordinates.append(coordinate)
        return tuple(reversed(coordinates))


@dataclass(frozen=True)
class Plan:
    """A plan for steps of up to `rows` rows; see the module."""

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
        """Index of each counter's first element in the array of all counters."""
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
