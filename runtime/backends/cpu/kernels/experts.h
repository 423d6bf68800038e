// The Mixture-of-Experts block: router logits, the choice of experts, their projections, the weighted sum.

#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "program.h"

inline Columns router_columns(const Op& op, int num_threads) {
    return {num_blocks_of(op.i[1], LANES), weights_of(op, 2, op.i[0]).panel_bytes(), num_threads};
}
inline int router_items(const Op& op, const Rows&, int num_threads) {
    return router_columns(op, num_threads).num_items();
}

// Norm and router logits (and bias), rows of whole panels.
inline void router(const Item& at) {
    const Op& op = at.op;
    const int D = op.i[0], E = op.i[1], num_rows = at.rows.num_rows, padded = num_blocks_of(E, LANES) * LANES;
    const float* bias = (const float*)op.p[4];
    float* logits = (float*)op.p[3];
    const Columns columns = router_columns(op, at.me.num_threads);
    const int begin = columns.begin(at.item), end = columns.end(at.item);
    const float* x = at.me.normed(at.number, num_rows, D, (const float*)op.p[0], nullptr, (const float*)op.p[1], op.f[0]);
    const float* xs[MAX_STEP_ROWS];
    float* ys[MAX_STEP_ROWS];
    for (int r = 0; r < num_rows; r++)
        xs[r] = x + int64_t(r) * D, ys[r] = logits + int64_t(r) * padded + begin * LANES;
    matmul(weights_of(op, 2, D).at(begin), end - begin, num_rows, xs, ys);
    if (bias)
        for (int r = 0; r < num_rows; r++)
            for (int e = begin * LANES; e < std::min(E, end * LANES); e++) ys[r][e - begin * LANES] += bias[e];
}

inline int choose_items(const Op&, const Rows& rows, int) { return rows.num_rows; }

// One row's scores and its experts, in descending order of choice, ties to the lower index.
inline void choose(const Item& at) {
    const Op& op = at.op;
    const int E = op.i[0], top_k = op.i[1], is_softmax = op.i[2], renormalize = op.i[3], r = at.item;
    const int padded = num_blocks_of(E, LANES) * LANES;
    const float *logits = (const float*)op.p[0] + int64_t(r) * padded, *bias = (const float*)op.p[1];
    int32_t* experts = (int32_t*)op.p[2] + int64_t(r) * top_k;
    float* weights = (float*)op.p[3] + int64_t(r) * top_k;
    float* score = at.me.reserve(2 * padded);
    float* choice = score + padded;
    float top = -INFINITY, total = 0;
    for (int e = 0; e < E; e++) top = std::max(top, logits[e]);
    for (int e = 0; e < padded; e += W) {
        const vf s = load(logits + e);
        store(score + e, is_softmax ? exp_lanes(s - top) : 1.0f / (1.0f + exp_lanes(-s)));
    }
    if (is_softmax) {
        for (int e = 0; e < E; e++) total += score[e];
        for (int e = 0; e < E; e++) score[e] /= total;
    }
    // NaN comes last. Taken experts sort below all numbers, so that none is taken twice.
    for (int e = 0; e < E; e++) {
        const float value = bias ? score[e] + bias[e] : score[e];
        choice[e] = value > -FLT_MAX ? value : -FLT_MAX;
    }
    float sum = 0;
    for (int k = 0; k < top_k; k++) {
        int best = 0;
        for (int e = 1; e < E; e++)
            if (choice[e] > choice[best]) best = e;
        experts[k] = best;
        weights[k] = score[best];
        choice[best] = -INFINITY;
        sum += score[best];
    }
    for (int k = 0; k < top_k; k++) {
        if (renormalize) weights[k] /= sum + 1e-20f;
        weights[k] *= op.f[0];
    }
}

// The (row, choice) pairs of a step sorted by expert, made by each thread for itself.
struct Groups {
    int num_used;
    const int32_t *expert, *begin, *pair;  // of used expert i: pairs begin[i] to begin[i + 1]

    Groups(Worker& me, int number, const int32_t* experts, int num_pairs, int num_experts) {
        if (int(me.lists.size()) < 1 + 3 * num_experts + num_pairs + 1)
            me.lists.resize(1 + 3 * num_experts + num_pairs + 1);
        int32_t *used = me.lists.data() + 1, *begins = used + num_experts, *next = begins + num_experts + 1,
                *pairs = next + num_experts;
        if (me.lists_for != number) {
            std::fill(next, next + num_experts, 0);
            for (int pair = 0; pair < num_pairs; pair++) next[experts[pair]]++;
            int num = 0, sum = 0;
            for (int e = 0; e < num_experts; e++) {
                const int count = next[e];
                next[e] = sum;
                if (count) used[num] = e, begins[num++] = sum;
                sum += count;
            }
            begins[num] = sum;
            for (int pair = 0; pair < num_pairs; pair++) pairs[next[experts[pair]]++] = pair;
            me.lists[0] = num;
            me.lists_for = number;
        }
        num_used = me.lists[0], expert = used, begin = begins, pair = pairs;
    }
};

inline Panels expert_panels(const Op& op, int K, int N, int expert, int first_panel) {
    return weights_of(op, 2, K).at(int64_t(expert) * (N / LANES) + first_panel);
}

inline Columns expert_columns(const Op& op, int num_threads) {
    return {2 * op.i[1] / LANES, weights_of(op, 2, op.i[0]).panel_bytes(), num_threads};
}
// The used experts are known only at run time; items of unused ones are empty.
inline int expert_gate_up_items(const Op& op, const Rows& rows, int num_threads) {
    return std::min(op.i[2], rows.num_rows * op.i[3]) * expert_columns(op, num_threads).num_items();
}

// clamp(up, -limit, limit) + 1, times gate * sigmoid(alpha * gate) of gate <= limit: gpt-oss' SwiGLU.
inline vf clamped_swiglu(vf gate, vf up, float limit, float alpha) {
    const vf most = splat(limit), least = splat(-limit);
    gate = gate > most ? most : gate;
    up = up > most ? most : up < least ? least : up;
    return (up + 1.0f) * (gate * (1.0f / (1.0f + exp_lanes(-(gate * alpha)))));
}

// Some columns of one expert's gate and up projections, for all rows routed to it. Gate and up panels alternate.
inline void expert_gate_up(const Item& at) {
    const Op& op = at.op;
    const int D = op.i[0], I = op.i[1], E = op.i[2], top_k = op.i[3], is_clamped = op.i[4];
    const int num_rows = at.rows.num_rows;
    const Groups groups(at.me, at.number, (const int32_t*)op.p[3], num_rows * top_k, E);
    const Columns columns = expert_columns(op, at.me.num_threads);
    const int group = at.item / columns.num_items(), chunk = at.item % columns.num_items();
    if (group >= groups.num_used) return;
    const int begin = columns.begin(chunk), end = columns.end(chunk), width = (end - begin) * LANES;
    const int expert = groups.expert[group], num = groups.begin[group + 1] - groups.begin[group];
    const int32_t* pairs = groups.pair + groups.begin[group];
    const float* x = at.me.normed(at.number, num_rows, D, (const float*)op.p[0], nullptr, (const float*)op.p[1], op.f[0]);
    const float* bias = op.p[5] ? (const float*)op.p[5] + int64_t(expert) * 2 * I : nullptr;  // gate, then up
    float *out = (float*)op.p[4], *part = at.me.reserve(int64_t(num) * width);
    const float* xs[MAX_STEP_ROWS];
    float* ys[MAX_STEP_ROWS];
    for (int j = 0; j < num; j++) xs[j] = x + int64_t(pairs[j] / top_k) * D, ys[j] = part + int64_t(j) * width;
    matmul(expert_panels(op, D, 2 * I, expert, begin), end - begin, num, xs, ys);
    for (int j = 0; j < num; j++)
        for (int n = 0; n < width / 2; n += W) {
            const int column = begin / 2 * LANES + n;
            const float* panels = ys[j] + n / LANES * 2 * LANES + n % LANES;
            vf gate = load(panels), up = load(panels + LANES);
            if (bias) gate += load(bias + column), up += load(bias + I + column);
            store(out + int64_t(pairs[j]) * I + column,
                  is_clamped ? clamped_swiglu(gate, up, op.f[1], op.f[2]) : silu(gate) * up);
        }
}

inline Columns expert_down_columns(const Op& op, const Rows& rows, int num_threads) {
    const int64_t used = std::min(op.i[2], rows.num_rows * op.i[3]);
    return {op.i[1] / LANES, used * weights_of(op, 2, op.i[0]).panel_bytes(), num_threads};
}
inline int expert_down_items(const Op& op, const Rows& rows, int num_threads) {
    return expert_down_columns(op, rows, num_threads).num_items();
}

// Some columns of all down projections of a step, then h += the sum over a row's choices, in the router's order.
inline void expert_down(const Item& at) {
    const Op& op = at.op;
    const int I = op.i[0], D = op.i[1], E = op.i[2], top_k = op.i[3], tap_stride = op.i[4];
    const int num_rows = at.rows.num_rows;
    const int32_t* experts = (const int32_t*)op.p[3];
    const float *x = (const float*)op.p[0], *weights = (const float*)op.p[4], *bias = (const float*)op.p[6];
    float *h = (float*)op.p[1], *tap = (float*)op.p[5];
    const Groups groups(at.me, at.number, experts, num_rows * top_k, E);
    const Columns columns = expert_down_columns(op, at.rows, at.me.num_threads);
    const int begin = columns.begin(at.item), end = columns.end(at.item), width = (end - begin) * LANES;
    float* part = at.me.reserve(int64_t(num_rows) * top_k * width);
    for (int group = 0; group < groups.num_used; group++) {
        const int32_t* pairs = groups.pair + groups.begin[group];
        const int num = groups.begin[group + 1] - groups.begin[group];
        const float* xs[MAX_STEP_ROWS];
        float* ys[MAX_STEP_ROWS];
        for (int j = 0; j < num; j++)
            xs[j] = x + int64_t(pairs[j]) * I, ys[j] = part + int64_t(pairs[j]) * width;
        matmul(expert_panels(op, I, D, groups.expert[group], begin), end - begin, num, xs, ys);
    }
    for (int r = 0; r < num_rows; r++) {
        float* out = h + int64_t(r) * D + begin * LANES;
        for (int n = 0; n < width; n += W) {
            vf sum = vf{};
            for (int k = 0; k < top_k; k++) {
                const int64_t pair = int64_t(r) * top_k + k;
                vf y = load(part + pair * width + n);
                if (bias) y += load(bias + int64_t(experts[pair]) * D + begin * LANES + n);
                sum = mul_add(y, splat(weights[pair]), sum);
            }
            sum += load(out + n);
            store(out + n, sum);
            if (tap) store(tap + int64_t(r) * tap_stride + begin * LANES + n, sum);
        }
    }
}
