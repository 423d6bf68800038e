"""The reference backend: a step in plain PyTorch, on any device; the oracle for faster backends.

Row invariance: BLAS chooses its reduction order by the number of rows, so a step is cut into groups of exactly `GROUP`
rows, padded with idle ones. Experts are a batched product per (row, choice). Attention walks chunks of `KEY_CHUNK`
absolute positions with a running softmax; invisible chunks change no bit. Prompt rows go in ascending order, so a group
sees what earlier groups wrote. FP8 matrices are dequantized once to the engine's dtype.

Left out: speed. Packed experts are unpacked for every group.

Legend: R rows (always GROUP), D hidden, N heads, G key/value heads, H head dim, C key chunk, E experts, K choices a
row, I expert intermediate, V vocabulary, L buffer length.
"""

import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from speedstack.dflash.model import DFlashDraftModel
from speedstack.dflash.propose import Draft
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


class ReferenceBackend:
    """A step in PyTorch. `drafter`: in the weights' dtype, on their device."""

    name = "reference"
    prepare_seconds = 0.0
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
        # One extra slot, where the idle rows of a padded group write.
        self.caches = [
            _LayerCache(layer.attention, num_slots + 1, max_length, self.weights.embedding_VD) for layer in spec.layers
        ]
        tables = {a: rotary_tables(a, max_length, self.device) for a in {layer.attention for layer in spec.layers}}
        self.rotary = [tables[layer.attention] for layer in spec.layers]
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
        # numpy's argmax takes the first of ties, torch's makes no promise; NaN rows get -1.
        best = [-1 if bool(torch.isnan(row_V).any()) else int(row_V.numpy(force=True).argmax()) for row_V in logits_WV]
        return logits_WV, best

    def _group(self, rows: Rows, start: int, stop: int) -> torch.Tensor:
        idle = GROUP - (stop - start)
        tokens_R = torch.tensor([*rows.tokens[start:stop], *([0] * idle)], device=self.device)
        slots_R = torch.tensor([*rows.slots[start:stop], *([self.num_slots] * idle)], device=self.device)
        positions_R = torch.tensor([*rows.positions[start:stop], *([0] * idle)], device=self.device)
        weights, eps = self.weights, self.weights.spec.rms_norm_eps
        h_RD = weights.embedding_VD[tokens_R]
        taps: dict[int, torch.Tensor] = {}
        for index, (layer, spec) in enumerate(zip(weights.layers, weights.spec.layers, strict=True)):
            x_RD = rms_norm(h_RD, layer.attention.norm_D, eps)
            h_RD = h_RD + self._attention(index, x_RD, layer.attention, slots_R, positions_R)
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
            self.drafter.write(features_RC, rows.slots[start:stop], rows.positions[start:stop])
        return h_RD

    def _attention(
        self,
        layer: int,
        x_RD: torch.Tensor,
        weights: AttentionWeights,
        slots_R: torch.Tensor,
        positions_R: torch.Tensor,
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
        cache.k_SLGH[slots_R, positions_R % cache.length] = k_RGH
        cache.v_SLGH[slots_R, positions_R % cache.length] = v_RGH
        k_RLGH, v_RLGH = cache.k_SLGH[slots_R], cache.v_SLGH[slots_R]
        out_RNH = _attend(q_RNH, k_RLGH, v_RLGH, spec, weights.sinks_N, positions_R)
        out_RD = out_RNH.flatten(1) @ plain_matrix(weights.output_DO, self.dtype).T
        return out_RD if weights.output_bias_D is None else out_RD + weights.output_bias_D

    def draft(self, requests: Sequence[DraftRequest], num_drafts: int) -> list[Draft]:
        assert self.drafter is not None
        return self.drafter.draft(requests, num_drafts)


def _attend(
    q_RNH: torch.Tensor,
    k_RLGH: torch.Tensor,
    v_RLGH: torch.Tensor,
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
        places_C = keys_C % k_RLGH.shape[1]
        k_RCGH, v_RCGH = k_RLGH[:, places_C].float(), v_RLGH[:, places_C].float()
        visible_RC = (keys_C >= first_R[:, None]) & (keys_C <= last_R[:, None])
        # Values past the row's position may be anything: 0 * inf would leak into the sum.
        v_RCGH = v_RCGH.masked_fill(~visible_RC[:, :, None, None], 0.0)
        scores = torch.matmul(q_RGMH, k_RCGH.permute(0, 2, 3, 1)).masked_fill(~visible_RC[:, None, None], float("-inf"))
        new_peak = torch.maximum(peak, scores.amax(-1, keepdim=True))
        shift = torch.where(new_peak.isinf(), torch.zeros_like(new_peak), new_peak)
        rescale, probs = torch.exp(peak - shift), torch.exp(scores - shift)
        total = total * rescale + probs.sum(-1, keepdim=True)
        out_RGMH = out_RGMH * rescale + torch.matmul(probs, v_RCGH.transpose(1, 2))
        peak = new_peak
    return (out_RGMH / total).flatten(1, 2).to(q_RNH.dtype)
