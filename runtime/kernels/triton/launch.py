"""One kernel an op: each program computes the item of its number on the phase's axes. For the `graph` backend.

With IS_DEPENDENT a kernel is launched while the one before it still runs (programmatic dependent launch), and waits
before it touches memory. Every program of every kernel waits, so that a kernel that has begun to work knows that all
before it are done, not only the last.

Kernels of the `down` phases of dense layers and of `o_proj` are one.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from speedstack.runtime.kernels.triton.attention import attention_item, combine_item
from speedstack.runtime.kernels.triton.embed import embed_item
from speedstack.runtime.kernels.triton.experts import expert_down_item, expert_gate_up_item
from speedstack.runtime.kernels.triton.head import lm_head_item, sample_item
from speedstack.runtime.kernels.triton.projections import dense_gate_up_item, project_item, qkv_item
from speedstack.runtime.kernels.triton.router import router_item


@triton.jit
def _begin(IS_DEPENDENT: tl.constexpr):
    if IS_DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def embed_kernel(
    rows_ptr,
    embedding_ptr,
    hidden_ptr,
    D: tl.constexpr,
    R: tl.constexpr,
    CHUNK: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    _begin(IS_DEPENDENT)
    embed_item(
        tl.program_id(0), rows_ptr, embedding_ptr, hidden_ptr, D, R, CHUNK,
    )  # fmt: skip


@triton.jit
def qkv_kernel(
    hidden_ptr,
    norm_ptr,
    w_ptr,
    bias_ptr,
    qkv_ptr,
    eps,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    _begin(IS_DEPENDENT)
    qkv_item(
        tl.program_id(0), tl.program_id(1), hidden_ptr, norm_ptr, w_ptr, bias_ptr, qkv_ptr, eps, COLUMNS, D, R, T,
        CHUNK, HAS_BIAS,
    )  # fmt: skip


@triton.jit
def attention_kernel(
    rows_ptr,
    qkv_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    cache_ptr,
    partial_ptr,
    eps,
    value_scale,
    softmax_scale,
    num_slots,
    M: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    V: tl.constexpr,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
    R: tl.constexpr,
    RING: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    HP: tl.constexpr,
    VP: tl.constexpr,
    MP: tl.constexpr,
    QUERIES: tl.constexpr,
    C: tl.constexpr,
    HAS_QK_NORM: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    _begin(IS_DEPENDENT)
    attention_item(
        tl.program_id(0), tl.program_id(1), tl.program_id(2), rows_ptr, qkv_ptr, q_norm_ptr, k_norm_ptr, cos_ptr,
        sin_ptr, cache_ptr, partial_ptr, eps, value_scale, softmax_scale, num_slots, M, G, H, V, HALF, COLUMNS, R,
        RING, WINDOW, SPLIT, SPLITS, HP, VP, MP, QUERIES, C, HAS_QK_NORM,
    )  # fmt: skip


@triton.jit
def combine_kernel(
    rows_ptr,
    sinks_ptr,
    partial_ptr,
    attended_ptr,
    N: tl.constexpr,
    V: tl.constexpr,
    VP: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    S: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    _begin(IS_DEPENDENT)
    combine_item(
        tl.program_id(0), tl.program_id(1), rows_ptr, sinks_ptr, partial_ptr, attended_ptr, N, V, VP, WINDOW, SPLIT,
        SPLITS, S, HAS_SINKS,
    )  # fmt: skip


@triton.jit
def project_kernel(
    x_ptr,
    x_step,
    x_row_step,
    w_ptr,
    bias_ptr,
    hidden_ptr,
    K: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    _begin(IS_DEPENDENT)
    project_item(
        tl.program_id(0), x_ptr, x_step, x_row_step, w_ptr, bias_ptr, hidden_ptr, K, D, R, T, CHUNK, HAS_BIAS,
    )  # fmt: skip


@triton.jit
def router_kernel(
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
    IS_DEPENDENT: tl.constexpr,
):
    _begin(IS_DEPENDENT)
    router_item(
        tl.program_id(0), hidden_ptr, norm_ptr, w_ptr, bias_ptr, logits_ptr, eps, E, D, R, T, CHUNK, HAS_BIAS,
    )  # fmt: skip


@triton.jit
def expert_gate_up_kernel(
    rows_ptr,
    hidden_ptr,
    norm_ptr,
    logits_ptr,
    correction_ptr,
    w_ptr,
    scales_ptr,
    bias_ptr,
    act_ptr,
    eps,
    routed_scale,
    limit,
    alpha,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    EP: tl.constexpr,
    KP: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
    IS_SIGMOID: tl.constexpr,
    HAS_CORRECTION: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    IS_PACKED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_CLAMPED: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    _begin(IS_DEPENDENT)
    expert_gate_up_item(
        tl.program_id(0), tl.program_id(1), rows_ptr, hidden_ptr, norm_ptr, logits_ptr, correction_ptr, w_ptr,
        scales_ptr, bias_ptr, act_ptr, eps, routed_scale, limit, alpha, WIDTH, D, E, K, EP, KP, R, T, CHUNK,
        IS_SIGMOID, HAS_CORRECTION, RENORMALIZE, IS_PACKED, HAS_BIAS, IS_CLAMPED,
    )  # fmt: skip


@triton.jit
def expert_down_kernel(
    rows_ptr,
    logits_ptr,
    correction_ptr,
    act_ptr,
    w_ptr,
    scales_ptr,
    bias_ptr,
    hidden_ptr,
    routed_scale,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    EP: tl.constexpr,
    KP: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
    IS_SIGMOID: tl.constexpr,
    HAS_CORRECTION: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    IS_PACKED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    _begin(IS_DEPENDENT)
    expert_down_item(
        tl.program_id(0), rows_ptr, logits_ptr, correction_ptr, act_ptr, w_ptr, scales_ptr, bias_ptr, hidden_ptr,
        routed_scale, WIDTH, D, E, K, EP, KP, R, T, CHUNK, IS_SIGMOID, HAS_CORRECTION, RENORMALIZE, IS_PACKED,
        HAS_BIAS,
    )  # fmt: skip


@triton.jit
def dense_gate_up_kernel(
    hidden_ptr,
    norm_ptr,
    w_ptr,
    act_ptr,
    eps,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    _begin(IS_DEPENDENT)
    dense_gate_up_item(
        tl.program_id(0), hidden_ptr, norm_ptr, w_ptr, act_ptr, eps, WIDTH, D, R, T, CHUNK,
    )  # fmt: skip


@triton.jit
def lm_head_kernel(
    hidden_ptr,
    norm_ptr,
    w_ptr,
    logits_ptr,
    best_ptr,
    eps,
    VOCAB: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    _begin(IS_DEPENDENT)
    lm_head_item(
        tl.program_id(0), hidden_ptr, norm_ptr, w_ptr, logits_ptr, best_ptr, eps, VOCAB, D, R, T, CHUNK,
    )  # fmt: skip


@triton.jit
def sample_kernel(
    rows_ptr,
    sampling_ptr,
    logits_ptr,
    best_ptr,
    token_ptr,
    VOCAB: tl.constexpr,
    TILES: tl.constexpr,
    TP: tl.constexpr,
    R: tl.constexpr,
    BLOCKS: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    _begin(IS_DEPENDENT)
    sample_item(
        tl.program_id(0), rows_ptr, sampling_ptr, logits_ptr, best_ptr, token_ptr, VOCAB, TILES, TP, R, BLOCKS,
    )  # fmt: skip
