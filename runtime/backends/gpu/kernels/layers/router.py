"""Router logits, and the choice of experts. Legend: see the package."""

import triton
import triton.language as tl

from speedstack.runtime.backends.gpu.kernels.layers.matmul import BLOCK, inverse_rms, load_x
from speedstack.runtime.backends.gpu.kernels.rows import is_used

_LEAST = tl.constexpr(-3.4028234663852886e38)  # of float32


@triton.jit
def router_item(
    tile,
    rows_ptr,
    scaled_ptr,
    squares_ptr,
    w_ptr,
    bias_ptr,
    logits_ptr,
    eps,
    E: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    NP: tl.constexpr,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Norm, then the logits of T experts, one at a time, so that a sum's shape does not depend on the tile."""
    r_R = tl.arange(0, R)
    valid_R = is_used(rows_ptr, R)
    rms_R = inverse_rms(squares_ptr, valid_R, eps, D, R, NP)
    for expert in range(tile * T, tl.minimum(tile * T + T, E)):
        sum_BR = tl.zeros((CHUNK, R), tl.float32)
        for start in range(0, D, CHUNK):
            k_B = start + tl.arange(0, CHUNK)
            w_B = tl.load(w_ptr + expert * D + k_B, mask=k_B < D, other=0.0)
            x_BR = load_x(scaled_ptr, BLOCK * R, r_R * BLOCK, valid_R, k_B, D)
            sum_BR += w_B[:, None] * x_BR.to(tl.float32)
        logit_R = tl.sum(sum_BR, axis=0) * rms_R
        if HAS_BIAS:
            logit_R += tl.load(bias_ptr + expert)
        tl.store(logits_ptr + expert * R + r_R, logit_R)


@triton.jit
def scores(logits_XR, peak_R, total_R, IS_SIGMOID: tl.constexpr):
    """Sigmoids of logits [.., R], or their softmax with the given peak and total."""
    if IS_SIGMOID:
        return tl.sigmoid(logits_XR)
    else:
        return tl.exp(logits_XR - peak_R[None, :]) / total_R[None, :]


@triton.jit
def choose(
    rows_ptr,
    logits_ptr,
    correction_ptr,
    routed_scale,
    E: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    EP: tl.constexpr,
    KP: tl.constexpr,
    IS_SIGMOID: tl.constexpr,
    HAS_CORRECTION: tl.constexpr,
    RENORMALIZE: tl.constexpr,
):
    """Experts int32 [KP, R] and weights float32 [KP, R], best first, ties to the lower index; ranks int32 [EP].

    E means no expert: choices past K, and idle rows. EP, KP: powers of two, at least E and K. An active expert's rank
    is its place among them, ascending from 1; others have 0. NaN logits are chosen last: the row is lost, but indices
    stay inside the weights.
    """
    e_E, r_R, k_K = tl.arange(0, EP), tl.arange(0, R), tl.arange(0, KP)
    is_expert_E = e_E < E
    logits_ER = tl.load(
        logits_ptr + e_E[:, None] * R + r_R[None, :], mask=is_expert_E[:, None], other=float("-inf")
    )  # fmt: skip
    peak_R, total_R = tl.zeros((R,), tl.float32), tl.zeros((R,), tl.float32)
    if not IS_SIGMOID:
        peak_R = tl.max(logits_ER, axis=0)
        total_R = tl.sum(tl.exp(logits_ER - peak_R[None, :]), axis=0)
    values_ER = scores(logits_ER, peak_R, total_R, IS_SIGMOID)
    if HAS_CORRECTION:
        values_ER += tl.load(correction_ptr + e_E, mask=is_expert_E, other=0.0)[:, None]
    # Above the value of chosen experts, so that none is chosen twice.
    values_ER = tl.where(values_ER > _LEAST, values_ER, _LEAST)
    left_ER = tl.where(is_expert_E[:, None], values_ER, float("-inf"))
    is_row_R = is_used(rows_ptr, R)
    experts_KR, weights_KR = tl.full((KP, R), E, tl.int32), tl.zeros((KP, R), tl.float32)
    # Not unrolled: that would add code per choice and, in Triton 3.6.0, registers that stay allocated.
    for k in range(K):
        # Value and index in one reduction, which ends at a barrier.
        largest_R, best_R = tl.max(left_ER, axis=0, return_indices=True, return_indices_tie_break_left=True)
        left_ER = tl.where(e_E[:, None] == best_R[None, :], float("-inf"), left_ER)
        is_here_KR = (k_K == k)[:, None] & is_row_R[None, :]
        experts_KR = tl.where(is_here_KR, best_R[None, :], experts_KR)
        if not HAS_CORRECTION:
            weight_R = tl.where(largest_R > _LEAST, largest_R, float("nan"))
            weights_KR = tl.where(is_here_KR, weight_R[None, :], weights_KR)
    if HAS_CORRECTION:
        # Load their logits again, because lanes cannot read each other's values.
        is_choice_KR = experts_KR < E
        logits_KR = tl.load(logits_ptr + experts_KR * R + r_R[None, :], mask=is_choice_KR, other=0.0)
        weights_KR = tl.where(is_choice_KR, scores(logits_KR, peak_R, total_R, IS_SIGMOID), 0.0)
    if RENORMALIZE:
        weights_KR = weights_KR / (tl.sum(weights_KR, axis=0)[None, :] + 1e-20)
    is_taken_ER = is_expert_E[:, None] & is_row_R[None, :] & (left_ER == float("-inf"))
    is_chosen_E = tl.max(is_taken_ER.to(tl.int32), axis=1)
    rank_E = tl.where(is_chosen_E > 0, tl.cumsum(is_chosen_E, axis=0), 0)
    return experts_KR, weights_KR * routed_scale, rank_E
