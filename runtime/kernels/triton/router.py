"""Router logits, and which experts rows chose. See the package for the legend."""

import triton
import triton.language as tl

from speedstack.runtime.kernels.triton.products import inverse_rms, load_x
from speedstack.runtime.kernels.triton.rows import TOKEN, field


@triton.jit
def router_item(
    tile,
    hidden_ptr,
    norm_ptr,
    w_ptr,
    bias_ptr,
    logits_ptr,
    eps,
    E: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Norm, then the logits of T experts, one after another: an expert's sum has one shape, whatever the tile."""
    r_R = tl.arange(0, R)
    all_R = r_R >= 0
    rms_R = inverse_rms(hidden_ptr, eps, D, R, CHUNK)
    for expert in range(tile * T, tl.minimum(tile * T + T, E)):
        sum_BR = tl.zeros((CHUNK, R), tl.float32)
        for start in range(0, D, CHUNK):
            k_B = start + tl.arange(0, CHUNK)
            w_B = tl.load(w_ptr + expert * D + k_B, mask=k_B < D, other=0.0)
            x_BR = load_x(hidden_ptr, R, r_R, all_R, k_B, norm_ptr, rms_R, D, True)
            sum_BR += w_B[:, None] * x_BR.to(tl.float32)
        logit_R = tl.sum(sum_BR, axis=0)
        if HAS_BIAS:
            logit_R += tl.load(bias_ptr + expert)
        tl.store(logits_ptr + expert * R + r_R, logit_R)


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
    """Experts int32 [KP, R] and weights float32 [KP, R], best choice first, ties to the lower index; is chosen [EP].

    E stands for no expert: choices past K, and all of idle rows. EP, KP: powers of two, at least E and K. A logit that
    is not a number is chosen last; the row is lost already, yet must not lead outside of the weights.
    """
    e_E, r_R, k_K = tl.arange(0, EP), tl.arange(0, R), tl.arange(0, KP)
    is_expert_E = e_E < E
    logits_ER = tl.load(
        logits_ptr + e_E[:, None] * R + r_R[None, :], mask=is_expert_E[:, None], other=float("-inf")
    )  # fmt: skip
    if IS_SIGMOID:
        scores_ER = tl.sigmoid(logits_ER)
    else:
        exp_ER = tl.exp(logits_ER - tl.max(logits_ER, axis=0)[None, :])
        scores_ER = exp_ER / tl.sum(exp_ER, axis=0)[None, :]
    values_ER = scores_ER
    if HAS_CORRECTION:
        values_ER += tl.load(correction_ptr + e_E, mask=is_expert_E, other=0.0)[:, None]
    values_ER = tl.where(values_ER == values_ER, values_ER, float("-inf"))
    is_free_ER = is_expert_E[:, None] & (r_R >= 0)[None, :]
    is_row_R = field(rows_ptr, r_R, TOKEN) >= 0
    experts_KR = tl.full((KP, R), E, tl.int32)
    weights_KR = tl.zeros((KP, R), tl.float32)
    for k in tl.static_range(K):
        largest_R = tl.max(tl.where(is_free_ER, values_ER, float("-inf")), axis=0)
        is_best_ER = is_free_ER & (values_ER == largest_R[None, :])
        best_R = tl.min(tl.where(is_best_ER, e_E[:, None], E - 1), axis=0)
        is_best_ER = e_E[:, None] == best_R[None, :]
        weight_R = tl.sum(tl.where(is_best_ER, scores_ER, 0.0), axis=0)
        is_free_ER = is_free_ER & (e_E[:, None] != best_R[None, :])
        is_now_KR = (k_K == k)[:, None] & is_row_R[None, :]
        experts_KR = tl.where(is_now_KR, best_R[None, :], experts_KR)
        weights_KR = tl.where(is_now_KR, weight_R[None, :], weights_KR)
    if RENORMALIZE:
        weights_KR = weights_KR / (tl.sum(weights_KR, axis=0)[None, :] + 1e-20)
    is_taken_ER = is_expert_E[:, None] & is_row_R[None, :] & (is_free_ER == 0)
    is_chosen_E = tl.max(is_taken_ER.to(tl.int32), axis=1)
    return experts_KR, weights_KR * routed_scale, is_chosen_E
