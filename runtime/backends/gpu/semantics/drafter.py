"""The DFlash drafter's own phases in PyTorch, on the plan's buffers; `layers.py` has its layers.

Buffers, with R rows (the plan's capacity), `n` tiles of `t` columns:

    blocks        int64 [R, 8]      block rows, fields as in `plan/record_layout.py`
    drafter.best  [R, T, 2]         the largest logit of each tile and its index
    context       [R, D]            features projected, times the weight of the norm (D in whole blocks of 16)
    context.squares  float32 [R, D / 16]
    context.kv    [R, L * G, n * t] key and value of every layer's head, padding
    drafter.cache                   as the target's caches, after them
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from speedstack.runtime.backends.drafter_weights import DrafterWeights
from speedstack.runtime.backends.gpu.semantics.memory import LayerBuffers
from speedstack.runtime.backends.gpu.semantics.multi_step import ItemSemantics, Steps
from speedstack.runtime.backends.reference import rms_norm
from speedstack.runtime.model.kv_ring import ring_length
from speedstack.runtime.model.rope import rotate
from speedstack.runtime.model.weights import plain_matrix
from speedstack.runtime.plan.ir import Phase
from speedstack.runtime.plan.ops.drafter import is_drafting
from speedstack.runtime.plan.record_layout import (
    ANCHOR,
    CAPACITY,
    END,
    FIRST_PROPOSED,
    FIRST_ROW,
    LENGTH,
    NUM_PROPOSED,
    NUM_ROWS,
    OWN_SLOT,
    POSITION,
    RECORD,
    SLOT,
    TOKEN,
)


class DrafterSemantics:
    """The drafter's buffers and semantics. memory: all other buffers."""

    def __init__(self, memory: LayerBuffers, weights: DrafterWeights, num_slots: int) -> None:
        self.memory, self.weights, self.spec = memory, weights, weights.spec
        plan, like, nan = memory.plan, memory.hidden_RD, float("nan")
        R, attention = plan.rows, weights.spec.layers[0].attention
        self.num_heads = len(weights.spec.layers) * attention.num_kv_heads
        self.blocks_RF = torch.full((R, RECORD), -1)
        self.blocks_RF[:, [FIRST_ROW, NUM_ROWS]] = 0
        self.best_RT2 = torch.full((R, plan.buffer_named["drafter.best"].num_cells, 2), nan)
        self.context_RD = torch.full_like(memory.scaled_RD, nan)
        self.squares_RB = torch.full_like(memory.squares_RB, nan)
        columns = plan.buffer_named["context.kv"].num_cells // self.num_heads
        self.kv_RGC = like.new_full((R, self.num_heads, columns), nan)
        # Keys and values of all layers' heads, in layer order.
        shape = (self.num_heads, num_slots, ring_length(None, plan.max_context))
        self.keys_GSTH = like.new_full((*shape, attention.qk_head_dim), nan)
        self.values_GSTH = like.new_full((*shape, attention.v_head_dim), nan)

    def caches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Per layer, [slots, positions, G, H]."""
        G = self.spec.layers[0].attention.num_kv_heads
        parts = zip(self.keys_GSTH.split(G), self.values_GSTH.split(G), strict=True)
        return [(keys.permute(1, 2, 0, 3), values.permute(1, 2, 0, 3)) for keys, values in parts]

    def semantics(self, shared: Mapping[str, ItemSemantics]) -> dict[str, ItemSemantics]:
        """By op, for `interpret`: shared with the target's layers, and its own."""
        own = {
            "block": self._block,
            "pick": self._pick,
            "fuse": self._fuse,
            "context": self._context,
            "append": self._append,
        }
        return {op: self._unless_skipped(body) for op, body in shared.items()} | own

    def _unless_skipped(self, body: ItemSemantics) -> ItemSemantics:
        """Does nothing for a block-only phase in a step without blocks."""

        def run(phase: Phase, index: tuple[int, ...], step: int) -> Steps:
            if not is_drafting(phase) or (self.blocks_RF[:, TOKEN] >= 0).any():
                yield from body(phase, index, step) or ()

        return run

    def num_rows(self, sequence: int) -> int:
        """Rows of a sequence's block, limited to proposals that could be committed."""
        capacity, length, end = self.memory.sequences_RF[sequence, [CAPACITY, LENGTH, END]].tolist()
        num_drafts = min(capacity, end - length) - 1
        return num_drafts + self.spec.first_slot if num_drafts > 0 else 0

    def _block(self, phase: Phase, index: tuple[int, ...], step: int) -> Steps:
        (row,) = index
        memory = self.memory
        num_rows = [self.num_rows(sequence) for sequence in range(memory.plan.rows)]
        first = [sum(num_rows[:sequence]) for sequence in range(memory.plan.rows)]
        record = [-1, 0, 0, 0, first[row], num_rows[row]]
        for sequence, number in enumerate(row - start for start in first):
            if 0 <= number < num_rows[sequence]:
                anchor, slot, length = memory.sequences_RF[sequence, [ANCHOR, OWN_SLOT, LENGTH]].tolist()
                token = self.spec.mask_token_id if number else anchor
                record[:FIRST_ROW] = [token, slot, length - 1 + number, length - 1]
        yield
        self.blocks_RF[row, : len(record)] = torch.tensor(record)
        if record[TOKEN] >= 0:
            own_D = self.weights.mask_embedding_D if record[TOKEN] == self.spec.mask_token_id else None
            embedding_D = memory.weights.embedding_VD[record[TOKEN]] if own_D is None else own_D
            memory.write_hidden(phase, row, slice(None), embedding_D)

    def _pick(self, phase: Phase, index: tuple[int, ...], step: int) -> Steps:
        (sequence,) = index
        first, num_rows = self.blocks_RF[sequence, [FIRST_ROW, NUM_ROWS]].tolist()
        best_XT2 = self.best_RT2[first + self.spec.first_slot : first + num_rows].clone()
        yield
        proposals = []
        for best_T2 in best_XT2:
            if best_T2[:, 0].isnan().any():
                break
            proposals.append(int(best_T2[int(best_T2[:, 0].argmax()), 1]))
        proposals_R = self.memory.proposals_RR[sequence]
        proposals_R[NUM_PROPOSED] = len(proposals)
        proposals_R[FIRST_PROPOSED : FIRST_PROPOSED + len(proposals)] = torch.tensor(proposals)

    def _fuse(self, phase: Phase, index: tuple[int, ...], step: int) -> Steps:
        D, features, norm_D = self.memory.spec.hidden_size, self.memory.features, self.weights.hidden_norm_D
        columns = self.memory.columns(phase, index, D)
        features_RC = torch.cat([features[f"features.{tap}"][:, :D] for tap in range(len(features))], dim=-1)
        yield
        out = features_RC @ self.weights.fc_DC[columns].T
        self.memory.write_for_norm(self.context_RD, self.squares_RB, slice(None), columns, out, norm_D)

    def _context(self, phase: Phase, index: tuple[int, ...], step: int) -> Steps:
        head, tile = index
        a = self.spec.layers[0].attention
        layer, group = divmod(head, a.num_kv_heads)
        size = a.qk_head_dim
        keys = (a.num_heads + group) * size
        rows = torch.cat([torch.arange(keys, keys + size), torch.arange(keys, keys + size) + a.num_kv_heads * size])
        chosen = rows[self.memory.columns(phase, index, len(rows))]
        D = self.memory.spec.hidden_size
        x_RD = self.context_RD[:, :D].clone()
        rms_R1 = torch.rsqrt(self.squares_RB.sum(-1, keepdim=True) / D + self.spec.rms_norm_eps)
        yield
        qkv_OD = plain_matrix(self.weights.layers[layer].attention.qkv_OD, x_RD.dtype)
        first = tile * phase.tile
        self.kv_RGC[:, head, first : first + len(chosen)] = x_RD @ qkv_OD[chosen].T * rms_R1

    def _append(self, phase: Phase, index: tuple[int, ...], step: int) -> Steps:
        sequence, head = index
        a = self.spec.layers[0].attention
        layer, group = divmod(head, a.num_kv_heads)
        records_RF = self.memory.rows_RF
        first, num_rows = records_RF[sequence, [FIRST_ROW, NUM_ROWS]].tolist()
        if not num_rows:
            return
        rows = list(range(first, first + num_rows))
        slot, positions = int(records_RF[first, SLOT]), records_RF[rows, POSITION]
        k_XH, v_XH = self.kv_RGC[rows, head, : 2 * a.qk_head_dim].split(a.qk_head_dim, dim=-1)
        norm_H = self.weights.layers[layer].attention.k_norm_H
        assert norm_H is not None
        cos, sin = (table[positions] for table in self.memory.tables[self.spec.layers[layer].attention])
        yield
        keys, values = self.memory.caches[self.memory.spec.num_layers + layer]
        normed_X1H = rms_norm(k_XH[:, None], norm_H, self.spec.rms_norm_eps)
        keys[slot, positions, group] = rotate(normed_X1H, cos, sin)[:, 0]
        values[slot, positions, group] = v_XH * a.value_scale
