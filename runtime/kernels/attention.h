// Attention over the key/value rings.

#pragma once

#include <algorithm>
#include <cmath>

#include "program.h"

// One query head of one row: where it reads and writes, and the positions it sees.
struct Query {
    const float* q;
    float* out;
    const float* sink;
    int lo, hi;
};

// Softmax attention of Q queries that share a key/value head of one sequence. A position that only others see is masked
// in the scores and skipped in the sum, so company changes no bit, whatever lies there.
template <int Q>
inline void attend(const Op& op, const Query* query, const float* k, const float* v, std::vector<float>& scratch) {
    const int dk = op.i[2], dv = op.i[3], num_blocks = op.i[4];
    const float scale = op.f[0];
    int lo = query[0].lo, hi = query[0].hi;
    for (int g = 1; g < Q; g++) lo = std::min(lo, query[g].lo), hi = std::max(hi, query[g].hi);
    const int first = lo / LANES, last = hi / LANES, stride = (last - first + 1) * LANES;
    if (int(scratch.size()) < Q * stride) scratch.resize(Q * stride);
    float* scores = scratch.data();
    const v16i lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    v16f peak[Q];
    for (int g = 0; g < Q; g++) peak[g] = splat(-INFINITY);
    for (int block = first; block <= last; block++) {
        const float* keys = k + int64_t(block % num_blocks) * dk * LANES;
        v16f s[Q];
        for (int g = 0; g < Q; g++) s[g] = v16f{};
        for (int d = 0; d < dk; d++) {
            v16f kd = load(keys + d * LANES);
            for (int g = 0; g < Q; g++) s[g] += kd * query[g].q[d];
        }
        const v16i position = lane + block * LANES;
        for (int g = 0; g < Q; g++) {
            v16i visible = (position >= query[g].lo) & (position <= query[g].hi);
            v16f masked = visible ? s[g] * scale : splat(-INFINITY);
            peak[g] = masked > peak[g] ? masked : peak[g];
            store(scores + g * stride + (block - first) * LANES, masked);
        }
    }
    float total[Q];
    for (int g = 0; g < Q; g++) {
        float top = query[g].sink ? *query[g].sink : -INFINITY;
        for (int l = 0; l < LANES; l++) top = std::max(top, float(peak[g][l]));
        v16f sum = v16f{};
        for (int block = first; block <= last; block++) {
            float* s = scores + g * stride + (block - first) * LANES;
            v16f masked = load(s);
            v16f e = masked == splat(-INFINITY) ? v16f{} : exp16(masked - top);
            sum += e;
            store(s, e);
        }
        total[g] = sum_lanes(sum);
        if (query[g].sink) {
            v16f sink = exp16(splat(*query[g].sink - top));
            total[g] += sink[0];
        }
    }
    for (int d = 0; d < dv; d += LANES) {
        v16f acc[Q];
        for (int g = 0; g < Q; g++) acc[g] = v16f{};
        for (int block = first; block <= last; block++) {
            const float* values = v + (int64_t(block % num_blocks) * LANES) * dv + d;
            const float* s = scores + (block - first) * LANES;
            int from[Q], to[Q];
            bool is_shared = true;
            for (int g = 0; g < Q; g++) {
                from[g] = std::max(query[g].lo - block * LANES, 0);
                to[g] = std::min(query[g].hi - block * LANES, LANES - 1);
                is_shared &= from[g] == from[0] && to[g] == to[0];
            }
            if (is_shared) {
                for (int j = from[0]; j <= to[0]; j++) {
                    v16f vj = load(values + j * dv);
                    for (int g = 0; g < Q; g++) acc[g] += vj * s[g * stride + j];
                }
            } else {
                for (int g = 0; g < Q; g++)
                    for (int j = from[g]; j <= to[g]; j++) acc[g] += load(values + j * dv) * s[g * stride + j];
            }
        }
        for (int g = 0; g < Q; g++) store(query[g].out + d, acc[g] / total[g]);
    }
}

inline void attention(const Op& op, const Rows& rows, const Worker& me) {
    const int num_heads = op.i[0], num_kv_heads = op.i[1], dk = op.i[2], dv = op.i[3], num_blocks = op.i[4],
              window = op.i[5], reach = op.i[6];
    const int group = num_heads / num_kv_heads, rows_at_once = std::max(1, ROW_BLOCK / group);
    const float *q = (const float*)op.p[0], *k_cache = (const float*)op.p[1], *v_cache = (const float*)op.p[2],
                *sinks = (const float*)op.p[3];
    float* out = (float*)op.p[4];
    // A unit of work is a key/value head of a run of rows of one sequence; units go round the threads.
    int unit = 0;
    for (int r0 = 0; r0 < rows.num_rows;) {
        int r1 = r0 + 1;
        while (r1 < rows.num_rows && r1 - r0 < rows_at_once && rows.slot[r1] == rows.slot[r0]) r1++;
        for (int kv_head = 0; kv_head < num_kv_heads; kv_head++, unit++) {
            if (unit % me.count != me.id) continue;
            const int64_t kv = int64_t(rows.slot[r0]) * num_kv_heads + kv_head;
            const float* k = k_cache + kv * num_blocks * LANES * dk;
            const float* v = v_cache + kv * num_blocks * LANES * dv;
            Query queries[ROW_BLOCK];
            int num = 0;
            auto flush = [&] {
                const Query* next = queries;
                while (num >= 8) attend<8>(op, next, k, v, me.scratch), next += 8, num -= 8;
                if (num >= 4) attend<4>(op, next, k, v, me.scratch), next += 4, num -= 4;
                if (num >= 2) attend<2>(op, next, k, v, me.scratch), next += 2, num -= 2;
                if (num >= 1) attend<1>(op, next, k, v, me.scratch), num = 0;
            };
            for (int r = r0; r < r1; r++)
                for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
                    const int lo = window > 0 ? std::max(0, rows.position[r] - window + 1) : 0;
                    const int64_t index = int64_t(r) * num_heads + head;
                    const int hi = std::min(rows.key_end[r] - 1, rows.position[r] + reach);
                    queries[num++] = {q + index * dk, out + index * dv, sinks ? sinks + head : nullptr, lo, hi};
                    if (num == ROW_BLOCK) flush();
                }
            flush();
        }
        r0 = r1;
    }
}
