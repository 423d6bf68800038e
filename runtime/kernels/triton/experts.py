"""Routed experts, plain or MXFP4. See the package for the legend.

What rows chose (`router.choose`) every program finds out by itself from the router's logits: they are a few KB that lie
in the L2 cache, and a phase of its own would cost a wait.
"""

import triton
import triton.language as tl

from speedstack.runtime.kernels.triton.mxfp4 import multiply_mxfp4
from speedstack.runtime.kernels.triton.products import BLOCK, inverse_rms, multiply
from speedstack.runtime.kernels.triton.projections import add_to_hidden
from speedstack.runtime.kernels.triton.rows import is_used


@triton.jit
def expert_gate_up_item(
    nth,
    tile,
    experts_KR,
    rank_E,
    rows_ptr,
    scaled_ptr,
    squares_ptr,
    w_ptr,
    scales_ptr,
    bias_ptr,
    act_ptr,
    eps,
    limit,
    alpha,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    NP: tl.constexpr,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
    IS_PACKED: tl.constexpr,
    SLICES: tl.constexpr,
    IS_WIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_CLAMPED: tl.constexpr,
):
    """T columns of the nth of the experts that rows chose, of which there are more than nth.

    experts_KR, rank_E: as `router.choose` has them.
    IS_CLAMPED is gpt-oss's SwiGLU. Gate rows of weights and biases come before up rows.
    """
    KP: tl.constexpr = experts_KR.shape[0]
    expert = nth_expert(nth, rank_E)
    r_R = tl.arange(0, R)
    valid_R = is_used(rows_ptr, R)
    PART: tl.constexpr = _part(T, IS_PACKED)
    for part in range(T // PART):
        first = tile * T + part * PART
        column_T = first + tl.arange(0, PART)
        valid_T = column_T < WIDTH
        gate = expert.to(tl.int64) * (2 * WIDTH) + first
        gate_T = gate + tl.arange(0, PART)
        up_T = gate_T + WIDTH
        if IS_PACKED:
            gate_TR, up_TR = multiply_mxfp4(
                scaled_ptr, BLOCK * R, r_R * BLOCK, valid_R, w_ptr, scales_ptr, gate, WIDTH - first, WIDTH, D, PART,
                SLICES, IS_WIDE, True,
            )  # fmt: skip
        else:
            gate_TR = multiply(
                scaled_ptr, BLOCK * R, r_R * BLOCK, valid_R, w_ptr, scales_ptr, gate, WIDTH - first, D, PART, CHUNK
            )  # fmt: skip
            up_TR = multiply(
                scaled_ptr, BLOCK * R, r_R * BLOCK, valid_R, w_ptr, scales_ptr, gate + WIDTH, WIDTH - first, D, PART,
                CHUNK,
            )  # fmt: skip
        rms_1R = inverse_rms(squares_ptr, valid_R, eps, D, R, NP)[None, :]
        gate_TR, up_TR = gate_TR * rms_1R, up_TR * rms_1R
        if HAS_BIAS:
            gate_TR += tl.load(bias_ptr + gate_T, mask=valid_T, other=0.0).to(tl.float32)[:, None]
            up_TR += tl.load(bias_ptr + up_T, mask=valid_T, other=0.0).to(tl.float32)[:, None]
        if IS_CLAMPED:
            # Comparisons, because a minimum would replace what is not a number by the limit.
            gate_TR = tl.where(gate_TR > limit, limit, gate_TR)
            up_TR = tl.where(up_TR > limit, limit, tl.where(up_TR < -limit, -limit, up_TR))
            out_TR = (up_TR + 1.0) * (gate_TR * tl.sigmoid(gate_TR * alpha))
        else:
            out_TR = gate_TR * tl.sigmoid(gate_TR) * up_TR
        # Not before the products, which need the registers.
        choice_R = _choice(experts_KR, expert, KP)
        at_TR = act_ptr + ((r_R * K + choice_R) * WIDTH)[None, :] + column_T[:, None]
        tl.store(at_TR, out_TR.to(act_ptr.dtype.element_ty), mask=valid_T[:, None] & (choice_R >= 0)[None, :])


@triton.jit
def expert_down_item(
    tile,
    experts_KR,
    weights_KR,
    act_ptr,
    w_ptr,
    scales_ptr,
    bias_ptr,
    hidden_ptr,
    norm_ptr,
    scaled_ptr,
    squares_ptr,
    tap_ptr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
    IS_PACKED: tl.constexpr,
    SLICES: tl.constexpr,
    IS_WIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TAP: tl.constexpr,
):
    """T columns of the hidden size: the weighted sum over all chosen experts, in ascending order, added in place
    (see `projections.add_to_hidden`).

    experts_KR, weights_KR: as `router.choose` has them; E is no expert.
    """
    KP: tl.constexpr = experts_KR.shape[0]
    r_R = tl.arange(0, R)
    PART: tl.constexpr = _part(T, IS_PACKED)
    for part in range(T // PART):
        first = tile * T + part * PART
        column_T = first + tl.arange(0, PART)
        valid_T = column_T < D
        sum_TR = tl.zeros((PART, R), tl.float32)
        expert = tl.min(tl.min(experts_KR, axis=0), axis=0)
        while tl.condition(expert < E, disable_licm=True):
            choice_R = _choice(experts_KR, expert, KP)
            is_ours_R = choice_R >= 0
            row = expert.to(tl.int64) * D + first
            w_T = row + tl.arange(0, PART)
            x_R = (r_R * K + tl.maximum(choice_R, 0)) * WIDTH
            if IS_PACKED:
                out_TR = multiply_mxfp4(
                    act_ptr, BLOCK, x_R, is_ours_R, w_ptr, scales_ptr, row, D - first, 0, WIDTH, PART, SLICES, IS_WIDE,
                    False,
                )  # fmt: skip
            else:
                out_TR = multiply(
                    act_ptr, BLOCK, x_R, is_ours_R, w_ptr, scales_ptr, row, D - first, WIDTH, PART, CHUNK
                )  # fmt: skip
            if HAS_BIAS:
                out_TR += tl.load(bias_ptr + w_T, mask=valid_T, other=0.0).to(tl.float32)[:, None]
            # Not before the product, which needs the registers.
            weight_R = tl.sum(tl.where(experts_KR == expert, weights_KR, 0.0), axis=0)
            sum_TR = tl.where(is_ours_R[None, :], sum_TR + out_TR * weight_R[None, :], sum_TR)
            later_KR = tl.where(experts_KR > expert, experts_KR, E)
            expert = tl.min(tl.min(later_KR, axis=0), axis=0)
        add_to_hidden(sum_TR, first, hidden_ptr, norm_ptr, scaled_ptr, squares_ptr, tap_ptr, D, HAS_TAP)


@triton.constexpr_function
def _part(tile: int, is_packed: bool) -> int:
    """Columns computed at a time: decoded weights and two products' sums have to fit into registers."""
    return min(tile, 32) if is_packed else tile


@triton.jit
def nth_expert(nth, rank_E):
    """The nth of the chosen experts in ascending order."""
    EP: tl.constexpr = rank_E.shape[0]
    return tl.sum(tl.where(rank_E == nth + 1, tl.arange(0, EP), 0), axis=0)


@triton.jit
def _choice(experts_KR, expert, KP: tl.constexpr):
    """Which choice of each row an expert is, int32 [R]; -1 where it is none."""
    return tl.max(tl.where(experts_KR == expert, tl.arange(0, KP)[:, None], -1), axis=0)
