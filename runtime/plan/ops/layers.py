"""The phases of a model's layers. A layer has seven, or six with a dense MLP:

    qkv          norm and projection, cut by columns inside each key/value head's group
    attention    QK-norm, rotary, cache append, attention of one split of the context; waits for its group only
    combine      the splits of a head, in order
    o_proj       output projection, added to the hidden state in place
    router       norm and router logits
    gate_up      top-k; gate, up and activation of one active expert's columns; writes the expert's rows
    down         all active experts' columns, in ascending order of expert, added to the hidden state in place

`embed`, which also allocates the step's rows, comes before the layers and `lm_head` after. `plan/ops/multi_step.py` has
the phases that choose tokens. Decisions:

- A norm has no phase. The writer of hidden columns also writes them times the next norm's weight (`scaled`) and their
  sums of squares in blocks of 16 (`squares`). The reader multiplies `scaled` and divides the product by the root mean
  square. Every program repeats top-k. Both read a few KB from L2 and save a synchronization, which costs more.
- QK-norm, rotary and append are in `attention`, so `qkv` can be cut finer than a head and keeps all programs busy with
  few heads. The item whose split holds a row's position appends it.
- `gate_up` has an item per (active expert, tile), a number known only at run time. `down` has an item per hidden tile
  and loops over the active experts: its load does not depend on routing, and the weighted sum has one order and needs
  no atomics.
- Splits have a fixed size and absolute bounds, so a row's bits depend on its position alone. Tiles cut columns only:
  one item sums an element's whole contraction axis.

Items compute all rows of a step's capacity, missing ones as zeros. Buffers may hold garbage for missing rows; it never
reaches other rows.

Left out: the exchange between GPUs. The cost model counts it for a shard's plan, but such plans are not executed:
`scaled` and `squares` would have to be written after the exchange.
"""

from dataclasses import replace

from speedstack.runtime.model.kv_ring import ring_length
from speedstack.runtime.model.spec import AttentionSpec, DenseSpec, LayerSpec, MoeSpec
from speedstack.runtime.plan.builder import PlanBuilder
from speedstack.runtime.plan.ir import Axis, Read, Region, Signal, Wait, Work
from speedstack.runtime.plan.ops.multi_step import ELEMENT_BYTES, WIDE_BYTES
from speedstack.runtime.plan.record_layout import route_words
from speedstack.runtime.plan.tiling import BLOCK_COLUMNS, MMA_TILES, VECTOR_TILES, ceil_div, choose_tile, num_blocks

OWN_COLUMN = "a row belongs to one item"
PAIRS = "each (row, choice) belongs to one active expert, each column to one tile"
FIRST_TILE = "an active expert's record is written by the item of its first tile alone"
SEQUENCES = (
    "each (sequence, split) belongs to one item, and a row to one sequence; a ring is longer than a window and a step, "
    "so that what a step appends lies on nothing that it reads"
)


class LayerBuilder(PlanBuilder):
    """Adds the phases of a model, in order."""

    def embed(
        self, name: str, op: str, reads: tuple[Read, ...], own: tuple[Region, ...], wait: Wait, early_exit: Read | None
    ) -> str:
        """Determines the rows and embeds their tokens. own: other regions that an item writes for its row."""
        D = self.spec.hidden_size
        self.add(
            name, op, (Axis("row", self.rows),),  # all: an idle row must say so
            reads=list(reads),
            # An item writes one row of all columns; other items write other rows of the same columns.
            writes=[*own, *(self.whole(each, OWN_COLUMN) for each in ("hidden", "scaled", "squares"))],
            waits=[wait],
            early_exit=early_exit,
            work=Work(
                weight_bytes=self.stack.formats.num_bytes("embedding", self.rows * D),
                activation_bytes=D * ELEMENT_BYTES + norm_bytes(D),
            ),
        )  # fmt: skip
        return name

    def layer(self, index: int, layer: LayerSpec, before: str) -> str:
        """Adds a layer of the stack; returns its last phase's name."""
        self.rotation = 0  # layers of one kind share a task list
        before = self.attention(index, layer.attention, before)
        if isinstance(layer.mlp, DenseSpec):
            return self.dense(index, layer.mlp, before)
        return self.moe(index, layer.mlp, before)

    def attention(self, index: int, a: AttentionSpec, before: str) -> str:
        at, D, R, G = self.stack.name(index), self.spec.hidden_size, self.rows, a.num_kv_heads
        heads = a.num_heads // G
        width = heads * a.qk_head_dim + a.qk_head_dim + a.v_head_dim
        tile = choose_tile(width, self.num_programs, MMA_TILES, G)
        tiles = ceil_div(width, tile)
        # Layers of different shapes share memory for their results: only one layer runs at a time.
        shape = f"{G}x{width}x{tile}"
        qkv = self.buffer(f"qkv.{shape}", G * tiles * tile, R * ELEMENT_BYTES, "qkv")
        splits = self.num_splits(a.window)
        per_head = splits * (a.v_head_dim + 2) * WIDE_BYTES
        partial = self.buffer(f"partial.{a.num_heads}x{per_head}", R * a.num_heads, per_head, "partial")
        attended = self.buffer(
            f"attended.{a.num_heads}x{a.v_head_dim}", R * a.num_heads, a.v_head_dim * ELEMENT_BYTES, "attended"
        )
        positions = ring_length(a.window, self.max_context)
        kv_bytes = (a.qk_head_dim + a.v_head_dim) * ELEMENT_BYTES
        cache = self.stack.cache or self.buffer(f"{at}cache", G, R * positions * kv_bytes)

        num_qkv, num_out = G * width * D, a.num_heads * a.v_head_dim * D
        self.add(
            f"{at}qkv", "qkv", (Axis("kv_head", G), Axis("tile", tiles)), index, tile,
            reads=self.normalized(before),
            writes=[Region(qkv, tile, 0, (tiles * tile, tile))],
            waits=[self.all_programs(before)],
            signals=[Signal(f"{at}qkv", "item", 0, (1, 0))],
            num_counters=G,
            work=Work(
                weight_bytes=self.stack.formats.num_bytes("attention", num_qkv) + (D + G * width * a.has_bias) * 2,
                activation_bytes=norm_bytes(D) + G * width * ELEMENT_BYTES,
                row_flops=2 * num_qkv,
            ),
        )  # fmt: skip
        own = Region(cache, 1, index * G if self.stack.cache else 0, (0, 1, 0), SEQUENCES)
        self.add(
            f"{at}attention", "attention",
            (Axis("sequence", R, True), Axis("kv_head", G), Axis("split", splits, True)), index,
            reads=[
                self.stack.rows,
                Read(Region(qkv, tiles * tile, 0, (0, tiles * tile, 0)), f"{at}qkv"),
                Read(own, None),
            ],
            writes=[own, self.whole(partial, SEQUENCES)],
            waits=[Wait(f"{at}qkv", tiles, tiles, 0, (0, 1, 0))],
            work=Work(
                kv_bytes=G * kv_bytes,
                window=a.window,
                activation_bytes=G * width * ELEMENT_BYTES + a.num_heads * (a.v_head_dim + 2) * WIDE_BYTES,
                position_flops=2 * a.num_heads * (a.qk_head_dim + a.v_head_dim),
            ),
        )  # fmt: skip
        one = (a.num_heads, 1)
        self.add(
            f"{at}combine", "combine", (Axis("row", R, True), Axis("head", a.num_heads)), index,
            reads=[self.stack.rows, self.read(partial, f"{at}attention", 1, one)],
            writes=[Region(attended, 1, 0, one)],
            waits=[self.all_programs(f"{at}attention")],
            work=Work(
                activation_bytes=a.num_heads * ((a.v_head_dim + 2) * WIDE_BYTES + a.v_head_dim * ELEMENT_BYTES)
            ),
        )  # fmt: skip
        self.project(
            f"{at}o_proj", "o_proj", index, [self.read_whole(attended, f"{at}combine")], f"{at}combine", before,
            Work(
                weight_bytes=self.stack.formats.num_bytes("attention_output", num_out) + D * 2 * a.has_bias,
                activation_bytes=(a.num_heads * a.v_head_dim + 2 * D) * ELEMENT_BYTES + norm_bytes(D),
                row_flops=2 * num_out,
                all_reduce_bytes=D * ELEMENT_BYTES * self.is_sharded,
            ),
        )  # fmt: skip
        return f"{at}o_proj"

    def dense(self, index: int, mlp: DenseSpec, before: str) -> str:
        at, D, width = self.stack.name(index), self.spec.hidden_size, mlp.intermediate_size
        tile = choose_tile(width, self.num_programs, MMA_TILES)
        act = self.buffer(f"act.dense.{width}", num_blocks(width) * BLOCK_COLUMNS, self.rows * ELEMENT_BYTES, "act")
        self.add(
            f"{at}gate_up", "dense_gate_up", (Axis("tile", ceil_div(width, tile)),), index, tile,
            reads=self.normalized(before),
            writes=[Region(act, tile, 0, (tile,))],
            waits=[self.all_programs(before)],
            work=Work(
                weight_bytes=self.stack.formats.num_bytes("dense", 2 * width * D) + D * 2,
                activation_bytes=norm_bytes(D) + width * ELEMENT_BYTES,
                row_flops=4 * width * D,
            ),
        )  # fmt: skip
        self.project(
            f"{at}down", "dense_down", index, [self.read_whole(act, f"{at}gate_up")], f"{at}gate_up", before,
            Work(
                weight_bytes=self.stack.formats.num_bytes("dense", width * D),
                activation_bytes=(width + 2 * D) * ELEMENT_BYTES + norm_bytes(D),
                row_flops=2 * width * D,
                all_reduce_bytes=D * ELEMENT_BYTES * self.is_sharded,
            ),
        )  # fmt: skip
        return f"{at}down"

    def moe(self, index: int, moe: MoeSpec, before: str) -> str:
        at, D, R, E, K = self.stack.name(index), self.spec.hidden_size, self.rows, moe.num_experts, moe.top_k
        width = moe.intermediate_size
        # Balanced for one row, which already makes top_k experts' items; more rows make more items.
        tile = choose_tile(width, self.num_programs, MMA_TILES, K)
        router_tile = choose_tile(E, self.num_programs, VECTOR_TILES)
        logits = self.buffer(f"router.{E}", E, R * WIDE_BYTES, "router")
        act = self.buffer(f"act.moe.{width}x{K}", R * K, width * ELEMENT_BYTES, "act")
        routes = self.buffer(f"routes.{E}x{K}", min(E, R * K), route_words(R) * WIDE_BYTES, "routes")
        bias = moe.has_bias
        self.add(
            f"{at}router", "router", (Axis("tile", ceil_div(E, router_tile)),), index, router_tile,
            reads=self.normalized(before),
            writes=[Region(logits, router_tile, 0, (router_tile,))],
            waits=[self.all_programs(before)],
            work=Work(
                weight_bytes=self.stack.formats.num_bytes("router", E * D)
                + D * 2
                + E * 4 * (bias or moe.has_correction_bias),
                activation_bytes=norm_bytes(D) + E * WIDE_BYTES,
                row_flops=2 * E * D,
            ),
        )  # fmt: skip
        sizes = {"num_experts": E, "top_k": K}
        self.add(
            f"{at}gate_up", "expert_gate_up",
            (Axis("expert", min(E, R * K), True), Axis("tile", ceil_div(width, tile))), index, tile,
            reads=[*self.normalized(before), self.read_whole(logits, f"{at}router")],
            writes=[Region(routes, 1, 0, (1, 0), FIRST_TILE), self.whole(act, PAIRS)],
            waits=[self.all_programs(f"{at}router")],
            work=Work(
                expert_bytes=self.stack.formats.num_bytes("experts", 2 * width * D) + 2 * width * 2 * bias,
                activation_bytes=norm_bytes(D) + E * WIDE_BYTES + K * width * ELEMENT_BYTES,
                row_flops=4 * K * width * D,
                **sizes,
            ),
        )  # fmt: skip
        # Prefetching reads the logits before the routes are written.
        reads = [self.read_whole(logits, f"{at}router")]
        reads += [self.read_whole(act, f"{at}gate_up"), self.read_whole(routes, f"{at}gate_up")]
        self.project(
            f"{at}down", "expert_down", index, reads, f"{at}gate_up", before,
            Work(
                expert_bytes=self.stack.formats.num_bytes("experts", width * D) + D * 2 * bias,
                activation_bytes=E * WIDE_BYTES + (K * width + 2 * D) * ELEMENT_BYTES + norm_bytes(D),
                row_flops=2 * K * width * D,
                all_reduce_bytes=D * ELEMENT_BYTES * self.is_sharded,
                **sizes,
            ),
        )  # fmt: skip
        return f"{at}down"

    def head(self, name: str, before: str, best: str, has_logits: bool) -> None:
        """Adds the LM head: the largest logits go to `best`, and all logits are kept if another phase needs them."""
        D, V, R = self.spec.hidden_size, self.spec.vocab_size, self.rows
        tile = choose_tile(V, self.num_programs, MMA_TILES)
        matrix_bytes = self.stack.formats.num_bytes("lm_head", V * D)
        tiles = ceil_div(V, tile)
        # each tile's largest logit, or score, and its index
        writes = [Region(self.buffer(best, tiles, R * 2 * WIDE_BYTES), 1, 0, (1,))]
        if has_logits:
            writes.insert(0, Region(self.buffer("logits", V, R * WIDE_BYTES), tile, 0, (tile,)))
            # the largest logit, for rows whose `best` is a score
            writes.insert(1, Region(self.buffer("peaks", tiles, R * WIDE_BYTES), 1, 0, (1,)))
        self.add(
            name, "lm_head", (Axis("tile", tiles),), None, tile,
            reads=self.normalized(before),
            writes=writes,
            waits=[self.all_programs(before)],
            work=Work(
                weight_bytes=D * 2 + matrix_bytes * has_logits,
                repeated_bytes=matrix_bytes * (not has_logits),
                activation_bytes=norm_bytes(D) + V * WIDE_BYTES * has_logits,
                row_flops=2 * V * D,
                all_reduce_bytes=8 * self.is_sharded,
            ),
        )  # fmt: skip

    def project(
        self, name: str, op: str, index: int, reads: list[Read], waits_for: str, hidden_of: str, work: Work
    ) -> None:
        """Adds a projection to the hidden size, added to the hidden state in place."""
        D = self.spec.hidden_size
        tile = choose_tile(D, self.num_programs, MMA_TILES)
        blocks = tile // BLOCK_COLUMNS
        writes = [Region("hidden", tile, 0, (tile,)), Region("scaled", tile, 0, (tile,))]
        writes.append(Region("squares", blocks, 0, (blocks,)))
        if op != "o_proj" and not self.stack.is_skippable and index in self.taps:  # the layer's last phase
            writes.append(replace(writes[0], buffer=f"features.{self.taps.index(index)}"))
        self.add(
            name, op, (Axis("tile", ceil_div(D, tile)),), index, tile,
            reads=[*reads, self.stack.rows, self.read("hidden", hidden_of, tile, (tile,))],
            writes=writes,
            waits=[self.all_programs(waits_for)],
            work=work,
        )  # fmt: skip


def norm_bytes(columns: int) -> int:
    """Bytes that a norm reads per row: the scaled state and the sums of squares."""
    return columns * ELEMENT_BYTES + num_blocks(columns) * WIDE_BYTES
