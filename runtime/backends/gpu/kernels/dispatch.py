"""Runs any item of any phase: maps a phase's constants and pointers to its device function, for all GPU backends.

The constants (`bindings.layers.Constants`) hold op, axes and sizes, and all choices are made at compile time. Pointers
are a tuple in the order written here; FP8 scales come last and are absent if FP8_ROWS is 0.
"""

import triton
import triton.language as tl

from speedstack.runtime.backends.gpu.kernels.layers.attention import attention_item, combine_item
from speedstack.runtime.backends.gpu.kernels.layers.dflash import (
    append_item,
    block_row,
    context_item,
    fuse_item,
    pick_item,
)
from speedstack.runtime.backends.gpu.kernels.layers.embed import embed_item
from speedstack.runtime.backends.gpu.kernels.layers.experts import (
    expert_down_item,
    expert_gate_up_item,
    load_num_active,
)
from speedstack.runtime.backends.gpu.kernels.layers.lm_head import lm_head_item
from speedstack.runtime.backends.gpu.kernels.layers.projections import dense_gate_up_item, project_item, qkv_item
from speedstack.runtime.backends.gpu.kernels.layers.router import choose, router_item
from speedstack.runtime.backends.gpu.kernels.rounds.logit_histogram import empty_bins, histogram_item
from speedstack.runtime.backends.gpu.kernels.rounds.ngram_draft import draft_item
from speedstack.runtime.backends.gpu.kernels.rounds.row_allocation import allocate_row, end_of_live
from speedstack.runtime.backends.gpu.kernels.rounds.sample import sample_item
from speedstack.runtime.backends.gpu.kernels.rounds.verify_drafts import accept_item
from speedstack.runtime.backends.gpu.kernels.rows import (
    NUM_ROWS,
    TOKEN,
    field,
    has_rows,
    has_topk_or_topp,
    is_drawn,
    is_used,
)


@triton.jit
def begin_phase(p, PHASE: tl.constexpr):
    """The size of the first axis in this step, and values shared by the phase's items.

    Shared: experts [KP, R], weights [KP, R] and ranks [EP] (`router.choose`); the number of active experts; for
    `lm_head`, the number of rows with a temperature; or nothing.
    """
    num_first = PHASE.axes[0]
    shared = ()
    if PHASE.op == "draft":
        num_first, _ = end_of_live(p[0], PHASE.R)
    elif PHASE.op == "combine" or PHASE.op == "sample":
        r_R = tl.arange(0, PHASE.R)
        num_first = tl.max(tl.where(field(p[0], r_R, TOKEN) >= 0, r_R + 1, 0), axis=0)
    elif PHASE.op == "logit_histogram":
        r_R = tl.arange(0, PHASE.R)
        num_first = tl.max(tl.where(has_topk_or_topp(p[0], p[1], r_R, PHASE.VOCAB), r_R + 1, 0), axis=0)
    elif PHASE.op == "attention" or PHASE.op == "append":
        r_R = tl.arange(0, PHASE.R)
        # A sequence without rows leaves a gap.
        num_first = tl.max(tl.where(field(p[0], r_R, NUM_ROWS) > 0, r_R + 1, 0), axis=0)
    elif PHASE.IS_DRAFT:
        num_first = tl.where(has_rows(p[0], PHASE.R), PHASE.axes[0], 0)
        shared = (num_first * 0,)  # type: ignore[assignment]  # proposals are the most probable tokens
    elif PHASE.op == "expert_gate_up":
        shared = choose_experts(p, PHASE)
        num_first = tl.max(shared[2], axis=0)
    elif PHASE.op == "expert_down":
        # Without rows, no earlier item has written the number of experts.
        shared = (tl.where(has_rows(p[0], PHASE.R), load_num_active(p[12], PHASE.R), 0),)  # type: ignore[assignment]
    elif PHASE.op == "lm_head":
        is_drawn_R = is_used(p[0], PHASE.R) & is_drawn(p[6], tl.arange(0, PHASE.R))
        shared = (tl.sum(is_drawn_R.to(tl.int32), axis=0),)  # type: ignore[assignment]
    return num_first, shared


@triton.jit
def choose_experts(p, PHASE: tl.constexpr):
    """The rows' experts, for a phase whose pointers begin with the router's."""
    return choose(
        p[0], p[1], p[2], PHASE.routed_scale, PHASE.E, PHASE.R, PHASE.K, PHASE.EP, PHASE.KP,
        PHASE.IS_SIGMOID, PHASE.HAS_CORRECTION, PHASE.RENORMALIZE,
    )  # fmt: skip


@triton.jit
def coordinates(item, PHASE: tl.constexpr):
    """An item's coordinates along the axes, 0 for missing axes."""
    i, j, k = item, item * 0, item * 0
    if len(PHASE.axes) == 2:
        i, j = item // PHASE.axes[1], item % PHASE.axes[1]
    elif len(PHASE.axes) == 3:
        i = item // (PHASE.axes[1] * PHASE.axes[2])
        j, k = item // PHASE.axes[2] % PHASE.axes[1], item % PHASE.axes[2]
    return i, j, k


@triton.jit
def run_item(i, j, k, local_step, shared, p, PHASE: tl.constexpr):
    """Runs the item at (i, j, k) of the phase's axes. local_step: step within this launch."""
    scales = p[len(p) - 1]
    if PHASE.op == "embed":
        # sequences, draws, proposals, rows, sampling, embedding, hidden, norm, scaled, squares, bins
        empty_bins(i, p[10])
        token = allocate_row(i, p[0], p[1], p[2], p[3], p[4], PHASE.R, PHASE.HAS_PROPOSALS)
        embed_item(i, token, p[5], p[6], p[7], p[8], p[9], p[5], PHASE.D, PHASE.R, PHASE.NP, -1)
    elif PHASE.op == "qkv":  # rows, scaled, squares, weight, bias, qkv
        qkv_item(
            i, j, p[0], p[1], p[2], p[3], p[4], p[5], scales, PHASE.eps, PHASE.COLUMNS, PHASE.D, PHASE.R, PHASE.NP,
            PHASE.T, PHASE.CHUNK, PHASE.HAS_BIAS, PHASE.FP8_ROWS,
        )  # fmt: skip
    elif PHASE.op == "attention":  # rows, qkv, query norm, key norm, cosines, sines, cache, partial
        attention_item(
            i, j, k, p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], PHASE.eps, PHASE.value_scale,
            PHASE.softmax_scale, PHASE.num_slots, PHASE.M, PHASE.G, PHASE.H, PHASE.V, PHASE.HALF, PHASE.COLUMNS,
            PHASE.R, PHASE.RING, PHASE.WINDOW, PHASE.SPLIT, PHASE.SPLITS, PHASE.HP, PHASE.VP, PHASE.MP, PHASE.QUERIES,
            PHASE.C, PHASE.HAS_QK_NORM, PHASE.AHEAD,
        )  # fmt: skip
    elif PHASE.op == "combine":  # rows, sinks, partial, attended
        combine_item(
            i, j, p[0], p[1], p[2], p[3], PHASE.N, PHASE.V, PHASE.VP, PHASE.WINDOW, PHASE.SPLIT, PHASE.SPLITS, PHASE.S,
            PHASE.HAS_SINKS, PHASE.R, PHASE.AHEAD,
        )  # fmt: skip
    elif PHASE.op == "o_proj" or PHASE.op == "dense_down":
        # rows, x, weight, bias, hidden, norm, scaled, squares, tap
        project_item(
            i, p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], scales, PHASE.x_step, PHASE.x_row_step, PHASE.K,
            PHASE.D, PHASE.R, PHASE.T, PHASE.CHUNK, PHASE.HAS_BIAS, PHASE.HAS_TAP, PHASE.FP8_ROWS,
        )  # fmt: skip
    elif PHASE.op == "dense_gate_up":  # rows, scaled, squares, weight, act
        dense_gate_up_item(
            i, p[0], p[1], p[2], p[3], p[4], scales, PHASE.eps, PHASE.WIDTH, PHASE.D, PHASE.R, PHASE.NP, PHASE.T,
            PHASE.CHUNK, PHASE.FP8_ROWS,
        )  # fmt: skip
    elif PHASE.op == "router":  # rows, scaled, squares, weight, bias, logits
        router_item(
            i, p[0], p[1], p[2], p[3], p[4], p[5], PHASE.eps, PHASE.E, PHASE.D, PHASE.R, PHASE.NP, PHASE.T, PHASE.LONG,
            PHASE.HAS_BIAS,
        )  # fmt: skip
    elif PHASE.op == "expert_gate_up":
        # rows, logits, correction, codes, scales, bias, scaled, squares, act, routes
        expert_gate_up_item(
            i, j, shared[0], shared[1], shared[2], p[6], p[7], p[3], p[4], p[5], p[8], p[9], PHASE.eps, PHASE.limit,
            PHASE.alpha, PHASE.WIDTH, PHASE.D, PHASE.K, PHASE.R, PHASE.NP, PHASE.T, PHASE.CHUNK, PHASE.IS_PACKED,
            PHASE.SLICES, PHASE.IS_WIDE, PHASE.HAS_BIAS, PHASE.IS_CLAMPED, PHASE.IS_SORTED,
        )  # fmt: skip
    elif PHASE.op == "expert_down":
        # rows, logits, correction, codes, scales, bias, act, hidden, norm, scaled, squares, tap, routes
        expert_down_item(
            i, shared[0], p[12], p[6], p[3], p[4], p[5], p[7], p[8], p[9], p[10], p[11], PHASE.WIDTH, PHASE.D,
            PHASE.K, PHASE.R, PHASE.T, PHASE.CHUNK, PHASE.IS_PACKED, PHASE.SLICES, PHASE.IS_WIDE,
            PHASE.HAS_BIAS, PHASE.HAS_TAP,
        )  # fmt: skip
    elif PHASE.op == "lm_head":  # rows, scaled, squares, weight, logits, best, sampling, peaks
        lm_head_item(
            i, p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], scales, shared[0], PHASE.eps, PHASE.VOCAB, PHASE.D,
            PHASE.R, PHASE.NP, PHASE.T, PHASE.CHUNK, PHASE.FP8_ROWS, PHASE.HAS_LOGITS,
        )  # fmt: skip
    elif PHASE.op == "logit_histogram":  # rows, sampling, logits, peaks, bins, chains
        histogram_item(
            i, j, p[0], p[1], p[2], p[3], p[4], p[5], PHASE.VOCAB, PHASE.TILES, PHASE.SLICE, PHASE.SLICES, PHASE.R,
            PHASE.C,
        )  # fmt: skip
    elif PHASE.op == "sample":  # rows, sampling, logits, best, peaks, bins, chains, notes, reports
        sample_item(
            i, p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8] + local_step * PHASE.REPORT, PHASE.VOCAB,
            PHASE.TILES, PHASE.TILE, PHASE.SLICE, PHASE.SLICES, PHASE.SP, PHASE.R, PHASE.C,
        )  # fmt: skip
    elif PHASE.op == "accept":  # rows, sequences, reports, end-of-sequence tokens, history, proposals
        chosen_ptr = p[2] + local_step * PHASE.REPORT
        accept_item(
            i, p[0], p[1], chosen_ptr, chosen_ptr + PHASE.R, p[3], p[4], p[5], PHASE.R, PHASE.LP, PHASE.STRIDE,
            PHASE.HAS_HISTORY, PHASE.HAS_PROPOSALS,
        )  # fmt: skip
    elif PHASE.op == "draft":  # sequences, history, proposals
        draft_item(i, p[0], p[1], p[2], PHASE.R, PHASE.STRIDE, PHASE.BLOCK)
    elif PHASE.op == "block":  # sequences, blocks, embedding, hidden, norm, scaled, squares, embedding of the mask
        token = block_row(i, p[0], p[1], PHASE.R, PHASE.MASK, PHASE.FIRST_SLOT)
        own_mask: tl.constexpr = PHASE.MASK if PHASE.HAS_MASK else -1
        embed_item(i, token, p[2], p[3], p[4], p[5], p[6], p[7], PHASE.D, PHASE.R, PHASE.NP, own_mask)
    elif PHASE.op == "pick":  # blocks, best, proposals
        pick_item(i, p[0], p[1], p[2], PHASE.TILES, PHASE.R, PHASE.TILES_AT_A_TIME, PHASE.FIRST_SLOT)
    elif PHASE.op == "fuse":  # rows, features, weight, norm, context, squares
        fuse_item(
            i, p[0], p[1], p[2], p[3], p[4], p[5], PHASE.TAPS, PHASE.TAP_STEP, PHASE.D, PHASE.R, PHASE.T, PHASE.CHUNK
        )
    elif PHASE.op == "context":  # rows, context, squares, weight, keys and values
        context_item(
            i, j, p[0], p[1], p[2], p[3], p[4], PHASE.eps, PHASE.FIRST, PHASE.COLUMNS, PHASE.WIDTH, PHASE.D, PHASE.R,
            PHASE.NP, PHASE.T, PHASE.axes[1], PHASE.CHUNK,
        )  # fmt: skip
    elif PHASE.op == "append":  # rows, keys and values, key norms, cosines, sines, cache
        append_item(
            i, j, p[0], p[1], p[2], p[3], p[4], p[5], PHASE.eps, PHASE.value_scale, PHASE.num_slots, PHASE.G, PHASE.H,
            PHASE.V, PHASE.HALF, PHASE.COLUMNS, PHASE.R, PHASE.RING, PHASE.HP, PHASE.VP,
        )  # fmt: skip
    else:
        tl.static_assert(False, "no device function for this op")
