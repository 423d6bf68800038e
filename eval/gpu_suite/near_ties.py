"""Near ties between experts or tokens: rounding may decide them, so they say nothing about a backend.

Legend: R rows, E experts, V vocabulary.
"""

from collections.abc import Mapping

import torch

from speedstack.runtime.model.spec import MoeSpec
from speedstack.runtime.model.weights import ModelWeights, MoeWeights
from speedstack.runtime.rounds.sampling import SamplingParams, filter_logits

# Scores (logit / temperature + noise) within this many float32 units of their largest term may trade places: each takes
# two logarithms, of one unit each, and a sum, of half a unit.
SCORE_ULPS = 8


def decided_rows(weights: ModelWeights, expected: Mapping[str, torch.Tensor], tolerance: float) -> torch.Tensor:
    """Bool [R]: no rounding within `tolerance` of the router's logits changes a row's experts in any layer.

    expected: a step's buffers, from `expected_buffers`.
    """
    decided_R = torch.ones_like(expected["lm_head"][:, 0], dtype=torch.bool)
    for index, (layer, spec) in enumerate(zip(weights.layers, weights.spec.layers, strict=True)):
        if isinstance(layer.mlp, MoeWeights):
            assert isinstance(spec.mlp, MoeSpec)
            logits_RE = expected[f"L{index:02d}.router"]
            gap_R = choice_gap(logits_RE, layer.mlp.correction_bias_E, spec.mlp)
            decided_R &= gap_R > 2 * tolerance * logits_RE.square().mean(-1).sqrt()
    return decided_R


def choice_gap(logits_RE: torch.Tensor, correction_E: torch.Tensor | None, spec: MoeSpec) -> torch.Tensor:
    """Float32 [R]: minimum distance between the logits of the last expert chosen and the first not chosen."""
    if spec.top_k == spec.num_experts:
        return torch.full_like(logits_RE[:, 0], float("inf"))
    if spec.scoring == "softmax":
        best = logits_RE.topk(spec.top_k + 1, dim=-1).values
        return best[:, -2] - best[:, -1]
    scores_RE = logits_RE.sigmoid()
    best = (scores_RE if correction_E is None else scores_RE + correction_E).topk(spec.top_k + 1, dim=-1).values
    # A sigmoid's slope is at most a quarter.
    return 4 * (best[:, -2] - best[:, -1])


def pair_gap(logits_RE: torch.Tensor, spec: MoeSpec) -> torch.Tensor:
    """Float32 [R]: minimum distance between pairs whose order decides a row's choice."""
    pairs = (spec.top_k + 1) // 2
    best = logits_RE[:, : spec.num_experts // 2].topk(pairs + 1, dim=-1).values
    return torch.minimum(best[:, -3] - best[:, -2], best[:, -2] - best[:, -1])


def is_near_tie(logits_V: torch.Tensor, noise_V: torch.Tensor, params: SamplingParams) -> bool:
    """Whether rounding may decide between the best two scores; see SCORE_ULPS. NaN is no tie."""
    scaled_V = filter_logits(logits_V, params)
    best_2, index_2 = (scaled_V + noise_V).topk(2)
    if best_2[1] == float("-inf"):  # only one token is left
        return False
    size = torch.cat([best_2, scaled_V[index_2], noise_V[index_2], torch.ones_like(best_2)]).abs().max()
    return bool(best_2[0] - best_2[1] <= SCORE_ULPS * torch.finfo(torch.float32).eps * size)
