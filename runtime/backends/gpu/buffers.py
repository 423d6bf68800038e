"""Memory of a step: the plan's buffers, all key/value buffers, and the row records.

The host writes one tensor per launch (the inbox) and reads one after it (the outbox).

Legend: R rows, D hidden, V vocabulary, C features; in caches G key/value heads, H query/key and V value head size.
"""

from collections.abc import Sequence

import torch

from speedstack.runtime.backends.base import Draw, Rows
from speedstack.runtime.model.drafter_spec import DrafterSpec
from speedstack.runtime.model.kv_ring import ring_length
from speedstack.runtime.model.weights import ModelWeights
from speedstack.runtime.plan.ir import Plan
from speedstack.runtime.plan.ops.multi_step import ELEMENT_BYTES
from speedstack.runtime.plan.record_layout import (
    FIRST_POSITION,
    FIRST_ROW,
    NUM_ROWS,
    OUTCOME,
    RECORD,
    SEED,
    TEMPERATURE,
    TOKEN,
    TOP_K,
    TOP_P,
)
from speedstack.runtime.plan.tiling import BLOCK_COLUMNS, num_blocks

# Outbox words before the reports: whether a wait timed out, and the number of steps. All begin at multiples of 16
# bytes, which kernels are compiled for.
FAILED, NUM_MADE, HEADER = 0, 4, 8

WIDE = {
    "squares": torch.float32,
    "context.squares": torch.float32,
    "partial": torch.float32,
    "router": torch.float32,
    "logits": torch.float32,
    "peaks": torch.float32,
}
INTEGER = {name: torch.int32 for name in ("best", "drafter.best", "chains", "notes", "blocks", "proposals", "routes")}
INTEGER["bins"] = torch.int64


class Memory:
    """The plan's buffers, the key/value buffers of `num_slots` sequences, and a step's inputs and outputs."""

    def __init__(
        self,
        plan: Plan,
        weights: ModelWeights,
        num_slots: int,
        max_length: int,
        max_steps: int = 1,
        caches: list[torch.Tensor] | None = None,
        drafter: DrafterSpec | None = None,
    ) -> None:
        """max_steps: per launch. caches: existing key/value buffers; None allocates them. drafter: its contexts follow
        the caches.
        """
        like = weights.embedding_VD
        self.num_slots = num_slots
        self.buffers: dict[str, torch.Tensor] = {}
        R, device = plan.rows, like.device
        self.inbox = torch.zeros(4, R, RECORD, dtype=torch.int32, device=device)
        self.rows, self.sampling, self.sequences, self.draws = self.inbox
        self.rows[:, TOKEN] = -1
        # One report per step: chosen tokens [R] and each sequence's outcome [R, OUTCOME].
        length = (1 + OUTCOME) * R
        self.outbox = torch.zeros(HEADER + max_steps * length, dtype=torch.int32, device=device)
        self.failed, self.num_made = self.outbox[FAILED:][:1], self.outbox[NUM_MADE:][:1]
        self.reports = self.outbox[HEADER:].view(max_steps, length)
        self.chosen = self.reports[:, :R]
        self.buffers |= {"rows": self.rows, "sequences": self.sequences}
        self.buffers |= {"chosen": self.reports, "outcome": self.reports}
        for name, num_bytes in plan.memory_bytes().items():
            if name.endswith(".cache") or name in self.buffers:
                continue
            if name == "history":  # for all slots, as the caches
                self.buffers[name] = torch.zeros(num_slots, max_length, dtype=torch.int32, device=device)
                continue
            dtype = INTEGER.get(name, WIDE.get(name, like.dtype))
            size = num_bytes // (ELEMENT_BYTES if dtype == like.dtype and name not in WIDE else dtype.itemsize)
            self.buffers[name] = torch.zeros(size, dtype=dtype, device=like.device)
        # Drafter taps, one tensor per layer, in blocks of columns.
        taps = self.buffers.setdefault("features", like.new_zeros(0))
        self.features = taps.view(-1, num_blocks(weights.spec.hidden_size), R, BLOCK_COLUMNS)
        self.hidden_DR = self.buffers["hidden"].view(weights.spec.hidden_size, plan.rows)
        self.logits_VR = self.buffers["logits"].view(weights.spec.vocab_size, plan.rows)
        self.caches = self.new_caches(weights, max_length) if caches is None else caches
        self.contexts = like.new_zeros(0)
        if drafter is not None:
            self.contexts = self.new_contexts(drafter, like, max_length)

    def features_RC(self, num_rows: int) -> torch.Tensor:
        """The newest step's features for a drafter."""
        D = self.hidden_DR.shape[0]
        return torch.cat([tap.transpose(0, 1).flatten(1)[:num_rows, :D] for tap in self.features], dim=-1)

    def report_words(self, num_steps: int) -> torch.Tensor:
        """The header and the newest launch's reports."""
        return self.outbox[: HEADER + num_steps * self.reports.shape[1]]

    def new_caches(self, weights: ModelWeights, max_length: int) -> list[torch.Tensor]:
        """Keys and values per layer, [G, slots, positions, H + V]."""
        caches = []
        for layer in weights.spec.layers:
            a = layer.attention
            positions = ring_length(a.window, max_length)
            shape = (a.num_kv_heads, self.num_slots, positions, a.qk_head_dim + a.v_head_dim)
            caches.append(weights.embedding_VD.new_zeros(shape))
        return caches

    def new_contexts(self, drafter: DrafterSpec, like: torch.Tensor, max_length: int) -> torch.Tensor:
        """Keys and values of all drafter layers, [L, G, slots, positions, H + V]."""
        a = drafter.layers[0].attention
        shape = (a.num_kv_heads, self.num_slots, ring_length(None, max_length), a.qk_head_dim + a.v_head_dim)
        return like.new_zeros(len(drafter.layers), *shape)

    def contexts_of_slots(self, max_length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """A drafter's keys [L, positions, G, H] and values [L, positions, G, V] by slot, as views."""
        size = self.contexts.shape[-1] // 2
        keys, values = self.contexts[..., :max_length, :].transpose(1, 3).split(size, dim=-1)
        return [(keys[:, :, slot], values[:, :, slot]) for slot in range(self.num_slots)]


def row_records(rows: Rows, capacity: int) -> torch.Tensor:
    """Int32 [capacity, RECORD] on the CPU (`plan/record_layout.py`). Rows of a sequence are adjacent."""
    starts = [row for row, slot in enumerate(rows.slots) if row == 0 or slot != rows.slots[row - 1]]
    assert len({rows.slots[row] for row in starts}) == len(starts), "the rows of a sequence have to be neighbours"
    records = [[-1] + [0] * (RECORD - 1) for _ in range(capacity)]
    for sequence, (first, end) in enumerate(zip(starts, [*starts[1:], len(rows.slots)], strict=True)):
        for row in range(first, end):
            records[row][TOKEN : FIRST_POSITION + 1] = [
                rows.tokens[row],
                rows.slots[row],
                rows.positions[row],
                rows.positions[first],
            ]
        records[sequence][FIRST_ROW : NUM_ROWS + 1] = [first, end - first]
    return torch.tensor(records, dtype=torch.int32)


def step_inbox(rows: Rows, capacity: int) -> torch.Tensor:
    """`Memory.inbox` for a step whose rows the host names; int32 [4, capacity, RECORD] on the CPU."""
    draws = rows.draws or [None] * len(rows.tokens)
    sampling = sampling_records(draws, capacity)
    nobody = torch.zeros_like(sampling)
    return torch.stack([row_records(rows, capacity), sampling, nobody, nobody])


def sampling_records(draws: Sequence[Draw | None], capacity: int) -> torch.Tensor:
    """Int32 [capacity, RECORD] on the CPU: sampling of rows or sequences; zeros are greedy."""
    records = torch.zeros(capacity, RECORD, dtype=torch.int32)
    drawn = [(row, draw) for row, draw in enumerate(draws) if draw is not None]
    if drawn:
        rows = [row for row, _ in drawn]
        keys = torch.tensor([(draw.seed % 2**64, draw.sequence % 2**64) for _, draw in drawn], dtype=torch.uint64)
        records[rows, SEED:TEMPERATURE] = keys.view(torch.int32)
        temperatures = torch.tensor([draw.params.temperature for _, draw in drawn], dtype=torch.float32)
        records[rows, TEMPERATURE] = temperatures.view(torch.int32)
        cuts = [(min(draw.params.top_k, 2**31 - 1), draw.params.top_p_share) for _, draw in drawn]
        records[rows, TOP_K : TOP_P + 1] = torch.tensor(cuts, dtype=torch.int32)
    return records
