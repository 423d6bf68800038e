"""A Mixture-of-Experts MLP in PyTorch: routing and the weighted sum over a row's experts.

Legend: R rows, D hidden, E experts, K choices a row, I expert intermediate.
"""

import torch
import torch.nn.functional as F

from speedstack.quant.mxfp4 import MXFP4Tensor
from speedstack.runtime.model.spec import MoeSpec
from speedstack.runtime.model.weights import MoeWeights, Weight


def route(logits_RE: torch.Tensor, bias_E: torch.Tensor | None, spec: MoeSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Expert indices [R, K], best first with ties to the lower index, and their float32 weights."""
    scores_RE = logits_RE.sigmoid() if spec.scoring == "sigmoid" else logits_RE.softmax(-1)
    choice_RE = scores_RE if bias_E is None else scores_RE + bias_E
    experts_RK = torch.sort(choice_RE, dim=-1, descending=True, stable=True).indices[:, : spec.top_k]
    weights_RK = scores_RE.gather(1, experts_RK)
    if spec.renormalize:
        weights_RK = weights_RK / (weights_RK.sum(-1, keepdim=True) + 1e-20)
    return experts_RK, weights_RK * spec.routed_scale


def expert_matrices(weight: Weight, index_P: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The dequantized matrices of these experts."""
    if isinstance(weight, MXFP4Tensor):
        return MXFP4Tensor(weight.codes[index_P], weight.scales[index_P]).dequantize(dtype)
    return weight[index_P]


def swiglu(gate_up_RI: torch.Tensor, spec: MoeSpec) -> torch.Tensor:
    """The experts' activation: gate columns first, then up columns."""
    gate_RI, up_RI = gate_up_RI.chunk(2, dim=-1)
    if spec.swiglu_limit is None:
        return F.silu(gate_RI) * up_RI
    gate_RI, up_RI = gate_RI.clamp(max=spec.swiglu_limit), up_RI.clamp(-spec.swiglu_limit, spec.swiglu_limit)
    return (up_RI + 1) * (gate_RI * torch.sigmoid(gate_RI * spec.swiglu_alpha))


def mixture(x_RD: torch.Tensor, moe: MoeWeights, spec: MoeSpec) -> torch.Tensor:
    """Sum over a row's experts in the order of choice, one matrix-vector product per (row, choice)."""
    logits_RE = x_RD.float() @ moe.router_ED.T
    if moe.router_bias_E is not None:
        logits_RE = logits_RE + moe.router_bias_E
    experts_RK, weights_RK = route(logits_RE, moe.correction_bias_E, spec)
    out_RD = torch.zeros_like(x_RD)
    for k in range(spec.top_k):
        experts_R = experts_RK[:, k]
        gate_up_RI = torch.bmm(expert_matrices(moe.gate_up_EID, experts_R, x_RD.dtype), x_RD[:, :, None])[..., 0]
        if moe.gate_up_bias_EI is not None:
            gate_up_RI = gate_up_RI + moe.gate_up_bias_EI[experts_R]
        hidden_RI = swiglu(gate_up_RI, spec)
        down_RD = torch.bmm(expert_matrices(moe.down_EDI, experts_R, x_RD.dtype), hidden_RI[:, :, None])[..., 0]
        if moe.down_bias_ED is not None:
            down_RD = down_RD + moe.down_bias_ED[experts_R]
        out_RD = out_RD + down_RD * weights_RK[:, k, None].to(x_RD.dtype)
    return out_RD
