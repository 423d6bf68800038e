"""Expected buffers of every phase, from the reference backend, and the buffers a GPU backend computed.

For comparing kernels one by one on their device. Legend: R rows, D hidden, O qkv rows, F dense intermediate, V
vocabulary, E experts, K choices of a row, I expert intermediate.
"""

from dataclasses import replace
from itertools import pairwise

import torch
import torch.nn.functional as F

from speedstack.quant.mxfp4 import MXFP4Tensor
from speedstack.runtime.backends.base import Rows
from speedstack.runtime.backends.gpu.base import PlanBackend
from speedstack.runtime.backends.reference import ReferenceBackend, rms_norm
from speedstack.runtime.model.moe import expert_matrices, route, swiglu
from speedstack.runtime.model.spec import MoeSpec
from speedstack.runtime.model.weights import AttentionWeights, DenseWeights, MoeWeights, plain_matrix
from speedstack.runtime.plan.ir import Phase
from speedstack.runtime.plan.tiling import BLOCK_COLUMNS, num_blocks


@torch.no_grad()
def expected_buffers(backend: ReferenceBackend, rows: Rows) -> dict[str, torch.Tensor]:
    """Expected results by phase name, rows first; phases whose buffers have their own layout are left out.

    Rows read and write the backend's key/value buffers.
    """
    weights, eps, device = backend.weights, backend.weights.spec.rms_norm_eps, backend.device
    slots_R, positions_R = torch.tensor(rows.slots, device=device), torch.tensor(rows.positions, device=device)
    hidden_RD = weights.embedding_VD[torch.tensor(rows.tokens, device=device)]
    seen = {"embed": hidden_RD}
    for index, (layer, spec) in enumerate(zip(weights.layers, weights.spec.layers, strict=True)):
        a, at = layer.attention, f"L{index:02d}."
        x_RD = rms_norm(hidden_RD, a.norm_D, eps)
        bias_O = 0.0 if a.qkv_bias_O is None else a.qkv_bias_O
        seen[at + "qkv"] = x_RD @ plain_matrix(a.qkv_OD, x_RD.dtype).T + bias_O

        def attend(x_RD: torch.Tensor, a: AttentionWeights, index: int = index) -> torch.Tensor:
            return backend._attention(index, x_RD, a, slots_R, positions_R)

        identity = torch.eye(a.output_DO.shape[1], dtype=x_RD.dtype, device=device)
        seen[at + "combine"] = attend(x_RD, replace(a, output_DO=identity, output_bias_D=None))
        hidden_RD = seen[at + "o_proj"] = hidden_RD + attend(x_RD, a)
        x_RD = rms_norm(hidden_RD, layer.mlp.norm_D, eps)
        if isinstance(layer.mlp, DenseWeights):
            gate_RF, up_RF = (x_RD @ plain_matrix(layer.mlp.gate_up_FD, x_RD.dtype).T).chunk(2, dim=-1)
            seen[at + "gate_up"] = F.silu(gate_RF) * up_RF
            down_FD = plain_matrix(layer.mlp.down_DF, x_RD.dtype).T
            hidden_RD = seen[at + "down"] = hidden_RD + seen[at + "gate_up"] @ down_FD
        else:
            assert isinstance(spec.mlp, MoeSpec)
            hidden_RD = seen[at + "down"] = hidden_RD + _mixture(x_RD, layer.mlp, spec.mlp, seen, at)
    final_RD = rms_norm(hidden_RD, weights.norm_D, eps)
    seen["lm_head"] = final_RD @ plain_matrix(weights.lm_head_VD, final_RD.dtype).T
    return seen


def _mixture(
    x_RD: torch.Tensor, moe: MoeWeights, spec: MoeSpec, seen: dict[str, torch.Tensor], at: str
) -> torch.Tensor:
    bias_E = 0.0 if moe.router_bias_E is None else moe.router_bias_E
    logits_RE = seen[at + "router"] = x_RD.float() @ moe.router_ED.T + bias_E
    experts_RK, weights_RK = route(logits_RE, moe.correction_bias_E, spec)
    act, out_RD = [], torch.zeros_like(x_RD)
    for k in range(spec.top_k):
        index_R = experts_RK[:, k]
        gate_up_RI = (expert_matrices(moe.gate_up_EID, index_R, x_RD.dtype) @ x_RD[:, :, None])[..., 0]
        if moe.gate_up_bias_EI is not None:
            gate_up_RI = gate_up_RI + moe.gate_up_bias_EI[index_R]
        act.append(swiglu(gate_up_RI, spec))
        down_RD = (expert_matrices(moe.down_EDI, index_R, x_RD.dtype) @ act[-1][:, :, None])[..., 0]
        if moe.down_bias_ED is not None:
            down_RD = down_RD + moe.down_bias_ED[index_R]
        out_RD = out_RD + weights_RK[:, k, None].to(x_RD.dtype) * down_RD
    seen[at + "gate_up"] = torch.cat(act, dim=1)
    return out_RD


def found_buffer(backend: PlanBackend, phase: Phase, num_rows: int) -> torch.Tensor | None:
    """A phase's result, rows first, in the reference's column order; None if it is not compared."""
    R = backend.plan.rows
    buffers, weights = backend.memory.buffers, backend.weights
    if phase.op in ("embed", "o_proj", "dense_down", "expert_down"):
        return backend.memory.hidden_DR.T[:num_rows]
    if phase.op == "lm_head":
        return backend.memory.logits_VR.T[:num_rows]
    if phase.layer is None:
        return None
    a, mlp = weights.spec.layers[phase.layer].attention, weights.spec.layers[phase.layer].mlp
    if phase.op == "qkv":
        columns = phase.axes[1].size * phase.tile
        grouped = buffers["qkv"][: a.num_kv_heads * columns * R].view(a.num_kv_heads, columns, R)
        q = a.num_heads // a.num_kv_heads * a.qk_head_dim
        ends = [0, q, q + a.qk_head_dim, q + a.qk_head_dim + a.v_head_dim]
        parts = [grouped[:, start:end].flatten(0, 1) for start, end in pairwise(ends)]
        return torch.cat(parts).T[:num_rows]
    if phase.op == "combine":
        return buffers["attended"][: R * a.num_heads * a.v_head_dim].view(R, -1)[:num_rows]
    if phase.op == "router":
        assert isinstance(mlp, MoeSpec)
        return buffers["router"][: mlp.num_experts * R].view(-1, R).T[:num_rows]
    if phase.op == "expert_gate_up":
        own = weights.layers[phase.layer].mlp
        assert isinstance(mlp, MoeSpec) and isinstance(own, MoeWeights)
        act = buffers["act"][: R * mlp.top_k * mlp.intermediate_size]
        if isinstance(own.down_EDI, MXFP4Tensor):  # as `kernels.layers.matmul_mxfp4.sorted_column` has them
            act = act.view(-1, 4, 2).transpose(1, 2)
        return act.reshape(R, -1)[:num_rows]
    if phase.op == "dense_gate_up":
        width = num_blocks(mlp.intermediate_size) * BLOCK_COLUMNS
        blocks = buffers["act"][: width * R].view(-1, R, BLOCK_COLUMNS)
        return blocks.transpose(0, 1).flatten(1)[:num_rows, : mlp.intermediate_size]
    return None
