"""A plan under construction: buffers, phases and counters by name, and dependencies between phases."""

from dataclasses import dataclass, field, replace
from typing import Literal

from speedstack.runtime.model.drafter_spec import DrafterSpec
from speedstack.runtime.model.spec import ModelSpec
from speedstack.runtime.model.weight_formats import WeightFormats
from speedstack.runtime.plan.ir import Axis, Buffer, Counter, Phase, Read, Region, Signal, Wait, Work
from speedstack.runtime.plan.ops.multi_step import MultiStepOps
from speedstack.runtime.plan.tiling import MMA_TILES, ceil_div, choose_tile


@dataclass(frozen=True)
class Stack:
    """Layers that run on the same rows: the target's or the drafter's.

    prefix: of phase names. first: number of the first layer in `Phase.layer`. rows: the buffer that describes the rows.
    cache: one key/value buffer for all layers, if they share one. is_skippable: a step may have no such rows, and the
    phases then have no items.
    """

    prefix: str
    first: int
    formats: WeightFormats
    rows: Read
    cache: str = ""
    is_skippable: bool = False

    def name(self, layer: int) -> str:
        """The prefix of a layer's phase names."""
        return f"{self.prefix}{layer:02d}."


@dataclass
class PlanBuilder:
    """A plan under construction. stack: the layers that phases are built for."""

    spec: ModelSpec
    num_programs: int
    rows: int
    max_context: int
    split_size: int
    is_sharded: bool
    taps: tuple[int, ...]
    deciding: MultiStepOps
    stack: Stack
    drafter: DrafterSpec | None = None
    buffers: dict[str, Buffer] = field(default_factory=dict)
    counters: list[Counter] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    rotation: int = 0

    def add(
        self,
        name: str,
        op: str,
        axes: tuple[Axis, ...],
        layer: int | None = None,
        tile: int = 0,
        *,
        reads: list[Read],
        writes: list[Region],
        waits: list[Wait],
        work: Work,
        signals: list[Signal] | None = None,
        num_counters: int = 1,
        early_exit: Read | None = None,
    ) -> None:
        """Adds a phase and its counter, which every program signals once by default."""
        each: Literal["program"] = "program"
        if layer is not None:
            layer += self.stack.first
        if self.stack.is_skippable:  # to nothing, where the step has no such rows
            axes = (replace(axes[0], is_dynamic=True), *axes[1:])
        phase = Phase(
            name, op, axes, layer, tile, tuple(reads), tuple(writes), tuple(waits),
            tuple(signals) if signals is not None else (Signal(name, each),), work, early_exit=early_exit,
        )  # fmt: skip
        self.append(phase, num_counters)

    def append(self, phase: Phase, num_counters: int = 1) -> None:
        """Adds a phase and, if it signals, its counter. Its items begin at the program where the previous ones end."""
        if phase.signals:
            self.counters.append(Counter(phase.name, num_counters))
        self.phases.append(replace(phase, rotation=self.rotation))
        self.rotation = (self.rotation + phase.num_items) % self.num_programs

    def buffer(self, name: str, num_cells: int, cell_bytes: int, memory: str = "") -> str:
        buffer = Buffer(name, num_cells, cell_bytes, memory)
        assert self.buffers.setdefault(name, buffer) == buffer, f"two shapes of {name}"
        return name

    def whole(self, buffer: str, exclusive: str = "") -> Region:
        return Region(buffer, self.buffers[buffer].num_cells, exclusive=exclusive)

    def read_whole(self, buffer: str, producer: str) -> Read:
        return Read(self.whole(buffer), producer)

    def read(self, buffer: str, producer: str, length: int, strides: tuple[int, ...]) -> Read:
        return Read(Region(buffer, length, 0, strides), producer)

    def normalized(self, producer: str) -> list[Read]:
        """The reads of a phase that needs the normalized hidden state."""
        return [self.stack.rows, self.read_whole("scaled", producer), self.read_whole("squares", producer)]

    def all_programs(self, phase: str) -> Wait:
        """Waits until every program has finished an earlier phase of this step."""
        return Wait(phase, self.num_programs, self.num_programs)

    def choose_tiles(self, width: int, num_groups: int = 1) -> tuple[int, int]:
        """Columns per item of a product, and items per group of `width` columns."""
        tile = choose_tile(width, self.num_programs, MMA_TILES, num_groups)
        return tile, ceil_div(width, tile)

    def num_splits(self, window: int | None) -> int:
        """Most splits of the context that the rows of one sequence can see."""
        total = ceil_div(self.max_context, self.split_size)
        if window is None:
            return total
        span = window + self.rows - 1
        return min(total, (span + self.split_size - 2) // self.split_size + 1)
