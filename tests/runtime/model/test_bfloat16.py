"""What normalizes in bfloat16, against the norm's formula in float64.

A product takes the hidden state times the norm's weight, rounded to bfloat16, and what is divided by the root mean
square is its result (see `kernels.layers.matmul`). PyTorch rounds what is normalized, then that times the weight.
Neither is the other's bits: both are held to what their roundings allow.

Legend: R rows, D hidden, O qkv rows.
"""

from dataclasses import replace

import torch

from speedstack.runtime.backends.gpu.base import formats_of
from speedstack.runtime.backends.gpu.semantics.layers import StepSemantics
from speedstack.runtime.backends.reference import rms_norm
from speedstack.runtime.model.families.registry import spec_from_config
from speedstack.runtime.model.released_models import tiny_config
from speedstack.runtime.model.synthetic_weights import random_weights
from speedstack.runtime.plan.step import build_plan

UNIT = 2.0**-8  # half the distance of neighbours near one, which is what rounding to bfloat16 errs by
CPU = torch.device("cpu")


def test_a_normalized_product_errs_by_its_roundings_alone() -> None:
    """The plan's `qkv` and PyTorch's order of roundings; and the bound is one that a lost factor breaks."""
    spec = spec_from_config(tiny_config("qwen3-30b-a3b"))
    weights = random_weights(replace(spec, layers=spec.layers[:1]), torch.bfloat16, CPU, is_packed=False)
    norm_D, qkv_OD = weights.layers[0].attention.norm_D, weights.layers[0].attention.qkv_OD
    assert isinstance(qkv_OD, torch.Tensor) and norm_D.max() > 1.1 > 0.9 > norm_D.min()
    plan, R = build_plan(weights.spec, formats_of(weights), 4, 3, 32), 3
    memory, phase = StepSemantics(plan, weights), plan.phases[plan.phase_named["L00.qkv"]]
    x_RD = (torch.randn(R, spec.hidden_size, generator=torch.Generator().manual_seed(0)) * 5).bfloat16()
    memory.set_rows([1, 2, 3], [0, 1, 2], [0, 0, 0])
    memory.write_hidden(plan.phases[plan.phase_named["embed"]], slice(None), slice(None), x_RD)
    body = memory.semantics()["qkv"]
    for item in range(phase.num_items):
        for _ in body(phase, phase.index(item), 0) or ():
            pass
    a = spec.layers[0].attention
    grouped_RGO = memory.shared[phase.writes[0].buffer]
    sizes = [a.num_heads // a.num_kv_heads * a.qk_head_dim, a.qk_head_dim, a.v_head_dim]
    parts = grouped_RGO[..., : sum(sizes)].split(sizes, dim=-1)
    found_RO = torch.cat([part.flatten(1) for part in parts], dim=1).double()

    wide_RD, matrix_OD = x_RD.double(), qkv_OD.double()
    rms_R1 = torch.rsqrt(wide_RD.square().mean(-1, keepdim=True) + spec.rms_norm_eps)
    terms_RD = wide_RD * rms_R1 * norm_D.double()
    exact_RO = terms_RD @ matrix_OD.T
    # A rounding of each product of state and weight, one of the sum and one of what comes of it. PyTorch's: two of
    # each factor, one of the sum. Float32 sums add a 65,536th of that at most.
    factors_RO = terms_RD.abs() @ matrix_OD.abs().T
    allowed_RO = UNIT * (factors_RO + 2 * exact_RO.abs()) * 1.01
    assert ((found_RO - exact_RO).abs() <= allowed_RO).all()
    theirs_RO = (rms_norm(x_RD, norm_D, spec.rms_norm_eps) @ qkv_OD.T).double()
    assert ((theirs_RO - exact_RO).abs() <= UNIT * (2 * factors_RO + exact_RO.abs()) * 1.01).all()
    for lost_RO in (terms_RD / norm_D @ matrix_OD.T, exact_RO / rms_R1):
        assert not ((found_RO - lost_RO).abs() <= allowed_RO).all(), "the bound sees what is missing"
