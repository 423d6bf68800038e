"""Every item of a plan in PyTorch: the meaning of its operations and the layout of its buffers.

Slow, in the weights' dtype (float32 or bfloat16), cut as the plan cuts: an item accesses the declared regions, with a
`yield` between reads and writes so that others can run. Kernels are compared with it buffer by buffer, and it with the
reference backend.

Buffers, with R rows (the plan's capacity), `n` tiles of `t` columns:

    rows, sequences, proposals, chosen, outcome, history, logits, best, peaks, bins: see `multi_step.py`
    router, routes, act of a mixture: see `moe.py`;  blocks, context, drafter.*: see `drafter.py`
    hidden    [R, D];  scaled  [R, D]  times the weight of the next norm;  squares  float32 [R, D / 16] (D in whole
    blocks of 16, as F in act);  features.*  as scaled, unscaled
    qkv.*     [R, G, n * t]       a key/value head's group: its query heads, its key head, its value head, padding
    partial.* float32 [R, N, S, v + 2]   a split's unnormalized sum of values, largest score, sum of exponentials
    attended.* [R, N, v]
    LNN.cache (k [slots, positions, G, qk], v [slots, positions, G, v])   rings over absolute positions
    act.*     [R, F] of a dense layer
"""

from typing import Any

import torch
import torch.nn.functional as F

from speedstack.runtime.backends.base import Rows
from speedstack.runtime.backends.drafter_weights import DrafterWeights
from speedstack.runtime.backends.gpu.buffers import step_inbox
from speedstack.runtime.backends.gpu.semantics.drafter import DrafterSemantics
from speedstack.runtime.backends.gpu.semantics.memory import LayerBuffers
from speedstack.runtime.backends.gpu.semantics.moe import MoeSemantics
from speedstack.runtime.backends.gpu.semantics.multi_step import ItemSemantics, Steps
from speedstack.runtime.backends.reference import rms_norm
from speedstack.runtime.model.kv_ring import ring_length
from speedstack.runtime.model.rope import rotary_tables, rotate
from speedstack.runtime.model.spec import AttentionSpec
from speedstack.runtime.model.weights import AttentionWeights, DenseWeights, Linear, ModelWeights, plain_matrix
from speedstack.runtime.plan.ir import Phase, Plan
from speedstack.runtime.plan.ops.drafter import is_drafting
from speedstack.runtime.plan.record_layout import FIRST_ROW, NUM_ROWS, POSITION, SLOT, TOKEN


class StepSemantics(LayerBuffers):
    """A plan's buffers for a model's weights, and the semantics on them.

    A drafter's layers follow the target's, as in `Phase.layer`.
    """

    def __init__(
        self,
        plan: Plan,
        weights: ModelWeights,
        num_slots: int | None = None,
        drafter: DrafterWeights | None = None,
    ) -> None:
        """num_slots: sequences with a context; None is as many as rows."""
        super().__init__(plan, weights, num_slots)
        like, R = weights.embedding_VD, plan.rows
        self.drafter = None if drafter is None else DrafterSemantics(self, drafter, num_slots or R)
        if drafter is not None:
            self.layer_specs += drafter.spec.layers
            self.layer_weights += drafter.layers
        self.tables |= {
            a: rotary_tables(a, plan.max_context, like.device) for a in {x.attention for x in self.layer_specs}
        }
        for layer in self.spec.layers:
            a = layer.attention
            shape = (num_slots or R, ring_length(a.window, plan.max_context), a.num_kv_heads)
            self.caches.append(
                (
                    like.new_full((*shape, a.qk_head_dim), float("nan")),
                    like.new_full((*shape, a.v_head_dim), float("nan")),
                )
            )
        if self.drafter is not None:
            self.caches += self.drafter.caches()
        for phase in plan.phases:
            self._allocate(phase, like)
        self.mixture = MoeSemantics(self)

    def _allocate(self, phase: Phase, like: torch.Tensor) -> None:
        R, layer = self.plan.rows, None if phase.layer is None else self.layer_specs[phase.layer]
        if layer is None:
            return
        a, name = layer.attention, phase.writes[-1].buffer
        if name in self.shared:
            return
        nan = float("nan")
        if phase.op == "qkv":
            width = self.plan.buffer_named[name].num_cells // a.num_kv_heads
            self.shared[name] = like.new_full((R, a.num_kv_heads, width), nan)
        elif phase.op == "attention":
            self.shared[name] = torch.full((R, a.num_heads, phase.axes[2].size, a.v_head_dim + 2), nan)
        elif phase.op == "combine":
            self.shared[name] = like.new_full((R, a.num_heads, a.v_head_dim), nan)
        elif phase.op == "dense_gate_up":
            self.shared[name] = like.new_full((R, self.plan.buffer_named[name].num_cells), nan)

    def semantics(self) -> dict[str, ItemSemantics]:
        """By op, for `interpret`."""
        own: dict[str, ItemSemantics] = {
            "embed": self._embed,
            "qkv": self._qkv,
            "attention": self._attention,
            "combine": self._combine,
            "o_proj": self._o_proj,
            "dense_gate_up": self._dense_gate_up,
            "dense_down": self._dense_down,
            "lm_head": self._lm_head,
        }
        own |= self.multi_step_semantics() | self.mixture.semantics()
        return own if self.drafter is None else self.drafter.semantics(own)

    def set_rows(self, tokens: list[int], slots: list[int], positions: list[int]) -> None:
        """Names the next step's rows, as the host does."""
        self.set_inbox(step_inbox(Rows(tokens, slots, positions), self.plan.rows))

    def _records(self, phase: Phase) -> torch.Tensor:
        """Records of the rows that a phase computes, [R, RECORD]."""
        drafter = self._drafting(phase)
        return self.rows_RF if drafter is None else drafter.blocks_RF

    def _sequence(self, phase: Phase, number: int) -> list[int]:
        """Rows of the step's `number`th sequence."""
        first, num_rows = self._records(phase)[number, [FIRST_ROW, NUM_ROWS]].tolist()
        return list(range(first, first + num_rows))

    def _splits(self, phase: Phase, a: AttentionSpec, rows: list[int]) -> range:
        """Numbers of the splits that these rows of one sequence see."""
        records_RF = self._records(phase)
        first, last = int(records_RF[rows[0], POSITION]), int(records_RF[rows[-1], POSITION])
        start = 0 if a.window is None else max(0, first - a.window + 1)
        return range(start // self.plan.split_size, last // self.plan.split_size + 1)

    def eps(self, phase: Phase) -> float:
        drafter = self._drafting(phase)
        return self.spec.rms_norm_eps if drafter is None else drafter.spec.rms_norm_eps

    def norm_behind(self, phase: Phase) -> torch.Tensor:
        drafter, layer, is_attention = self._drafting(phase), phase.layer, phase.op == "o_proj"
        if drafter is None:
            return self.weights.norm_behind(is_attention, layer)
        return drafter.weights.norm_behind(is_attention, None if layer is None else layer - self.spec.num_layers)

    def _drafting(self, phase: Phase) -> DrafterSemantics | None:
        """The drafter if the phase computes block rows, else None."""
        return self.drafter if is_drafting(phase) else None

    def _embed(self, phase: Phase, index: tuple[int, ...], step: int) -> Steps:
        (row,) = index
        yield from self.allocate_row(row)
        token = int(self.rows_RF[row, TOKEN])
        yield
        if token >= 0:
            self.write_hidden(phase, row, slice(None), self.weights.embedding_VD[token])

    def _qkv(self, phase: Phase, index: tuple[int, ...], step: int) -> Steps:
        assert phase.layer is not None
        a, w = self.layer_specs[phase.layer].attention, self.layer_weights[phase.layer].attention
        group, rows = index[0], _group_rows(a, index[0])
        chosen = rows[self.columns(phase, index, len(rows))]
        x_RD, rms_R1 = self.norm(phase)
        yield
        out = x_RD @ plain_matrix(w.qkv_OD, x_RD.dtype)[chosen].T * rms_R1
        if w.qkv_bias_O is not None:
            out = out + w.qkv_bias_O[chosen]
        first = index[1] * phase.tile
        self.shared[phase.writes[0].buffer][:, group, first : first + len(chosen)] = out

    def _attention(self, phase: Phase, index: tuple[int, ...], step: int) -> Steps:
        assert phase.layer is not None
        number, group, split = index
        a, w = self.layer_specs[phase.layer].attention, self.layer_weights[phase.layer].attention
        rows, records_RF = self._sequence(phase, number), self._records(phase)
        splits = self._splits(phase, a, rows) if rows else range(0)
        if split >= len(splits):
            return
        low = splits[split] * self.plan.split_size
        high = low + self.plan.split_size
        slot = int(records_RF[rows[0], SLOT])
        q_XMH, k_XH, v_XV = self._heads(phase, a, w, rows, group)
        positions = [int(records_RF[row, POSITION]) for row in rows]
        yield
        k_SLGH, v_SLGV = self.caches[phase.layer]
        ring, heads = k_SLGH.shape[1], a.num_heads // a.num_kv_heads
        for number, position in enumerate(positions):
            if low <= position < high:
                k_SLGH[slot, position % ring, group] = k_XH[number]
                v_SLGV[slot, position % ring, group] = v_XV[number]
        for number, (row, position) in enumerate(zip(rows, positions, strict=True)):
            first = max(low, 0 if a.window is None else position - a.window + 1)
            last = min(position + a.ahead, positions[-1])
            keys = torch.arange(first, max(first, min(high, last + 1))) % ring
            partial = self.shared[phase.writes[1].buffer][row, group * heads : (group + 1) * heads, split]
            scores_MC = q_XMH[number].float() @ k_SLGH[slot, keys, group].float().T * a.softmax_scale
            peak_M1 = scores_MC.amax(-1, keepdim=True) if len(keys) else torch.full((heads, 1), float("-inf"))
            exp_MC = torch.exp(scores_MC - peak_M1)
            partial[:, : a.v_head_dim] = exp_MC @ v_SLGV[slot, keys, group].float()
            partial[:, a.v_head_dim :] = torch.cat([peak_M1, exp_MC.sum(-1, keepdim=True)], dim=-1)

    def _heads(
        self, phase: Phase, a: AttentionSpec, w: AttentionWeights, rows: list[int], group: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Normalized, rotated and scaled queries, key and value of some rows."""
        heads, eps = a.num_heads // a.num_kv_heads, self.eps(phase)
        sizes = [heads * a.qk_head_dim, a.qk_head_dim, a.v_head_dim]
        raw = self.shared[phase.reads[1].region.buffer][rows, group, : sum(sizes)]
        q, k, v = raw.split(sizes, dim=-1)
        q_XMH, k_X1H = q.unflatten(-1, (heads, -1)), k[:, None]
        if w.q_norm_H is not None and w.k_norm_H is not None:
            q_XMH, k_X1H = rms_norm(q_XMH, w.q_norm_H, eps), rms_norm(k_X1H, w.k_norm_H, eps)
        cos, sin = (table[self._records(phase)[rows, POSITION]] for table in self.tables[a])
        return rotate(q_XMH, cos, sin), rotate(k_X1H, cos, sin)[:, 0], v * a.value_scale

    def _combine(self, phase: Phase, index: tuple[int, ...], step: int) -> Steps:
        assert phase.layer is not None
        row, head = index
        a, w = self.layer_specs[phase.layer].attention, self.layer_weights[phase.layer].attention
        if self._records(phase)[row, TOKEN] < 0:
            return
        number = next(n for n in range(self.plan.rows) if row in self._sequence(phase, n))
        splits = self._splits(phase, a, self._sequence(phase, number))
        partial_SV = self.shared[phase.reads[1].region.buffer][row, head, : len(splits)].clone()
        yield
        values, peaks, sums = partial_SV[:, : a.v_head_dim], partial_SV[:, -2], partial_SV[:, -1]
        peak, total = peaks.max(), torch.zeros(())
        if w.sinks_N is not None:
            peak = torch.maximum(peak, w.sinks_N[head].float())
            total = torch.exp(w.sinks_N[head].float() - peak)
        out = torch.zeros(a.v_head_dim)
        for split in range(len(splits)):
            scale = torch.exp(peaks[split] - peak)
            out, total = out + values[split] * scale, total + sums[split] * scale
        self.shared[phase.writes[0].buffer][row, head] = (out / total).to(self.hidden_RD.dtype)

    def _o_proj(self, phase: Phase, index: tuple[int, ...], step: int) -> Steps:
        assert phase.layer is not None
        w = self.layer_weights[phase.layer].attention
        x_RO = self.shared[phase.reads[0].region.buffer].flatten(1).clone()
        bias = None if w.output_bias_D is None else w.output_bias_D
        return self._add(phase, index, x_RO, w.output_DO, bias)

    def _add(
        self, phase: Phase, index: tuple[int, ...], x_RK: torch.Tensor, weight_DK: Linear, bias_D: Any = None
    ) -> Steps:
        columns = self.columns(phase, index, self.spec.hidden_size)
        before = self.hidden_RD[:, columns].clone()
        yield
        out = x_RK @ plain_matrix(weight_DK, x_RK.dtype)[columns].T
        self.write_hidden(phase, slice(None), columns, before + (out if bias_D is None else out + bias_D[columns]))

    def _dense_gate_up(self, phase: Phase, index: tuple[int, ...], step: int) -> Steps:
        w = self._dense(phase)
        columns = self.columns(phase, index, w.down_DF.shape[1])
        x_RD, rms_R1 = self.norm(phase)
        yield
        gate_FD, up_FD = plain_matrix(w.gate_up_FD, x_RD.dtype).chunk(2)
        act = F.silu(x_RD @ gate_FD[columns].T * rms_R1) * (x_RD @ up_FD[columns].T * rms_R1)
        self.shared[phase.writes[0].buffer][:, columns] = act

    def _dense_down(self, phase: Phase, index: tuple[int, ...], step: int) -> Steps:
        down_DF = self._dense(phase).down_DF
        x_RF = self.shared[phase.reads[0].region.buffer][:, : down_DF.shape[1]].clone()
        return self._add(phase, index, x_RF, down_DF)

    def _dense(self, phase: Phase) -> DenseWeights:
        assert phase.layer is not None
        weights = self.layer_weights[phase.layer].mlp
        assert isinstance(weights, DenseWeights)
        return weights

    def _lm_head(self, phase: Phase, index: tuple[int, ...], step: int) -> Steps:
        columns = self.columns(phase, index, self.spec.vocab_size)
        x_RD, rms_R1 = self.norm(phase)
        drafter = self._drafting(phase)
        draws = [
            (row, params.temperature, self.noise(row)[columns])
            for row in range(self.plan.rows if drafter is None else 0)
            if self.is_used(row) and (params := self.params(row)).temperature > 0.0
        ]
        yield
        logits = (x_RD @ plain_matrix(self.weights.lm_head_VD, x_RD.dtype)[columns].T).float() * rms_R1
        if drafter is None:
            self.logits_RV[:, columns] = logits
        scores = logits.clone()
        for row, temperature, noise in draws:
            self.peaks_RT[row, index[0]] = logits[row].max()
            scores[row] = logits[row] / temperature + noise
        best, best_RT2 = scores.max(-1), self.best_RT2 if drafter is None else drafter.best_RT2
        best_RT2[:, index[0]] = torch.stack([best.values, (best.indices + columns.start).float()], dim=-1)


def _group_rows(a: AttentionSpec, group: int) -> torch.Tensor:
    """Rows of the joined projection in a key/value head's group, in the plan's order."""
    heads = a.num_heads // a.num_kv_heads
    q, k, v = heads * a.qk_head_dim, a.qk_head_dim, a.v_head_dim
    keys, values = a.num_heads * a.qk_head_dim, (a.num_heads + a.num_kv_heads) * a.qk_head_dim
    return torch.cat(
        [
            torch.arange(group * q, (group + 1) * q),
            torch.arange(keys + group * k, keys + (group + 1) * k),
            torch.arange(values + group * v, values + (group + 1) * v),
        ]
    )
