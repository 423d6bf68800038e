"""Arguments of the drafter's own device functions; `layers.py` has those of its layers.

Its qkv projections are sorted by head like the target's and stored layer after layer, so that one phase reads all
layers' key and value rows from one tensor.

Legend: L layers, G key/value heads, O rows of a group, D hidden, H head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from speedstack.runtime.backends.drafter_weights import DrafterWeights
from speedstack.runtime.backends.gpu.bindings.multi_step import Bound
from speedstack.runtime.backends.gpu.bindings.step import StepBinder
from speedstack.runtime.model.qkv_layout import grouped_qkv
from speedstack.runtime.plan.ir import Phase
from speedstack.runtime.plan.tiling import power_of_two

TILES_AT_A_TIME = 128  # LM-head tiles compared at a time; does not affect results


class DrafterBinder:
    """Binds a drafter's phases."""

    def __init__(self, binder: StepBinder, weights: DrafterWeights) -> None:
        self.binder, self.weights, self.spec, self.layers = binder, weights, weights.spec, weights.layers
        plan, attention = binder.plan, weights.spec.layers[0].attention
        qkv = plan.phases[plan.phase_named["D00.qkv"]]
        self.columns = qkv.axes[1].size * qkv.tile
        matrices = []
        for layer in weights.layers:
            assert isinstance(layer.attention.qkv_OD, torch.Tensor), "drafters are not in FP8"
            matrices.append(grouped_qkv(layer.attention.qkv_OD, attention, self.columns))
        self.qkv_LOD = torch.stack(matrices)
        norms = [layer.attention.k_norm_H for layer in weights.layers]
        self.k_norm_LH = torch.stack([norm for norm in norms if norm is not None])
        self.bound: dict[str, Callable[[Phase], Bound]] = {
            "block": self.block,
            "pick": self.pick,
            "fuse": self.fuse,
            "context": self.context,
            "append": self.append,
        }

    def grouped(self, layer: int) -> torch.Tensor:
        """A layer's qkv projection, sorted by head."""
        return self.qkv_LOD[layer]

    def block(self, phase: Phase) -> Bound:
        binder, mask_D = self.binder, self.weights.mask_embedding_D
        sequences, blocks, hidden = binder.buffer("sequences", "blocks", "hidden")
        embedding = binder.weights.embedding_VD
        result = (embedding, hidden, *binder.for_norm(phase), binder.optional(mask_D))
        return (sequences, blocks, *result), {
            "MASK": self.spec.mask_token_id,
            "HAS_MASK": mask_D is not None,
            "FIRST_SLOT": self.spec.first_slot,
        }

    def pick(self, phase: Phase) -> Bound:
        tiles = self.binder.plan.buffer_named["drafter.best"].num_cells
        constants = {"TILES": tiles, "TILES_AT_A_TIME": TILES_AT_A_TIME, "FIRST_SLOT": self.spec.first_slot}
        return self.binder.buffer("blocks", "drafter.best", "proposals"), constants

    def fuse(self, phase: Phase) -> Bound:
        features = self.binder.memory.features
        pointers = (features, self.weights.fc_DC, self.weights.hidden_norm_D)
        rows, *result = self.binder.buffer("rows", "context", "context.squares")
        return (rows, *pointers, *result), {"TAPS": features.shape[0], "TAP_STEP": features[0].numel()}

    def context(self, phase: Phase) -> Bound:
        a = self.spec.layers[0].attention
        rows, context, squares, raw = self.binder.buffer("rows", "context", "context.squares", "context.kv")
        return (rows, context, squares, self.qkv_LOD, raw), {
            "FIRST": a.num_heads // a.num_kv_heads * a.qk_head_dim,
            "COLUMNS": self.columns,
            "WIDTH": a.qk_head_dim + a.v_head_dim,
        }

    def append(self, phase: Phase) -> Bound:
        binder, a = self.binder, self.spec.layers[0].attention
        cos_TH, sin_TH = binder.tables(replace(a, window=None, ahead=0))  # layers differ in these two fields only
        rows, raw = binder.buffer("rows", "context.kv")
        return (rows, raw, self.k_norm_LH, cos_TH, sin_TH, binder.memory.contexts), {
            "value_scale": float(a.value_scale),
            "num_slots": binder.memory.num_slots,
            "G": a.num_kv_heads,
            "H": a.qk_head_dim,
            "V": a.v_head_dim,
            "HALF": cos_TH.shape[1],
            "COLUMNS": binder.plan.buffer_named["context.kv"].num_cells // (len(self.layers) * a.num_kv_heads),
            "RING": binder.memory.contexts.shape[3],
            "HP": max(16, power_of_two(a.qk_head_dim)),
            "VP": max(16, power_of_two(a.v_head_dim)),
        }
