"""The reference backend: a step in plain PyTorch, on any device. The oracle for faster backends.

Row invariance. BLAS libraries choose their reduction order by the number of rows, so every step is cut into groups of
exactly `GROUP` rows, the last one padded with idle rows: at a fixed number a row's bits depend neither on its place nor
on its neighbours. Experts are a batched product a (row, choice) pair, with fixed shapes too. Attention walks keys in
chunks of `KEY_CHUNK` absolute positions with a running softmax; a chunk that a row does not see changes none of its
bits. Rows of a prompt chunk go through in ascending order, so that a group attends to what earlier groups wrote.

Trees. Siblings share a position, so a tree's keys and values cannot lie in the buffers before it is known which of them
stands. They are kept beside them, one place a row of the step; attention gathers, for every position that a row sees,
either the committed buffer or the ancestor at that position, and from there on the arithmetic is that of a chain: a
tree row's bits are those of a plain row after the same tokens. `commit` copies the path that stands.

Matrices in FP8 are dequantized once, when the backend is made, and held in the engine's dtype.

Left out: speed. Packed experts are unpacked for every group.

Legend: R rows (always GROUP), D hidden, N heads, G key/value heads, H head dim, C key chunk, E experts, K choices a
row, I expert intermediate, V vocabulary, L buffer length.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from speedstack.dflash.model import DFlashDraftModel
from speedstack.dflash.tree import Draft
from speedstack.runtime.backends.base import DraftRequest, Rounds, Rows
from speedstack.runtime.backends.torch_drafter import ModuleDrafter
from speedstack.runtime.model.kv_ring import ring_length
from speedstack.runtime.model.moe import mixture
from speedstack.runtime.model.rope import rotary_tables, rotate
from speedstack.runtime.model.spec import AttentionSpec, MoeSpec
from speedstack.runtime.model.weights import AttentionWeights, DenseWeights, ModelWeights, plain_matrix
from speedstack.runtime.rounds.draft_length import IN_PYTORCH

logger = logging.getLogger("speedstack.runtime")

GROUP = 8
KEY_CHUNK = 128


def rms_norm(x_RD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x_RD.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight_D * wide.to(x_RD.dtype)


class _LayerCache:
    """Keys and values of one layer for every slot: a ring over absolute positions."""

    def __init__(self, spec: AttentionSpec, num_slots: int, max_length: int, like: torch.Tensor) -> None:
        self.length = ring_length(spec.window, max_length)
        shape = (num_slots, self.length, spec.num_kv_heads)
        self.k_SLGH = like.new_zeros((*shape, spec.qk_head_dim))
        self.v_SLGH = like.new_zeros((*shape, spec.v_head_dim))

    def nbytes(self) -> int:
        return self.k_SLGH.nbytes + self.v_SLGH.nbytes


@dataclass
class _TreeStep:
    """Rows of a step that are trees, with what each would write: one place a row, and one more for idle rows.

    `ancestor_RP[r, p]` is the row that lies at position `base_R[r] + p` on row r's path, itself included; -1 for none.
    """

    rows: Rows
    base_R: torch.Tensor
    ancestor_RP: torch.Tensor
    keys_LRGH: list[torch.Tensor]
    values_LRGH: list[torch.Tensor]
    features_RC: torch.Tensor | None


def tree_paths(rows: Rows) -> tuple[list[int], list[list[int]]]:
    """Each row's first uncommitted position, and the rows on its path from there, itself last."""
    assert rows.parents is not None
    bases: list[int] = []
    paths: list[list[int]] = []
    for row, (parent, slot, position) in enumerate(zip(rows.parents, rows.slots, rows.positions, strict=True)):
        assert parent < row, "parents come before children"
        if parent < 0:
            bases.append(position)
            paths.append([row])
            continue
        assert (slot, position) == (rows.slots[parent], rows.positions[parent] + 1), "a row follows its parent"
        bases.append(bases[parent])
        paths.append([*paths[parent], row])
    return bases, paths


class ReferenceBackend:
    """A step in PyTorch; see the module. `drafter`: in the same dtype and on the same device as the weights."""

    name = "reference"
    prepare_seconds = 0.0
    no_trees_because: str | None = None
    rounds: Rounds | None = None
    rows_a_step: int | None = None
    has_measured_cost = False
    round_cost = IN_PYTORCH

    def __init__(
        self, weights: ModelWeights, drafter: DFlashDraftModel | None, num_slots: int, max_length: int
    ) -> None:
        if weights.num_fp8():
            logger.warning("backend reference: %d matrices in FP8 are held dequantized", weights.num_fp8())
        self.weights, self.num_slots = weights.widened().plain(), num_slots
        self.device, self.dtype = weights.embedding_VD.device, weights.dtype
        spec = weights.spec
        self.max_length = max_length
        # One slot more than sequences: idle rows of a padded group write there.
        self.caches = [
            _LayerCache(layer.attention, num_slots + 1, max_length, self.weights.embedding_VD) for layer in spec.layers
        ]
        tables = {a: rotary_tables(a, max_length, self.device) for a in {layer.attention for layer in spec.layers}}
        self.rotary = [tables[layer.attention] for layer in spec.layers]
        self._tree: _TreeStep | None = None
        self.set_drafter(drafter)

    def set_drafter(self, drafter: DFlashDraftModel | None) -> None:
        w = self.weights
        self.drafter = None
        if drafter is not None:
            self.drafter = ModuleDrafter(drafter, w.embedding_VD, w.lm_head_VD, self.num_slots, self.max_length)

    def weight_bytes(self) -> dict[str, int]:
        drafter = {"drafter": self.drafter.weight_bytes()} if self.drafter is not None else {}
        return self.weights.nbytes_by_part() | drafter

    def cache_bytes(self) -> int:
        drafter = self.drafter.cache_bytes() if self.drafter is not None else 0
        return sum(cache.nbytes() for cache in self.caches) + drafter

    @torch.no_grad()
    def step(self, rows: Rows, logit_rows: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
        wanted = {row: index for index, row in enumerate(logit_rows)}
        self._tree = self._plant(rows) if rows.parents is not None else None
        logits_WV = torch.empty(len(logit_rows), self.weights.spec.vocab_size, device=self.device)
        for start in range(0, len(rows.tokens), GROUP):
            stop = min(start + GROUP, len(rows.tokens))
            h_RD = self._group(rows, start, stop)
            here = [row for row in range(start, stop) if row in wanted]
            if here:
                final_RD = rms_norm(h_RD, self.weights.norm_D, self.weights.spec.rms_norm_eps)
                logits_RV = (final_RD @ plain_matrix(self.weights.lm_head_VD, self.dtype).T).float()
                for row in here:
                    logits_WV[wanted[row]] = logits_RV[row - start]
        # numpy's argmax takes the first of equals, torch's makes no promise; NaN rows are named, not chosen from.
        best = [-1 if bool(torch.isnan(row_V).any()) else int(row_V.numpy(force=True).argmax()) for row_V in logits_WV]
        return logits_WV, best

    def _group(self, rows: Rows, start: int, stop: int) -> torch.Tensor:
        idle = GROUP - (stop - start)
        tokens_R = torch.tensor([*rows.tokens[start:stop], *([0] * idle)], device=self.device)
        slots_R = torch.tensor([*rows.slots[start:stop], *([self.num_slots] * idle)], device=self.device)
        positions_R = torch.tensor([*rows.positions[start:stop], *([0] * idle)], device=self.device)
        weights, eps = self.weights, self.weights.spec.rms_norm_eps
        h_RD = weights.embedding_VD[tokens_R]
        tree_rows_R = None
        if self._tree is not None:
            num_rows = len(rows.tokens)
            tree_rows_R = torch.tensor([*range(start, stop), *([num_rows] * idle)], device=self.device)
        taps: dict[int, torch.Tensor] = {}
        for index, (layer, spec) in enumerate(zip(weights.layers, weights.spec.layers, strict=True)):
            x_RD = rms_norm(h_RD, layer.attention.norm_D, eps)
            h_RD = h_RD + self._attention(index, x_RD, layer.attention, slots_R, positions_R, tree_rows_R)
            x_RD = rms_norm(h_RD, layer.mlp.norm_D, eps)
            if isinstance(layer.mlp, DenseWeights):
                gate_RF, up_RF = (x_RD @ plain_matrix(layer.mlp.gate_up_FD, self.dtype).T).chunk(2, dim=-1)
                h_RD = h_RD + (F.silu(gate_RF) * up_RF) @ plain_matrix(layer.mlp.down_DF, self.dtype).T
            else:
                assert isinstance(spec.mlp, MoeSpec)
                h_RD = h_RD + mixture(x_RD, layer.mlp, spec.mlp)
            taps[index] = h_RD
        if self.drafter is not None:
            ids = self.drafter.model.config.target_layer_ids
            features_RC = torch.cat([taps[i] for i in ids], dim=-1)[: stop - start]
            if self._tree is None:
                self.drafter.write(features_RC, rows.slots[start:stop], rows.positions[start:stop])
            else:
                assert self._tree.features_RC is not None
                self._tree.features_RC[start:stop] = features_RC
        return h_RD

    def _plant(self, rows: Rows) -> _TreeStep:
        bases, paths = tree_paths(rows)
        num_rows, depth = len(rows.tokens), max(len(path) for path in paths)
        # The last place is every idle row's.
        bases, paths = [*bases, 0], [*paths, [num_rows]]
        padded = [path + [-1] * (depth - len(path)) for path in paths]
        like, width = self.weights.embedding_VD, 0
        if self.drafter is not None:
            width = self.drafter.model.config.num_taps * self.weights.spec.hidden_size
        specs = [layer.attention for layer in self.weights.spec.layers]
        return _TreeStep(
            rows=rows,
            base_R=torch.tensor(bases, device=self.device),
            ancestor_RP=torch.tensor(padded, device=self.device),
            keys_LRGH=[like.new_zeros(num_rows + 1, a.num_kv_heads, a.qk_head_dim) for a in specs],
            values_LRGH=[like.new_zeros(num_rows + 1, a.num_kv_heads, a.v_head_dim) for a in specs],
            features_RC=like.new_zeros(num_rows, width) if width else None,
        )

    @torch.no_grad()
    def commit(self, rows: Sequence[int]) -> None:
        tree, self._tree = self._tree, None
        assert tree is not None, "the last step had no trees"
        slots, positions = [tree.rows.slots[row] for row in rows], [tree.rows.positions[row] for row in rows]
        rows_A, slots_A, positions_A = (torch.tensor(list(x), device=self.device) for x in (rows, slots, positions))
        for cache, keys_RGH, values_RGH in zip(self.caches, tree.keys_LRGH, tree.values_LRGH, strict=True):
            cache.k_SLGH[slots_A, positions_A % cache.length] = keys_RGH[rows_A]
            cache.v_SLGH[slots_A, positions_A % cache.length] = values_RGH[rows_A]
        if self.drafter is not None and tree.features_RC is not None:
            self.drafter.write(tree.features_RC[rows_A], slots, positions)

    def _attention(
        self,
        layer: int,
        x_RD: torch.Tensor,
        weights: AttentionWeights,
        slots_R: torch.Tensor,
        positions_R: torch.Tensor,
        tree_rows_R: torch.Tensor | None,
    ) -> torch.Tensor:
        spec = self.weights.spec.layers[layer].attention
        heads, kv_heads, eps = spec.num_heads, spec.num_kv_heads, self.weights.spec.rms_norm_eps
        sizes = [heads * spec.qk_head_dim, kv_heads * spec.qk_head_dim, kv_heads * spec.v_head_dim]
        qkv_RO = x_RD @ plain_matrix(weights.qkv_OD, self.dtype).T
        if weights.qkv_bias_O is not None:
            qkv_RO = qkv_RO + weights.qkv_bias_O
        q, k, v = qkv_RO.split(sizes, dim=-1)
        q_RNH, k_RGH = q.unflatten(-1, (heads, -1)), k.unflatten(-1, (kv_heads, -1))
        v_RGH = v.unflatten(-1, (kv_heads, -1)) * spec.value_scale
        if weights.q_norm_H is not None and weights.k_norm_H is not None:
            q_RNH, k_RGH = rms_norm(q_RNH, weights.q_norm_H, eps), rms_norm(k_RGH, weights.k_norm_H, eps)
        cos_RH, sin_RH = (table[positions_R] for table in self.rotary[layer])
        q_RNH, k_RGH = rotate(q_RNH, cos_RH, sin_RH), rotate(k_RGH, cos_RH, sin_RH)
        cache = self.caches[layer]
        if self._tree is None or tree_rows_R is None:
            cache.k_SLGH[slots_R, positions_R % cache.length] = k_RGH
            cache.v_SLGH[slots_R, positions_R % cache.length] = v_RGH
            keys_values = _CommittedKeys(cache, slots_R)
        else:
            self._tree.keys_LRGH[layer][tree_rows_R] = k_RGH
            self._tree.values_LRGH[layer][tree_rows_R] = v_RGH
            keys_values = _TreeKeys(cache, slots_R, self._tree, layer, tree_rows_R)
        out_RNH = _attend(q_RNH, keys_values, spec, weights.sinks_N, positions_R)
        out_RD = out_RNH.flatten(1) @ plain_matrix(weights.output_DO, self.dtype).T
        return out_RD if weights.output_bias_D is None else out_RD + weights.output_bias_D

    def draft(self, requests: Sequence[DraftRequest], num_drafts: int, tree_budget: int | None = None) -> list[Draft]:
        assert self.drafter is not None
        return self.drafter.draft(requests, num_drafts, tree_budget)


class _CommittedKeys:
    """What rows find at absolute positions: their sequence's buffers."""

    def __init__(self, cache: _LayerCache, slots_R: torch.Tensor) -> None:
        self._length = cache.length
        self._k_RLGH, self._v_RLGH = cache.k_SLGH[slots_R], cache.v_SLGH[slots_R]

    def at(self, positions_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [R, C, G, H]."""
        index_C = positions_C % self._length
        return self._k_RLGH[:, index_C], self._v_RLGH[:, index_C]


class _TreeKeys(_CommittedKeys):
    """The same for tree rows: from their tree's first position on, what their ancestors would write."""

    def __init__(
        self, cache: _LayerCache, slots_R: torch.Tensor, tree: _TreeStep, layer: int, tree_rows_R: torch.Tensor
    ) -> None:
        super().__init__(cache, slots_R)
        self._keys_TGH, self._values_TGH = tree.keys_LRGH[layer], tree.values_LRGH[layer]
        self._base_R, self._ancestor_RP = tree.base_R[tree_rows_R], tree.ancestor_RP[tree_rows_R]

    def at(self, positions_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k_RCGH, v_RCGH = super().at(positions_C)
        depth_RC = positions_C - self._base_R[:, None]
        last = self._ancestor_RP.shape[1] - 1
        row_RC = torch.where(
            (depth_RC >= 0) & (depth_RC <= last), self._ancestor_RP.gather(1, depth_RC.clamp(0, last)), -1
        )
        is_tree = (row_RC >= 0)[:, :, None, None]
        row_RC = row_RC.clamp(min=0)
        return (
            torch.where(is_tree, self._keys_TGH[row_RC], k_RCGH),
            torch.where(is_tree, self._values_TGH[row_RC], v_RCGH),
        )


def _attend(
    q_RNH: torch.Tensor,
    keys_values: _CommittedKeys,
    spec: AttentionSpec,
    sinks_N: torch.Tensor | None,
    positions_R: torch.Tensor,
) -> torch.Tensor:
    """Attention with a running softmax in float32 over chunks of absolute positions."""
    kv_heads, group = spec.num_kv_heads, spec.num_heads // spec.num_kv_heads
    q_RGMH = q_RNH.float().unflatten(1, (kv_heads, group)) * spec.softmax_scale
    last_R = positions_R
    first_R = torch.zeros_like(last_R) if spec.window is None else (last_R - spec.window + 1).clamp(min=0)
    shape = (*q_RGMH.shape[:3], 1)
    peak = q_RGMH.new_full(shape, float("-inf"))
    total = q_RGMH.new_zeros(shape)
    if sinks_N is not None:
        peak = sinks_N.float().view(1, kv_heads, group, 1).expand(shape)
        total = torch.ones_like(peak)
    out_RGMH = q_RGMH.new_zeros((*q_RGMH.shape[:3], spec.v_head_dim))
    offsets_C = torch.arange(KEY_CHUNK, device=q_RNH.device)
    for chunk in range(int(first_R.min()) // KEY_CHUNK, int(last_R.max()) // KEY_CHUNK + 1):
        keys_C = chunk * KEY_CHUNK + offsets_C
        k_RCGH, v_RCGH = (found.float() for found in keys_values.at(keys_C))
        visible_RC = (keys_C >= first_R[:, None]) & (keys_C <= last_R[:, None])
        # What lies beyond the row's position may be anything: 0 * inf would leak it into the sum.
        v_RCGH = v_RCGH.masked_fill(~visible_RC[:, :, None, None], 0.0)
        scores = torch.matmul(q_RGMH, k_RCGH.permute(0, 2, 3, 1)).masked_fill(~visible_RC[:, None, None], float("-inf"))
        new_peak = torch.maximum(peak, scores.amax(-1, keepdim=True))
        shift = torch.where(new_peak.isinf(), torch.zeros_like(new_peak), new_peak)
        rescale, probs = torch.exp(peak - shift), torch.exp(scores - shift)
        total = total * rescale + probs.sum(-1, keepdim=True)
        out_RGMH = out_RGMH * rescale + torch.matmul(probs, v_RCGH.transpose(1, 2))
        peak = new_peak
    return (out_RGMH / total).flatten(1, 2).to(q_RNH.dtype)
