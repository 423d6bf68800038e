"""Routed experts, plain or MXFP4. Legend: see the package.

Every program derives the chosen experts (`router.choose`) from the logits, a few KB in L2; a separate phase would cost
a wait. `expert_gate_up` writes a record per active expert (`plan/record_layout.py`) for `expert_down`, where searching
for the next expert would cost more instructions than multiplying its weights.
"""

import triton
import triton.language as tl

from speedstack.runtime.backends.gpu.kernels.layers.matmul import BLOCK, inverse_rms, multiply
from speedstack.runtime.backends.gpu.kernels.layers.matmul_mxfp4 import (
    experts_sum_mxfp4,
    multiply_pair_mxfp4,
    route_words,
    sorted_column,
)
from speedstack.runtime.backends.gpu.kernels.layers.projections import add_to_hidden
from speedstack.runtime.backends.gpu.kernels.rows import EXPERT, NUM_ACTIVE
from speedstack.runtime.plan.tiling import PART_COLUMNS


@triton.jit
def expert_gate_up_item(
    nth,
    tile,
    experts_KR,
    weights_KR,
    rank_E,
    scaled_ptr,
    squares_ptr,
    w_ptr,
    scales_ptr,
    bias_ptr,
    act_ptr,
    routes_ptr,
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
    IS_SORTED: tl.constexpr,
):
    """T columns of the nth active expert.

    experts_KR, weights_KR, rank_E: from `router.choose`. The kernel does not read rows that are not routed here.
    IS_CLAMPED: gpt-oss's SwiGLU. Gate rows of weights and biases precede up rows. IS_SORTED: activation columns are
    stored in the order of `experts_sum_mxfp4`. The first tile's item writes the expert's record.
    """
    KP: tl.constexpr = experts_KR.shape[0]
    expert = nth_expert(nth, rank_E)
    r_R = tl.arange(0, R)
    choice_R = _choice(experts_KR, expert, KP)
    is_ours_R = choice_R >= 0
    if tile == 0:
        record_ptr = routes_ptr + nth * route_words(R)
        tl.store(record_ptr + r_R, choice_R)
        weight_R = tl.sum(tl.where(experts_KR == expert, weights_KR, 0.0), axis=0)
        tl.store(record_ptr + R + r_R, weight_R.to(tl.int32, bitcast=True))
        tl.store(record_ptr + 2 * R + EXPERT, expert)
        tl.store(record_ptr + 2 * R + NUM_ACTIVE, tl.max(rank_E, axis=0))
    PART: tl.constexpr = _part(T, IS_PACKED)
    for part in range(T // PART):
        first = tile * T + part * PART
        column_T = first + tl.arange(0, PART)
        valid_T = column_T < WIDTH
        gate = expert.to(tl.int64) * (2 * WIDTH) + first
        gate_T = gate + tl.arange(0, PART)
        up_T = gate_T + WIDTH
        if IS_PACKED:
            gate_TR, up_TR = multiply_pair_mxfp4(
                scaled_ptr, BLOCK * R, r_R * BLOCK, is_ours_R, w_ptr, scales_ptr, gate, WIDTH - first, WIDTH, D, PART,
                SLICES, IS_WIDE,
            )  # fmt: skip
        else:
            gate_TR = multiply(
                scaled_ptr, BLOCK * R, r_R * BLOCK, is_ours_R, w_ptr, scales_ptr, gate, WIDTH - first, D, PART, CHUNK
            )  # fmt: skip
            up_TR = multiply(
                scaled_ptr, BLOCK * R, r_R * BLOCK, is_ours_R, w_ptr, scales_ptr, gate + WIDTH, WIDTH - first, D, PART,
                CHUNK,
            )  # fmt: skip
        rms_1R = inverse_rms(squares_ptr, is_ours_R, eps, D, R, NP)[None, :]
        gate_TR, up_TR = gate_TR * rms_1R, up_TR * rms_1R
        if HAS_BIAS:
            gate_TR += tl.load(bias_ptr + gate_T, mask=valid_T, other=0.0).to(tl.float32)[:, None]
            up_TR += tl.load(bias_ptr + up_T, mask=valid_T, other=0.0).to(tl.float32)[:, None]
        if IS_CLAMPED:
            # Comparisons keep NaN; a minimum would replace it by the limit.
            gate_TR = tl.where(gate_TR > limit, limit, gate_TR)
            up_TR = tl.where(up_TR > limit, limit, tl.where(up_TR < -limit, -limit, up_TR))
            out_TR = (up_TR + 1.0) * (gate_TR * tl.sigmoid(gate_TR * alpha))
        else:
            out_TR = gate_TR * tl.sigmoid(gate_TR) * up_TR
        at_T = sorted_column(column_T) if IS_SORTED else column_T
        at_TR = act_ptr + ((r_R * K + choice_R) * WIDTH)[None, :] + at_T[:, None]
        tl.store(at_TR, out_TR.to(act_ptr.dtype.element_ty), mask=valid_T[:, None] & is_ours_R[None, :])


@triton.jit
def expert_down_item(
    tile,
    num_experts,
    routes_ptr,
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
    """T hidden columns of the weighted sum over active experts, ascending, added in place
    (`projections.add_to_hidden`).

    num_experts: active experts; routes_ptr: their records. Biases are added after all products.
    """
    PART: tl.constexpr = _part(T, IS_PACKED)
    for part in range(T // PART):
        first = tile * T + part * PART
        if IS_PACKED:
            sum_TR = experts_sum_mxfp4(
                act_ptr, routes_ptr, num_experts, w_ptr, scales_ptr, first, D, WIDTH, K, PART, R, SLICES, IS_WIDE
            )
        else:
            sum_TR = _experts_sum(
                act_ptr, routes_ptr, num_experts, w_ptr, scales_ptr, first, D, WIDTH, K, PART, R, CHUNK
            )
        if HAS_BIAS:
            sum_TR += _biases_sum(routes_ptr, num_experts, bias_ptr, first, D, PART, R)
        add_to_hidden(sum_TR, first, hidden_ptr, norm_ptr, scaled_ptr, squares_ptr, tap_ptr, D, HAS_TAP)


@triton.jit
def _experts_sum(
    act_ptr, routes_ptr, num_experts, w_ptr, scales_ptr, first, D: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr,
    T: tl.constexpr, R: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """`matmul_mxfp4.experts_sum_mxfp4` for plain weights, with activations in column order."""
    r_R = tl.arange(0, R)
    sum_TR = tl.zeros((T, R), tl.float32)
    nth = num_experts * 0
    while tl.condition(nth < num_experts, disable_licm=True):
        expert, choice_R, weight_R = load_route(routes_ptr, nth, R)
        is_ours_R = choice_R >= 0
        x_R = (r_R * K + tl.maximum(choice_R, 0)) * WIDTH
        row = expert.to(tl.int64) * D + first
        out_TR = multiply(act_ptr, BLOCK, x_R, is_ours_R, w_ptr, scales_ptr, row, D - first, WIDTH, T, CHUNK)
        sum_TR = tl.where(is_ours_R[None, :], sum_TR + out_TR * weight_R[None, :], sum_TR)
        nth += 1
    return sum_TR


@triton.jit
def _biases_sum(
    routes_ptr, num_experts, bias_ptr, first, D: tl.constexpr, T: tl.constexpr, R: tl.constexpr
):  # fmt: skip
    """Float32 [T, R]: the weighted sum of the active experts' biases, ascending."""
    column_T = first + tl.arange(0, T)
    sum_TR = tl.zeros((T, R), tl.float32)
    nth = num_experts * 0
    while tl.condition(nth < num_experts, disable_licm=True):
        expert, choice_R, weight_R = load_route(routes_ptr, nth, R)
        bias_T = tl.load(bias_ptr + expert.to(tl.int64) * D + column_T, mask=column_T < D, other=0.0).to(tl.float32)
        sum_TR = tl.where((choice_R >= 0)[None, :], sum_TR + bias_T[:, None] * weight_R[None, :], sum_TR)
        nth += 1
    return sum_TR


@triton.jit
def load_route(routes_ptr, nth, R: tl.constexpr):
    """The nth active expert, each row's choice number for it (-1 if not routed here), and the choices' weights."""
    r_R = tl.arange(0, R)
    record_ptr = routes_ptr + nth * route_words(R)
    weight_R = tl.load(record_ptr + R + r_R).to(tl.float32, bitcast=True)
    return tl.load(record_ptr + 2 * R + EXPERT), tl.load(record_ptr + r_R), weight_R


@triton.jit
def load_num_active(routes_ptr, R: tl.constexpr):
    """The number of active experts, in a step that has rows."""
    return tl.load(routes_ptr + 2 * R + NUM_ACTIVE)


@triton.constexpr_function
def _part(tile: int, is_packed: bool) -> int:
    """Columns computed at a time, limited by registers for decoded weights and two products' sums."""
    return min(tile, PART_COLUMNS) if is_packed else tile


@triton.jit
def nth_expert(nth, rank_E):
    """The nth active expert, ascending."""
    EP: tl.constexpr = rank_E.shape[0]
    return tl.sum(tl.where(rank_E == nth + 1, tl.arange(0, EP), 0), axis=0)


@triton.jit
def _choice(experts_KR, expert, KP: tl.constexpr):
    """Each row's choice number for an expert, int32 [R], or -1."""
    return tl.max(tl.where(experts_KR == expert, tl.arange(0, KP)[:, None], -1), axis=0)
