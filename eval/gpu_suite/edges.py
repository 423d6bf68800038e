"""A model of edge cases for the checks: experts that tie across warps, the ends of E8M0 scales, and a real vocabulary.

Experts e and e + E / 2 have the same router row and different weights. A router row has one nonzero element, so a logit
is one product and ties are exact in any summation order; the lower expert must win. The number of choices is odd, so
the last choice is always between two that tie. Some scales are so high that decoding takes another path (IS_WIDE), some
blocks have the lowest, 2**-127, and one expert finally gets the NaN byte: only rows that chose it are lost.
"""

import torch

from speedstack.eval.gpu_suite.scale import Scale
from speedstack.quant.mxfp4 import MXFP4Tensor
from speedstack.runtime.model.spec import AttentionSpec, LayerSpec, ModelSpec, MoeSpec
from speedstack.runtime.model.synthetic_weights import random_weights
from speedstack.runtime.model.weights import ModelWeights, MoeWeights

HIDDEN, INTERMEDIATE = 64, 64
# Added to scales of some up rows and subtracted in their down projection, so that the sum stays near one.
SHIFT = 70
NAN_BYTE = 255


def edge_spec(scale: Scale) -> ModelSpec:
    """One layer, with as many experts as MiMo and as many tokens as Qwen3 where that costs no time."""
    attention = AttentionSpec(2, 1, 32, 32, 16, 1e4)
    num_experts, top_k, vocab_size = (16, 3, 100) if scale.is_tiny else (256, 7, 151936)
    moe = MoeSpec(num_experts, top_k, INTERMEDIATE, "softmax", has_correction_bias=False, renormalize=True)
    return ModelSpec("edges", vocab_size, HIDDEN, 1e-5, 1024, (), (LayerSpec(attention, moe),))


def edge_weights(scale: Scale, dtype: torch.dtype, device: torch.device) -> ModelWeights:
    """Weights as in the module docstring, without the NaN expert."""
    weights = random_weights(edge_spec(scale), dtype, device, is_packed=True, seed=5)
    moe = experts_of(weights)
    expert_E = torch.arange(len(moe.router_ED), device=device)
    pair_E = expert_E % (len(expert_E) // 2)
    moe.router_ED.zero_()
    moe.router_ED[expert_E, pair_E % HIDDEN] = torch.where(pair_E < HIDDEN, 1.0, -1.5)
    up, down = _packed(moe.gate_up_EID).scales[:, INTERMEDIATE:], _packed(moe.down_EDI).scales
    up[expert_E % 4 == 1] += SHIFT
    down[expert_E % 4 == 1] -= SHIFT
    up[expert_E % 4 == 2, :, 0] = 0
    return weights


def moe_of(spec: ModelSpec) -> MoeSpec:
    """The only layer's spec."""
    moe = spec.layers[0].mlp
    assert isinstance(moe, MoeSpec)
    return moe


def experts_of(weights: ModelWeights) -> MoeWeights:
    """The only layer's experts."""
    moe = weights.layers[0].mlp
    assert isinstance(moe, MoeWeights)
    return moe


def lose_expert(weights: ModelWeights, expert: int) -> None:
    """Set one block of an expert's weights to NaN."""
    _packed(experts_of(weights).gate_up_EID).scales[expert, 3, 1] = NAN_BYTE


def _packed(weight: object) -> MXFP4Tensor:
    assert isinstance(weight, MXFP4Tensor)
    return weight
