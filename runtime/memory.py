"""What a step works on: the plan's buffers, the key/value buffers of all sequences, and the records of its rows.

Legend: R rows, D hidden, V vocabulary, C features; in caches G key/value heads, H query/key and V value head size.
"""

from collections.abc import Sequence

import torch

from speedstack.runtime.backend import Rows
from speedstack.runtime.phases import ELEMENT_BYTES
from speedstack.runtime.plan import Plan
from speedstack.runtime.ring import ring_length
from speedstack.runtime.weights import ModelWeights

RECORD = 8  # int32 fields of a row, and of its sampling state

WIDE = {"partial": torch.float32, "router": torch.float32, "logits": torch.float32}
INTEGER = {"rows": torch.int32, "best": torch.int32}


class Memory:
    """The plan's buffers, the key/value buffers of `num_slots` sequences, and what a step gets and gives."""

    def __init__(
        self,
        plan: Plan,
        weights: ModelWeights,
        num_slots: int,
        max_length: int,
        max_steps: int = 1,
        caches: list[torch.Tensor] | None = None,
    ) -> None:
        """max_steps: that one launch may make. caches: the key/value buffers to go on with; None makes new ones."""
        like = weights.embedding_VD
        self.num_slots = num_slots
        self.buffers: dict[str, torch.Tensor] = {}
        for name, num_bytes in plan.memory_bytes().items():
            if name.endswith(".cache"):
                continue
            dtype = INTEGER.get(name, WIDE.get(name, like.dtype))
            size = num_bytes // (ELEMENT_BYTES if dtype == like.dtype and name not in WIDE else 4)
            self.buffers[name] = torch.zeros(size, dtype=dtype, device=like.device)
        # What a drafter taps, [C, R]; no rows where there is none.
        self.features_CR = self.buffers.setdefault("features", like.new_zeros(0)).view(-1, plan.rows)
        self.rows = self.buffers["rows"].view(plan.rows, RECORD)
        self.rows[:, 0] = -1
        self.sampling = torch.zeros(plan.rows, RECORD, dtype=torch.int32, device=like.device)
        # What the host reads after every launch, in one copy: tokens [max_steps, R], and whether the launch failed.
        self.outbox = torch.zeros(max_steps * plan.rows + 1, dtype=torch.int32, device=like.device)
        self.tokens = self.outbox[:-1].view(max_steps, plan.rows)
        self.failed = self.outbox[-1:]
        self.hidden_DR = self.buffers["hidden"].view(weights.spec.hidden_size, plan.rows)
        self.logits_VR = self.buffers["logits"].view(weights.spec.vocab_size, plan.rows)
        self.caches = self.new_caches(weights, max_length) if caches is None else caches

    def new_caches(self, weights: ModelWeights, max_length: int) -> list[torch.Tensor]:
        """A layer's keys and values, [G, slots, positions, H + V]."""
        caches = []
        for layer in weights.spec.layers:
            a = layer.attention
            positions = ring_length(a.window, max_length)
            shape = (a.num_kv_heads, self.num_slots, positions, a.qk_head_dim + a.v_head_dim)
            caches.append(weights.embedding_VD.new_zeros(shape))
        return caches


def row_records(rows: Rows, capacity: int) -> torch.Tensor:
    """Int32 [capacity, RECORD] on the CPU; fields as in `kernels.triton.rows`. Rows of a sequence are neighbours."""
    starts = [row for row, slot in enumerate(rows.slots) if row == 0 or slot != rows.slots[row - 1]]
    assert len({rows.slots[row] for row in starts}) == len(starts), "the rows of a sequence have to be neighbours"
    records = [[-1] + [0] * (RECORD - 1) for _ in range(capacity)]
    for sequence, (first, end) in enumerate(zip(starts, [*starts[1:], len(rows.slots)], strict=True)):
        for row in range(first, end):
            records[row][:4] = [rows.tokens[row], rows.slots[row], rows.positions[row], rows.positions[first]]
        records[sequence][4:6] = [first, end - first]
    return torch.tensor(records, dtype=torch.int32)


def sampling_records(
    seeds: Sequence[int], sequences: Sequence[int], temperatures: Sequence[float], capacity: int
) -> torch.Tensor:
    """Int32 [capacity, RECORD] on the CPU: what `kernels.triton.head` samples by."""
    records = torch.zeros(capacity, RECORD, dtype=torch.int32)
    for row, (seed, sequence) in enumerate(zip(seeds, sequences, strict=True)):
        records[row, :4] = torch.tensor([seed % 2**64, sequence % 2**64], dtype=torch.uint64).view(torch.int32)
    temperature = torch.tensor(list(temperatures), dtype=torch.float32)
    records[: len(temperature), 4] = temperature.view(torch.int32)
    return records
