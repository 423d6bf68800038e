"""The phases of a DFlash drafter: it drafts at the beginning of a step, and the step's rows extend its context.

    D.embed      the rows of a block for each sequence, its newest token and masked ones, and their embeddings
    D00.qkv      and so on: the drafter's layers, as the target's, on the rows of the blocks
    D.lm_head    the drafter's norm and the target's LM head, of which the largest logits are kept
    pick         each sequence's proposals
    embed ...    the target's step, which allocates its rows by what is proposed (see `round_phases`); the tapped layers
                 leave their outputs in the buffers `features.*`
    fuse         all features of a row, projected to the hidden size
    context      keys and values of every drafter layer for the rows of the step, before QK-norm and rotary
    append       QK-norm, rotary, and into the drafter's own buffers

A step appends all of its rows, drafts that will not stand included: what lies past the newest token is overwritten
before it is read, by the next block's own keys and values and then by the next step's rows. So the context is right
after every step, whoever decided what its rows are; a prompt that the host has computed needs no more.

`fuse` and `context` follow the last tapped layer and the last layer, `append` the LM head: each comes when what it
waits for is long done, so that the context costs the step little but its bytes. Projecting all layers at once makes
three phases of what would be two a layer; it reads the same rows of the weights as the layers' own projections.

Blocks lie one after another, and all of them have to fit the rows of a step: whoever launches sees to that. A step in
which nobody drafts, as in all whose rows the host names, has none: then the phases of the drafter's layers have no
items (`Stack.is_skippable`), and cost what handing over does.

Left out: what `drafter_spec.why_not_planned` names, and drafting with noise, or a number of tokens that changes.
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
    """Whether a phase computes rows of blocks."""
    return any(region.buffer == "blocks" for region in (*(read.region for read in phase.reads), *phase.writes))


class DrafterOps:
    """Adds them to a plan under construction."""

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
        """`D.embed` to `pick`."""
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
            (Axis("sequence", R),),  # all of them: one without a block says so
            reads=(self.stack.rows, Read(Region("drafter.best", tiles), "D.lm_head")),
            writes=(Region("proposals", 1, 0, (1,)),),
            waits=(self.builder.all_programs("D.lm_head"),),
            signals=(Signal("pick", "program"),),
            work=Work(activation_bytes=(2 * tiles + R) * WIDE_BYTES),
        )

    def fuse(self, before: str) -> None:
        """`before`: the last tapped layer's last phase."""
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
        """The buffer of one tapped layer, whose last phase is the last that writes there."""
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
