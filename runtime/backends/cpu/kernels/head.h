// From hidden states to tokens: LM head, a drafter's Markov correction, the largest logit.

#pragma once

#include <algorithm>
#include <cmath>

#include "program.h"

inline Columns lm_head_columns(const Op& op, int num_threads) {
    return {op.i[1] / LANES, weights_of(op, 2, op.i[0]).panel_bytes(), num_threads};  // V is padded to whole panels
}
inline int lm_head_items(const Op& op, const Rows& rows, int num_threads) {
    return rows.num_logit_rows ? lm_head_columns(op, num_threads).num_items() : 0;
}

// Final norm and LM head, for the rows whose logits are wanted.
inline void lm_head(const Item& at) {
    const Op& op = at.op;
    const int D = op.i[0], V = op.i[1], num = at.rows.num_logit_rows;
    const Columns columns = lm_head_columns(op, at.me.num_threads);
    const int begin = columns.begin(at.item), end = columns.end(at.item);
    const float* x =
        at.me.normed(at.number, num, D, (const float*)op.p[0], at.rows.logit_row, (const float*)op.p[1], op.f[0]);
    const float* xs[MAX_STEP_ROWS];
    float* ys[MAX_STEP_ROWS];
    for (int r = 0; r < num; r++)
        xs[r] = x + int64_t(r) * D, ys[r] = (float*)op.p[3] + int64_t(r) * V + begin * LANES;
    matmul(weights_of(op, 2, D).at(begin), end - begin, num, xs, ys);
}

inline int argmax_items(const Op& op, const Rows& rows, int) { return rows.num_logit_rows / op.i[3]; }

// Index of the largest logit of a wanted row, of every `step`th from `first` on; ties to the lower index, -1 where a
// logit is NaN. With a third pointer also the softmax probability of that index.
inline void argmax(const Item& at) {
    const Op& op = at.op;
    const int V = op.i[0], stride = op.i[1], first = op.i[2], step = op.i[3], r = first + at.item * step;
    const float* row = (const float*)op.p[0] + int64_t(r) * stride;
    int32_t* out = (int32_t*)op.p[1];
    float* probability = (float*)op.p[2];
    const vi lane = lane_numbers();
    vf peak = splat(-INFINITY);
    vi where = vi{}, nan_logits = vi{};
    for (int n = 0; n < V; n += W) {
        const vf x = load(row + n);
        nan_logits |= (vi)(x != x);
        const vi better = (vi)(x > peak) & (vi)(lane + n < V);
        peak = better ? x : peak;
        where = better ? lane + n : where;
    }
    int best = 0, num_bad = 0;
    for (int l = 0; l < W; l++) {
        num_bad += nan_logits[l] != 0;
        if (peak[l] > peak[best] || (peak[l] == peak[best] && where[l] < where[best])) best = l;
    }
    out[r] = num_bad || peak[best] == -INFINITY ? -1 : where[best];
    if (!probability) return;
    vf total[VECTORS] = {};
    for (int n = 0; n < V; n += LANES)
        for (int v = 0; v < VECTORS; v++) {
            const vf e = exp_lanes(load(row + n + v * W) - peak[best]);
            total[v] += (vi)(lane + (n + v * W) < V) ? e : vf{};
        }
    probability[r] = 1.0f / sum_panel(total);
}

inline Columns markov_columns(const Op& op, int num_threads) {
    return {op.i[1] / LANES, weights_of(op, 1, op.i[0]).panel_bytes(), num_threads};
}
inline int markov_items(const Op& op, const Rows&, int num_threads) {
    return markov_columns(op, num_threads).num_items();
}

// Logits of one proposal per block, corrected by the token before it: logits += W2 W1[previous] (a Markov head). A
// block has `step` wanted rows, this one at `depth`. The previous token is the anchor, or the best of the row before,
// which `argmax` has found. A row after one without a best token is not read and stays as it is.
inline void markov(const Item& at) {
    const Op& op = at.op;
    const Rows& rows = at.rows;
    const int rank = op.i[0], U = op.i[1], depth = op.i[2], step = op.i[3], first_slot = op.i[4];
    const float* w1 = (const float*)op.p[0];
    float* logits = (float*)op.p[2];
    const int32_t *best = (const int32_t*)op.p[3], *target_ids = (const int32_t*)op.p[4];
    const Columns columns = markov_columns(op, at.me.num_threads);
    const int begin = columns.begin(at.item), end = columns.end(at.item), width = (end - begin) * LANES;
    const int num_blocks = rows.num_logit_rows / step;
    float* part = at.me.reserve(int64_t(num_blocks) * width);
    const float* xs[MAX_STEP_ROWS];
    float *ys[MAX_STEP_ROWS], *out[MAX_STEP_ROWS];
    int num = 0;
    for (int block = 0; block < num_blocks; block++) {
        const int row = block * step + depth;
        int previous;
        if (depth == 0) {
            previous = rows.token[rows.logit_row[row] - first_slot];
        } else {
            previous = best[row - 1];
            if (previous < 0) continue;
            if (target_ids) previous = target_ids[previous];
        }
        xs[num] = w1 + int64_t(previous) * rank;
        ys[num] = part + int64_t(num) * width;
        out[num++] = logits + int64_t(row) * U + begin * LANES;
    }
    matmul(weights_of(op, 1, rank).at(begin), end - begin, num, xs, ys);
    for (int r = 0; r < num; r++)
        for (int n = 0; n < width; n += W) store(out[r] + n, load(out[r] + n) + load(ys[r] + n));
}
