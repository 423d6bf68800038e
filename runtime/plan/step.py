"""Builds the plan of a decode step: the model's layers, the drafter, and the phases that choose tokens."""

from collections.abc import Sequence
from dataclasses import replace

from speedstack.runtime.model.drafter_spec import DrafterSpec
from speedstack.runtime.model.spec import ModelSpec
from speedstack.runtime.model.weight_formats import WeightFormats
from speedstack.runtime.plan.builder import Stack
from speedstack.runtime.plan.ir import Plan
from speedstack.runtime.plan.ops.drafter import DrafterOps
from speedstack.runtime.plan.ops.layers import LayerBuilder
from speedstack.runtime.plan.ops.multi_step import ELEMENT_BYTES, WIDE_BYTES, MultiStepOps
from speedstack.runtime.plan.tiling import BLOCK_COLUMNS, num_blocks

MAX_ROWS = 16  # rows of a step: the narrow side of one tensor-core product
SPLIT_SIZE = 256  # positions of a context that one item attends to


def build_plan(
    spec: ModelSpec,
    formats: WeightFormats,
    num_programs: int,
    rows: int = MAX_ROWS,
    max_context: int = 4096,
    split_size: int = SPLIT_SIZE,
    is_sharded: bool = False,
    taps: Sequence[int] = (),
    has_prompt_lookup: bool = False,
    drafter: DrafterSpec | None = None,
) -> Plan:
    """The plan for steps of up to `rows` rows over contexts of up to `max_context` positions.

    is_sharded: `spec` is one GPU's part; exchanges follow o_proj, down and lm_head.
    taps: layers whose outputs are also written to `features.0`, `features.1`, ..., for a drafter.
    has_prompt_lookup: sequences decoded without the host draft by prompt lookup.
    drafter: they draft with this one, whose context every step extends; `taps` are its target_layer_ids.

    Raises ValueError for sizes out of range.
    """
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(f"a step holds 1 to {MAX_ROWS} rows, not {rows}")
    if not 1 <= max_context <= spec.max_position_embeddings:
        raise ValueError(f"context {max_context} is outside the model's 1 to {spec.max_position_embeddings} positions")
    if num_programs < 1 or split_size < 1:
        raise ValueError("a plan needs at least one program and splits of at least one position")
    if drafter is not None:
        assert not has_prompt_lookup and drafter.hidden_size == spec.hidden_size
        taps = drafter.target_layer_ids
    deciding = MultiStepOps(num_programs, rows, max_context, has_prompt_lookup, drafter is not None)
    stack = Stack("L", 0, formats, deciding.read_rows())
    builder = StepBuilder(
        spec, num_programs, rows, max_context, split_size, is_sharded, tuple(taps), deciding, stack, drafter
    )
    return builder.build()


class StepBuilder(LayerBuilder):
    """The phases of a step, in order."""

    def build(self) -> Plan:
        D = self.spec.hidden_size
        self.buffers = {buffer.name: buffer for buffer in self.deciding.buffers()}
        self.buffer("hidden", D, self.rows * ELEMENT_BYTES)
        scaled = self.buffers[self.buffer("scaled", num_blocks(D) * BLOCK_COLUMNS, self.rows * ELEMENT_BYTES)]
        self.buffer("squares", num_blocks(D), self.rows * WIDE_BYTES)
        for tap in range(len(self.taps)):
            name = f"features.{tap}"
            self.buffers[name] = replace(scaled, name=name, memory="features", offset=tap * scaled.num_bytes)
        drafting = None if self.drafter is None else DrafterOps(self, self.drafter)
        for phase in self.deciding.first_phases():
            self.append(phase)
        if drafting is not None:
            drafting.propose()
        before = self.embed("embed", "embed", *self.deciding.row_allocation())
        for index, layer in enumerate(self.spec.layers):
            before = self.layer(index, layer, before)
            if drafting is not None and index == max(self.taps):
                drafting.fuse(before)
        if drafting is not None:
            drafting.project_context()
        self.head("lm_head", before, "best", has_logits=True)
        if drafting is not None:
            drafting.append_context()
        buffers, choosing = self.deciding.choosing(self.spec.vocab_size, self.buffers["best"].num_cells)
        self.buffers |= {buffer.name: buffer for buffer in buffers}
        for phase in (*choosing, self.deciding.accept()):
            self.append(phase)
        return Plan(
            model_type=self.spec.model_type,
            num_programs=self.num_programs,
            rows=self.rows,
            max_context=self.max_context,
            split_size=self.split_size,
            buffers=tuple(self.buffers.values()),
            counters=tuple(self.counters),
            phases=tuple(self.phases),
        )
