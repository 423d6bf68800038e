// Attention over the key/value rings.

#pragma once

#include <algorithm>
#include <cmath>

#include "program.h"

// Query heads that share a key/value head and are computed together, by the number of registers.
constexpr int QUERIES = W == 8 ? 4 : 8;

// One query head of one row: where it reads and writes, and the positions it sees.
struct Query {
    const float* q;
    float* out;
    const float* sink;
    int lo, hi;
};

// What of a block's positions a query sees.
struct Visible {
    int from, to;
    Visible(const Query& query, int block)
        : from(std::max(query.lo - block * LANES, 0)), to(std::min(query.hi - block * LANES, LANES - 1)) {}
};

// Independent sums that hide the latency of a multiply-add.
constexpr int CHAINS = 8;

// Scores of B blocks of 16 keys from `block` on, masked where a query does not see them; keeps the peaks.
template <int Q, int B, class T>
inline void score_blocks(const Op& op, const Query* query, const T* k, int block, float* scores, int64_t stride,
                         vf (&peak)[Q]) {
    const int dk = op.i[2], num_blocks = op.i[4];
    const T* keys[B];
    vf s[Q][B * VECTORS];
    for (int b = 0; b < B; b++) keys[b] = k + int64_t((block + b) % num_blocks) * dk * LANES;
    for (int g = 0; g < Q; g++)
        for (int n = 0; n < B * VECTORS; n++) s[g][n] = vf{};
    for (int d = 0; d < dk; d++)
        for (int n = 0; n < B * VECTORS; n++) {
            const vf kd = load_values(keys[n / VECTORS] + d * LANES + n % VECTORS * W);
            for (int g = 0; g < Q; g++) s[g][n] = mul_add(kd, splat(query[g].q[d]), s[g][n]);
        }
    const vi lane = lane_numbers();
    for (int n = 0; n < B * VECTORS; n++) {
        const vi position = lane + (block * LANES + n * W);
        for (int g = 0; g < Q; g++) {
            const vi visible = (vi)(position >= query[g].lo) & (vi)(position <= query[g].hi);
            const vf masked = visible ? s[g][n] * op.f[0] : splat(-INFINITY);
            peak[g] = masked > peak[g] ? masked : peak[g];
            store(scores + g * stride + n * W, masked);
        }
    }
}

// Sums of values by probability, of D vectors of a head from `d` on, over all blocks in ascending order of position.
template <int Q, int D, class T>
inline void histogram_values(const Op& op, const Query* query, const T* v, int first, int last, const float* scores,
                         int64_t stride, const float (&total)[Q], int d) {
    const int dv = op.i[3], num_blocks = op.i[4];
    vf acc[Q][D];
    for (int g = 0; g < Q; g++)
        for (int n = 0; n < D; n++) acc[g][n] = vf{};
    for (int block = first; block <= last; block++) {
        const T* values = v + int64_t(block % num_blocks) * LANES * dv + d;
        const float* s = scores + (block - first) * LANES;
        const Visible all(query[0], block);
        bool is_shared = true;
        for (int g = 1; g < Q; g++) {
            const Visible its(query[g], block);
            is_shared &= its.from == all.from && its.to == all.to;
        }
        if (is_shared) {
            for (int j = all.from; j <= all.to; j++)
                for (int n = 0; n < D; n++) {
                    const vf vj = load_values(values + int64_t(j) * dv + n * W);
                    for (int g = 0; g < Q; g++) acc[g][n] = mul_add(vj, splat(s[g * stride + j]), acc[g][n]);
                }
            continue;
        }
        for (int g = 0; g < Q; g++) {
            const Visible its(query[g], block);
            for (int j = its.from; j <= its.to; j++)
                for (int n = 0; n < D; n++)
                    acc[g][n] = mul_add(load_values(values + int64_t(j) * dv + n * W), splat(s[g * stride + j]), acc[g][n]);
        }
    }
    for (int g = 0; g < Q; g++)
        for (int n = 0; n < D; n++) store(query[g].out + d + n * W, acc[g][n] / total[g]);
}

// Softmax attention of Q queries that share a key/value head of one sequence. Positions that a query does not see are
// masked in the scores and skipped in the sum, so other queries change no bit.
template <int Q, class T>
void attend(const Op& op, const Query* query, const T* k, const T* v, Worker& me) {
    constexpr int B = std::max(1, CHAINS / (Q * VECTORS)), D = std::max(1, CHAINS / Q);
    const int dv = op.i[3];
    int lo = query[0].lo, hi = query[0].hi;
    for (int g = 1; g < Q; g++) lo = std::min(lo, query[g].lo), hi = std::max(hi, query[g].hi);
    const int first = lo / LANES, last = hi / LANES;
    const int64_t stride = int64_t(last - first + 1) * LANES;
    float* scores = me.reserve(Q * stride);
    vf peak[Q];
    for (int g = 0; g < Q; g++) peak[g] = splat(-INFINITY);
    int block = first;
    for (; block + B - 1 <= last; block += B)
        score_blocks<Q, B>(op, query, k, block, scores + (block - first) * LANES, stride, peak);
    for (; block <= last; block++)
        score_blocks<Q, 1>(op, query, k, block, scores + (block - first) * LANES, stride, peak);
    float total[Q];
    for (int g = 0; g < Q; g++) {
        float top = query[g].sink ? *query[g].sink : -INFINITY;
        for (int l = 0; l < W; l++) top = std::max(top, float(peak[g][l]));
        vf sum[VECTORS] = {};
        for (float* s = scores + g * stride; s < scores + (g + 1) * stride; s += LANES)
            for (int n = 0; n < VECTORS; n++) {
                const vf masked = load(s + n * W);
                const vf e = masked == splat(-INFINITY) ? vf{} : exp_lanes(masked - top);
                sum[n] += e;
                store(s + n * W, e);
            }
        total[g] = sum_panel(sum);
        if (query[g].sink) total[g] += exp_lanes(splat(*query[g].sink - top))[0];
    }
    int d = 0;
    for (; d + D * W <= dv; d += D * W) histogram_values<Q, D>(op, query, v, first, last, scores, stride, total, d);
    for (; d < dv; d += W) histogram_values<Q, 1>(op, query, v, first, last, scores, stride, total, d);
}

template <int Q, class T>
inline const Query* attend_all(const Op& op, const Query* next, int& num, const T* k, const T* v, Worker& me) {
    for (; num >= Q; num -= Q, next += Q) attend<Q>(op, next, k, v, me);
    if constexpr (Q > 1) return attend_all<Q / 2>(op, next, num, k, v, me);
    return next;
}

// Consecutive rows of one sequence that fill a tile of queries with the heads of a group.
struct RowRun {
    int begin, end;
};
inline RowRun next_run(const Op& op, const Rows& rows, int begin) {
    const int group = op.i[0] / op.i[1], most = std::max(1, 8 / group);
    int end = begin + 1;
    while (end < rows.num_rows && end - begin < most && rows.slot[end] == rows.slot[begin]) end++;
    return {begin, end};
}

inline int attention_items(const Op& op, const Rows& rows, int) {
    int num = 0;
    for (int begin = 0; begin < rows.num_rows; begin = next_run(op, rows, begin).end) num++;
    return num * op.i[1];
}

template <class T>
inline void attention_of(const Item& at) {
    const Op& op = at.op;
    const Rows& rows = at.rows;
    const int num_heads = op.i[0], num_kv_heads = op.i[1], dk = op.i[2], dv = op.i[3], num_blocks = op.i[4],
              window = op.i[5], reach = op.i[6], group = num_heads / num_kv_heads;
    const float *q = (const float*)op.p[0], *sinks = (const float*)op.p[3];
    float* out = (float*)op.p[4];
    const int kv_head = at.item % num_kv_heads;
    RowRun run = next_run(op, rows, 0);
    for (int n = at.item / num_kv_heads; n > 0; n--) run = next_run(op, rows, run.end);
    const int64_t kv = int64_t(rows.slot[run.begin]) * num_kv_heads + kv_head;
    const T *k = (const T*)op.p[1] + kv * num_blocks * LANES * dk, *v = (const T*)op.p[2] + kv * num_blocks * LANES * dv;
    Query queries[QUERIES];
    int num = 0;
    for (int r = run.begin; r < run.end; r++)
        for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
            const int lo = window > 0 ? std::max(0, rows.position[r] - window + 1) : 0;
            const int hi = std::min(rows.key_end[r] - 1, rows.position[r] + reach);
            const int64_t index = int64_t(r) * num_heads + head;
            queries[num++] = {q + index * dk, out + index * dv, sinks ? sinks + head : nullptr, lo, hi};
            if (num == QUERIES) attend_all<QUERIES>(op, queries, num, k, v, at.me);
        }
    attend_all<QUERIES>(op, queries, num, k, v, at.me);
}

// One key/value head of a run of rows; the buffers are float32, or bfloat16.
inline void attention(const Item& at) {
    if (at.op.i[7])
        attention_of<uint16_t>(at);
    else
        attention_of<float>(at);
}
