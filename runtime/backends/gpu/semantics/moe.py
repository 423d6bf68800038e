"""The phases of a mixture of experts in PyTorch, on the plan's buffers.

Buffers, with R rows (the plan's capacity):

    router.*  float32 [R, E]   logits
    act.*     [R * K, I]       a row's choices in ascending order of expert
    routes.*  float32 [active experts, ..]   records of active experts, ascending; numbers here, not bits
"""

from __future__ import annotations

import torch

from speedstack.runtime.backends.gpu.semantics.memory import LayerBuffers
from speedstack.runtime.backends.gpu.semantics.multi_step import ItemSemantics, Steps
from speedstack.runtime.model.moe import expert_matrices, route, swiglu
from speedstack.runtime.model.spec import MoeSpec
from speedstack.runtime.model.weights import MoeWeights
from speedstack.runtime.plan.ir import Phase
from speedstack.runtime.plan.record_layout import EXPERT, NUM_ACTIVE, TOKEN, route_words


class MoeSemantics:
    """The buffers above and their semantics. memory: all other buffers."""

    def __init__(self, memory: LayerBuffers) -> None:
        self.memory = memory
        self.shared: dict[str, torch.Tensor] = {}
        plan, nan = memory.plan, float("nan")
        for phase in plan.phases:
            if phase.op == "router":
                name = phase.writes[0].buffer
                self.shared[name] = torch.full((plan.rows, plan.buffer_named[name].num_cells), nan)
            elif phase.op == "expert_gate_up":
                moe, (routes, act) = self._moe(phase)[1], [region.buffer for region in phase.writes]
                records = plan.buffer_named[routes].num_cells
                self.shared[routes] = torch.full((records, route_words(plan.rows)), nan)
                self.shared[act] = memory.hidden_RD.new_full((plan.rows * moe.top_k, moe.intermediate_size), nan)

    def semantics(self) -> dict[str, ItemSemantics]:
        """By op, for `interpret`."""
        return {"router": self._router, "expert_gate_up": self._gate_up, "expert_down": self._down}

    def _moe(self, phase: Phase) -> tuple[MoeWeights, MoeSpec]:
        assert phase.layer is not None
        memory = self.memory
        weights, spec = memory.layer_weights[phase.layer].mlp, memory.layer_specs[phase.layer].mlp
        assert isinstance(weights, MoeWeights) and isinstance(spec, MoeSpec)
        return weights, spec

    def _router(self, phase: Phase, index: tuple[int, ...], step: int) -> Steps:
        w, moe = self._moe(phase)
        columns = self.memory.columns(phase, index, moe.num_experts)
        x_RD, rms_R1 = self.memory.norm(phase)
        yield
        logits = x_RD.float() @ w.router_ED[columns].T * rms_R1
        if w.router_bias_E is not None:
            logits = logits + w.router_bias_E[columns]
        self.shared[phase.writes[0].buffer][:, columns] = logits

    def _routes(self, phase: Phase, logits: str) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """Each row's experts, ascending, and their weights; and the active experts, ascending."""
        w, moe = self._moe(phase)
        experts_RK, weights_RK = route(self.shared[logits], w.correction_bias_E, moe)
        experts_RK, order_RK = experts_RK.sort(dim=-1)
        used = self.memory.rows_RF[:, TOKEN] >= 0
        return experts_RK, weights_RK.gather(1, order_RK), sorted(set(experts_RK[used].flatten().tolist()))

    def _gate_up(self, phase: Phase, index: tuple[int, ...], step: int) -> Steps:
        w, moe = self._moe(phase)
        experts_RK, weights_RK, active = self._routes(phase, phase.reads[-1].region.buffer)
        if index[0] >= len(active):
            return
        columns = self.memory.columns(phase, index, moe.intermediate_size)
        (x_RD, rms_R1), expert = self.memory.norm(phase), active[index[0]]
        yield
        dtype, one = x_RD.dtype, torch.tensor([expert])
        rows = torch.arange(columns.start, columns.stop)
        rows = torch.cat([rows, rows + moe.intermediate_size])
        out = x_RD @ expert_matrices(w.gate_up_EID, one, dtype)[0][rows].T * rms_R1
        if w.gate_up_bias_EI is not None:
            out = out + w.gate_up_bias_EI[expert][rows]
        act_RI = swiglu(out, moe)
        for row, choice in (experts_RK == expert).nonzero().tolist():
            if self.memory.is_used(row):
                self.shared[phase.writes[1].buffer][row * moe.top_k + choice, columns] = act_RI[row]
        if index[1] == 0:
            chosen_RK = (experts_RK == expert) & (self.memory.rows_RF[:, TOKEN] >= 0)[:, None]
            choice_R = torch.where(chosen_RK.any(1), chosen_RK.int().argmax(1), -1)
            weight_R = (weights_RK * chosen_RK).sum(1)
            extra = torch.tensor([expert, len(active), 0, 0])
            self.shared[phase.writes[0].buffer][index[0]] = torch.cat([choice_R, weight_R, extra])

    def _down(self, phase: Phase, index: tuple[int, ...], step: int) -> Steps:
        (w, moe), R = self._moe(phase), self.memory.plan.rows
        act_RKI = self.shared[phase.reads[1].region.buffer].unflatten(0, (-1, moe.top_k)).clone()
        routes_NW = self.shared[phase.reads[2].region.buffer].nan_to_num()  # NaN if read too early
        num_active = int(routes_NW[0, 2 * R + NUM_ACTIVE]) if (self.memory.rows_RF[:, TOKEN] >= 0).any() else 0
        columns = self.memory.columns(phase, index, self.memory.spec.hidden_size)
        before = self.memory.hidden_RD[:, columns].clone()
        yield
        total = torch.zeros_like(before)
        for record in routes_NW[:num_active]:
            expert, rows = int(record[2 * R + EXPERT]), (record[:R] >= 0).nonzero().flatten()
            matrix = expert_matrices(w.down_EDI, torch.tensor([expert]), before.dtype)[0][columns]
            out = act_RKI[rows, record[rows].long()] @ matrix.T
            if w.down_bias_ED is not None:
                out = out + w.down_bias_ED[expert][columns]
            total[rows] = total[rows] + out * record[R + rows, None].to(out.dtype)
        self.memory.write_hidden(phase, slice(None), columns, before + total)
