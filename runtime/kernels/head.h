// From hidden states to tokens: LM head, a drafter's Markov correction, the largest logit.

#pragma once

#include <algorithm>
#include <cmath>

#include "program.h"

// Final norm and LM head, for the rows whose logits are wanted.
inline void lm_head(const Op& op, const Rows& rows, const Worker& me) {
    const int D = op.i[0], V = op.i[1];  // V is padded to whole panels
    const float eps = op.f[0];
    const float *h = (const float*)op.p[0], *norm = (const float*)op.p[1];
    float* logits = (float*)op.p[3];
    int begin, end;
    me.slice(V / LANES, begin, end);
    float* x = me.reserve(int64_t(ROW_BLOCK) * D);
    for (int r0 = 0; r0 < rows.num_logit_rows; r0 += ROW_BLOCK) {
        const int num = std::min(ROW_BLOCK, rows.num_logit_rows - r0);
        const float* xs[ROW_BLOCK];
        float* ys[ROW_BLOCK];
        for (int r = 0; r < num; r++) {
            rms_norm(h + int64_t(rows.logit_row[r0 + r]) * D, norm, D, eps, x + r * D);
            xs[r] = x + r * D, ys[r] = logits + int64_t(r0 + r) * V + begin * LANES;
        }
        matmul(weights_of(op, 2, D).at(begin), end - begin, num, xs, ys);
    }
}

// Index of the largest logit of every wanted row, or of every `step`th from `first` on; ties to the lower index, -1
// where a logit is not a number. With a third pointer also the softmax probability of that index.
inline void argmax(const Op& op, const Rows& rows, const Worker& me) {
    const int V = op.i[0], stride = op.i[1], first = op.i[2], step = op.i[3];
    const float* logits = (const float*)op.p[0];
    int32_t* out = (int32_t*)op.p[1];
    float* probability = (float*)op.p[2];
    const v16i lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    int begin, end;
    me.slice(rows.num_logit_rows / step, begin, end);
    for (int r = first + begin * step; r < first + end * step; r += step) {
        const float* row = logits + int64_t(r) * stride;
        v16f peak = splat(-INFINITY);
        v16i where = v16i{}, not_numbers = v16i{};
        for (int n = 0; n < V; n += LANES) {
            v16f x = load(row + n);
            not_numbers |= x != x;
            v16i better = (x > peak) & (lane + n < V);
            peak = better ? x : peak;
            where = better ? lane + n : where;
        }
        int best = 0, num_bad = 0;
        for (int l = 0; l < LANES; l++) {
            num_bad += not_numbers[l] != 0;
            if (peak[l] > peak[best] || (peak[l] == peak[best] && where[l] < where[best])) best = l;
        }
        out[r] = num_bad || peak[best] == -INFINITY ? -1 : where[best];
        if (!probability) continue;
        v16f total = v16f{};
        for (int n = 0; n < V; n += LANES) total += lane + n < V ? exp16(load(row + n) - peak[best]) : v16f{};
        probability[r] = 1.0f / sum_lanes(total);
    }
}

// Logits of one proposal a drafted block, corrected by the token before it: logits += W2 W1[previous] (a Markov head).
// A block has `step` wanted rows and this is the one at `depth`; the token before the first is the block's anchor, and
// before any other the best of the row before, which `argmax` has found by now. A row after one that has no best token
// is left as it is: nobody reads it.
inline void markov(const Op& op, const Rows& rows, const Worker& me) {
    const int rank = op.i[0], U = op.i[1], depth = op.i[2], step = op.i[3], first_slot = op.i[4];
    const float* w1 = (const float*)op.p[0];
    float* logits = (float*)op.p[2];
    const int32_t *best = (const int32_t*)op.p[3], *target_ids = (const int32_t*)op.p[4];
    int begin, end;
    me.slice(U / LANES, begin, end);
    const int width = (end - begin) * LANES, num_blocks = rows.num_logit_rows / step;
    if (!width) return;
    float* part = me.reserve(int64_t(ROW_BLOCK) * width);
    const Panels panels = weights_of(op, 1, rank).at(begin);
    for (int block = 0; block < num_blocks;) {
        const float* xs[ROW_BLOCK];
        float *ys[ROW_BLOCK], *out[ROW_BLOCK];
        int num = 0;
        for (; num < ROW_BLOCK && block < num_blocks; block++) {
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
            ys[num] = part + num * width;
            out[num++] = logits + int64_t(row) * U + begin * LANES;
        }
        if (num) matmul(panels, end - begin, num, xs, ys);
        for (int r = 0; r < num; r++)
            for (int n = 0; n < width; n += LANES) store(out[r] + n, load(out[r] + n) + load(ys[r] + n));
    }
}
