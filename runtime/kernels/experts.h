// The Mixture-of-Experts block: router, expert projections, weighted sum.

#pragma once

#include <algorithm>
#include <cmath>

#include "program.h"

// Norm, router logits, scores, top-k. Experts come out in descending order of choice, ties to the lower index.
inline void router(const Op& op, const Rows& rows, const Worker& me) {
    const int D = op.i[0], E = op.i[1], top_k = op.i[2], is_softmax = op.i[3], renormalize = op.i[4];
    const float eps = op.f[0], routed_scale = op.f[1];
    const float *h = (const float*)op.p[0], *norm = (const float*)op.p[1], *bias = (const float*)op.p[3];
    float *normed = (float*)op.p[4], *weights = (float*)op.p[6];
    int32_t* experts = (int32_t*)op.p[5];
    const int padded = (E + LANES - 1) / LANES * LANES;
    float* score = me.reserve(2 * padded);
    float* choice = score + padded;
    int begin, end;
    me.slice(rows.num_rows, begin, end);
    for (int r = begin; r < end; r++) {
        float* x = normed + int64_t(r) * D;
        rms_norm(h + int64_t(r) * D, norm, D, eps, x);
        const float* xs[1] = {x};
        float* ys[1] = {score};
        matmul(weights_of(op, 2, D), padded / LANES, 1, xs, ys);
        float top = -INFINITY, total = 0;
        for (int e = 0; e < E; e++) top = std::max(top, score[e]);
        for (int e = 0; e < padded; e += LANES) {
            v16f s = load(score + e);
            store(score + e, is_softmax ? exp16(s - top) : 1.0f / (1.0f + exp16(-s)));
        }
        if (is_softmax) {
            for (int e = 0; e < E; e++) total += score[e];
            for (int e = 0; e < E; e++) score[e] /= total;
        }
        for (int e = 0; e < E; e++) choice[e] = bias ? score[e] + bias[e] : score[e];
        float sum = 0;
        for (int k = 0; k < top_k; k++) {
            int best = 0;
            for (int e = 1; e < E; e++)
                if (choice[e] > choice[best]) best = e;
            experts[int64_t(r) * top_k + k] = best;
            weights[int64_t(r) * top_k + k] = score[best];
            choice[best] = -INFINITY;
            sum += score[best];
        }
        for (int k = 0; k < top_k; k++) {
            float& weight = weights[int64_t(r) * top_k + k];
            if (renormalize) weight /= sum + 1e-20f;
            weight *= routed_scale;
        }
    }
}

// Calls body(expert, pairs, number of pairs) for every expert in use, at most ROW_BLOCK (row, choice) pairs at a time.
template <class Body>
inline void for_each_expert(const int32_t* experts, int num_pairs, int num_experts, const Body& body) {
    for (int expert = 0; expert < num_experts; expert++) {
        int pairs[ROW_BLOCK], num = 0;
        for (int pair = 0; pair < num_pairs; pair++) {
            if (experts[pair] != expert) continue;
            pairs[num++] = pair;
            if (num == ROW_BLOCK) body(expert, pairs, num), num = 0;
        }
        if (num) body(expert, pairs, num);
    }
}

inline Panels expert_panels(const Op& op, int K, int N, int expert, int first_panel) {
    return weights_of(op, 2, K).at(int64_t(expert) * (N / LANES) + first_panel);
}

inline void expert_gate_up(const Op& op, const Rows& rows, const Worker& me) {
    const int D = op.i[0], I = op.i[1], E = op.i[2], top_k = op.i[3];
    const float* x = (const float*)op.p[0];
    float* out = (float*)op.p[1];
    int begin, end;
    me.slice(I / LANES, begin, end);
    const int width = 2 * (end - begin) * LANES;
    if (!width) return;
    float* part = me.reserve(int64_t(ROW_BLOCK) * width);
    for_each_expert((const int32_t*)op.p[3], rows.num_rows * top_k, E, [&](int expert, const int* pairs, int num) {
        const float* xs[ROW_BLOCK];
        float* ys[ROW_BLOCK];
        for (int j = 0; j < num; j++) xs[j] = x + int64_t(pairs[j] / top_k) * D, ys[j] = part + j * width;
        matmul(expert_panels(op, D, 2 * I, expert, 2 * begin), width / LANES, num, xs, ys);
        for (int j = 0; j < num; j++)
            for (int n = begin; n < end; n++) {
                const float* pair = ys[j] + 2 * (n - begin) * LANES;
                store(out + int64_t(pairs[j]) * I + n * LANES, silu16(load(pair)) * load(pair + LANES));
            }
    });
}

// Down projection of every (row, choice) pair, then h += sum over choices, in the router's order.
inline void expert_down(const Op& op, const Rows& rows, const Worker& me) {
    const int I = op.i[0], D = op.i[1], E = op.i[2], top_k = op.i[3], tap_stride = op.i[4];
    const float *x = (const float*)op.p[0], *weights = (const float*)op.p[4];
    float *h = (float*)op.p[1], *tap = (float*)op.p[5];
    int begin, end;
    me.slice(D / LANES, begin, end);
    const int width = (end - begin) * LANES;
    if (!width) return;
    float* part = me.reserve(int64_t(rows.num_rows) * top_k * width);
    for_each_expert((const int32_t*)op.p[3], rows.num_rows * top_k, E, [&](int expert, const int* pairs, int num) {
        const float* xs[ROW_BLOCK];
        float* ys[ROW_BLOCK];
        for (int j = 0; j < num; j++) xs[j] = x + int64_t(pairs[j]) * I, ys[j] = part + int64_t(pairs[j]) * width;
        matmul(expert_panels(op, I, D, expert, begin), end - begin, num, xs, ys);
    });
    for (int r = 0; r < rows.num_rows; r++) {
        float* out = h + int64_t(r) * D + begin * LANES;
        for (int n = 0; n < width; n += LANES) {
            v16f sum = v16f{};
            for (int k = 0; k < top_k; k++)
                sum += load(part + (int64_t(r) * top_k + k) * width + n) * weights[r * top_k + k];
            sum += load(out + n);
            store(out + n, sum);
            if (tap) store(tap + int64_t(r) * tap_stride + begin * LANES + n, sum);
        }
    }
}
