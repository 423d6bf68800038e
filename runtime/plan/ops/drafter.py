"""The phases of a DFlash drafter: it drafts at the start of a step, and the step's rows extend its context.

    D.embed      block rows of each sequence (newest token, then masks) and their embeddings
    D00.qkv ...  the drafter's layers on the block rows, as the target's
    D.lm_head    the drafter's norm and the target's LM head; keeps the largest logits
    pick         each sequence's proposals
    embed ...    the target's step; it allocates rows by the proposals (`plan/ops/multi_step.py`); tapped layers write
    `features.*`
    fuse         all features of a row, projected to the hidden size
    context      keys and values of every drafter layer, before QK-norm and rotary
    append       QK-norm and rotary, into the drafter's own buffers

A step appends all its rows, rejected drafts included: positions past the newest token are overwritten before they are
read. So the context is right after every step, also after a prompt that the host computes.

`fuse` follows the last tapped layer, `context` the last layer, `append` the LM head, so their waits are over early.
Projecting all layers at once takes three phases instead of two per layer and reads the same weight rows.

All blocks must fit the step's rows; the launcher checks that. In a step without drafting, the drafter's phases have no
items (`Stack.is_skippable`) and cost only their synchronization.

Left out: what `drafter_spec.why_not_planned` names, draft noise, and a varying number of drafts.
"""

from __future__ import annotations

from dataclasses import replace

from speedstack.runtime.model.drafter_spec import DrafterSpec
from speedstack.runtime.model.kv_ring import ring_length
from speedstack.runtime.model.weight_formats import WeightFormats
from speedstack.runtime.plan.builder import Stack
from speedstack.runtime.plan.ir import Axis, Buffer, Phase, Read, Region, Signal, Work
from speedstack.runtime.plan.ops.layers import LayerBuilder
from speedstack.runtime.plan.ops.multi_step import ELEMENT_BYTES, RECORD_BYTES, WIDE_BYTES
from speedstack.runtime.plan.tiling import BLOCK_COLUMNS

CACHE = "drafter.cache"
APPENDED = "each row has a slot and position of its own"


def is_drafting(phase: Phase) -> bool:
    """Whether a phase computes block rows."""
    return any(region.buffer == "blocks" for region in (*(read.region for read in phase.reads), *phase.writes))


class DrafterOps:
    """Adds the drafter's phases to a plan."""

    def __init__(self, builder: LayerBuilder, spec: DrafterSpec) -> None:
        self.builder, self.spec = builder, spec
        target, R = builder.stack.formats, builder.rows
        plain = target.embedding  # a drafter's weights have the dtype of what is not quantized
        formats = WeightFormats(plain, plain, plain, plain, plain, plain, target.lm_head)
        builder.buffers["blocks"] = Buffer("blocks", R, RECORD_BYTES)
        blocks = Read(Region("blocks", R), "D.embed")
        self.stack = Stack("D", builder.spec.num_layers, formats, blocks, CACHE, is_skippable=True)
        attention = spec.layers[0].attention
        self.num_heads = len(spec.layers) * attention.num_kv_heads  # of all layers
        self.width = attention.qk_head_dim + attention.v_head_dim  # a head's key and value
        positions = ring_length(None, builder.max_context)
        builder.buffer(CACHE, self.num_heads, R * positions * self.width * ELEMENT_BYTES)

    def propose(self) -> None:
        """Adds `D.embed` to `pick`."""
        builder, target = self.builder, self.builder.stack
        read, wait = builder.deciding.opening()
        builder.stack = self.stack
        before = builder.embed("D.embed", "block", (read,), (Region("blocks", 1, 0, (1,)),), wait, early_exit=read)
        for index, layer in enumerate(self.spec.layers):
            before = builder.layer(index, layer, before)
        builder.head("D.lm_head", before, "drafter.best", has_logits=False)
        builder.append(self._pick())
        builder.stack = target

    def _pick(self) -> Phase:
        R, tiles = self.builder.rows, self.builder.buffers["drafter.best"].num_cells
        return Phase(
            "pick",
            "pick",
            (Axis("sequence", R),),  # all: one without a block must say so
            reads=(self.stack.rows, Read(Region("drafter.best", tiles), "D.lm_head")),
            writes=(Region("proposals", 1, 0, (1,)),),
            waits=(self.builder.all_programs("D.lm_head"),),
            signals=(Signal("pick", "program"),),
            work=Work(activation_bytes=(2 * tiles + R) * WIDE_BYTES),
        )

    def fuse(self, before: str) -> None:
        """`before`: the last phase of the last tapped layer."""
        builder, D = self.builder, self.builder.spec.hidden_size
        num_features = len(builder.taps) * D
        tile, tiles = builder.choose_tiles(D)
        blocks = tile // BLOCK_COLUMNS
        for name, like in (("context", "scaled"), ("context.squares", "squares")):
            builder.buffers[name] = replace(builder.buffers[like], name=name)
        builder.add(
            "fuse", "fuse", (Axis("tile", tiles),), None, tile,
            reads=[builder.stack.rows, *(self._features(tap) for tap in range(len(builder.taps)))],
            writes=[Region("context", tile, 0, (tile,)), Region("context.squares", blocks, 0, (blocks,))],
            waits=[builder.all_programs(before)],
            work=Work(
                weight_bytes=self.stack.formats.num_bytes("dense", num_features * D) + D * ELEMENT_BYTES,
                activation_bytes=(num_features + D) * ELEMENT_BYTES + D // BLOCK_COLUMNS * WIDE_BYTES,
                row_flops=2 * num_features * D,
            ),
        )  # fmt: skip

    def _features(self, tap: int) -> Read:
        """The buffer of one tapped layer, and the phase that writes it last."""
        buffer = f"features.{tap}"
        writers = [phase for phase in self.builder.phases if any(each.buffer == buffer for each in phase.writes)]
        return self.builder.read_whole(buffer, writers[-1].name)

    def project_context(self) -> None:
        builder, D, R, heads = self.builder, self.builder.spec.hidden_size, self.builder.rows, self.num_heads
        tile, tiles = builder.choose_tiles(self.width, heads)
        num_weights = heads * self.width * D
        raw = builder.buffer("context.kv", heads * tiles * tile, R * ELEMENT_BYTES)
        builder.add(
            "context", "context", (Axis("head", heads), Axis("tile", tiles)), None, tile,
            reads=[builder.stack.rows, *(builder.read_whole(each, "fuse") for each in ("context", "context.squares"))],
            writes=[Region(raw, tile, 0, (tiles * tile, tile))],
            waits=[builder.all_programs("fuse")],
            work=Work(
                repeated_bytes=self.stack.formats.num_bytes("attention", num_weights),
                activation_bytes=(D + heads * self.width) * ELEMENT_BYTES,
                row_flops=2 * num_weights,
            ),
        )  # fmt: skip

    def append_context(self) -> None:
        builder, heads = self.builder, self.num_heads
        own = builder.buffers["context.kv"].num_cells // heads
        builder.add(
            "append", "append", (Axis("sequence", builder.rows, is_dynamic=True), Axis("head", heads)),
            reads=[builder.stack.rows, builder.read("context.kv", "context", own, (0, own))],
            writes=[Region(CACHE, 1, 0, (0, 1), APPENDED)],
            waits=[builder.all_programs("context")],
            signals=[],  # `sample` comes next and signals for it
            work=Work(activation_bytes=2 * heads * self.width * ELEMENT_BYTES),
        )  # fmt: skip
