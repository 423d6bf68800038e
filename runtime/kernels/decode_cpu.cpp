// Decode kernels for CPUs: a program of fused operations, run by one OpenMP team with a barrier between operations.
//
// Row invariance is built in. Every output element is one accumulation over the contraction axis in ascending order,
// one lane of a 16-wide vector; how many rows or outputs a register tile holds decides only which elements are computed
// at the same time. Attention walks keys in ascending blocks of 16 absolute positions. Nothing is split over threads
// along a reduction, so the bits do not depend on the number of threads either.
//
// GCC vector extensions instead of intrinsics: the same source becomes AVX-512, AVX2 or NEON. MXFP4 experts stay
// packed in memory (4.25 bits a weight) and are decoded in registers: one table look-up and one multiplication a weight.
//
// Left out: activations in anything but float32, and head or hidden sizes that are not multiples of 16; the Python side
// refuses those by name.
//
// Layouts. Weights [N, K] are stored as panels [N/16, K, 16]: for one k, the 16 outputs of a panel are contiguous.
// bfloat16 ones are [N/16, K/2, 16] words of two values. MXFP4 codes are [N/16, K/8, 16] words of eight codes (lowest
// nibble lowest k), scales [N/16, ceil(K/128), 16] words of four E8M0 bytes (OCP MX v1.0), one a block of 32.
// Keys are [slot, kv head, block of 16 positions, qk head dim, 16]; values [slot, kv head, position, v head dim].
// Both are rings of whole blocks: absolute block b lies at b % num_blocks.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "attention.h"
#include "experts.h"
#include "head.h"
#include "program.h"

namespace {

enum Kind : int32_t {
    EMBED = 0,
    QKV = 1,
    ATTENTION = 2,
    LINEAR = 3,
    GATE_UP = 4,
    ROUTER = 5,
    EXPERT_GATE_UP = 6,
    EXPERT_DOWN = 7,
    LM_HEAD = 8,
    ARGMAX = 9,
    MARKOV = 10,
};

// Rows of the embedding table; with a third pointer one token has that vector instead of its row.
void embed(const Op& op, const Rows& rows, const Worker& me) {
    const int D = op.i[0], replaced = op.i[1];
    const float *table = (const float*)op.p[0], *replacement = (const float*)op.p[2];
    float* h = (float*)op.p[1];
    int begin, end;
    me.slice(rows.num_rows, begin, end);
    for (int r = begin; r < end; r++) {
        const bool is_replaced = replacement && rows.token[r] == replaced;
        const float* from = is_replaced ? replacement : table + int64_t(rows.token[r]) * D;
        std::memcpy(h + int64_t(r) * D, from, sizeof(float) * D);
    }
}

// Norm, projection of query, key and value heads, QK-norm, rotary embedding, cache append. A unit of work is a head.
void qkv(const Op& op, const Rows& rows, const Worker& me) {
    const int D = op.i[0], num_heads = op.i[1], num_kv_heads = op.i[2], dk = op.i[3], dv = op.i[4], rotary = op.i[5],
              num_blocks = op.i[6];
    const float eps = op.f[0], value_scale = op.f[1];
    const float *h = (const float*)op.p[0], *norm = (const float*)op.p[1];
    float *q_out = (float*)op.p[3], *k_cache = (float*)op.p[4], *v_cache = (float*)op.p[5];
    const float *q_norm = (const float*)op.p[6], *k_norm = (const float*)op.p[7];
    const float *cos_table = (const float*)op.p[8], *sin_table = (const float*)op.p[9];
    int begin, end;
    me.slice(num_heads + 2 * num_kv_heads, begin, end);
    if (begin == end) return;
    auto first_column = [&](int head) {
        int qk = std::min(head, num_heads + num_kv_heads);
        return qk * dk + (head - qk) * dv;
    };
    const int column = first_column(begin), num_columns = first_column(end) - column;
    float* x = me.reserve(int64_t(ROW_BLOCK) * (D + num_columns));
    float* y = x + ROW_BLOCK * D;
    const Panels panels = weights_of(op, 2, D).at(column / LANES);
    for (int r0 = 0; r0 < rows.num_rows; r0 += ROW_BLOCK) {
        const int num = std::min(ROW_BLOCK, rows.num_rows - r0);
        const float* xs[ROW_BLOCK];
        float* ys[ROW_BLOCK];
        for (int r = 0; r < num; r++) {
            rms_norm(h + int64_t(r0 + r) * D, norm, D, eps, x + r * D);
            xs[r] = x + r * D;
            ys[r] = y + int64_t(r) * num_columns;
        }
        matmul(panels, num_columns / LANES, num, xs, ys);
        for (int r = 0; r < num; r++) {
            const int64_t position = rows.position[r0 + r], slot = rows.slot[r0 + r];
            const float *cosine = cos_table + position * (rotary / 2), *sine = sin_table + position * (rotary / 2);
            const int64_t block = (position / LANES) % num_blocks;
            const int lane = position % LANES;
            for (int head = begin; head < end; head++) {
                float* v = ys[r] + first_column(head) - column;
                if (head >= num_heads + num_kv_heads) {
                    const int64_t kv = slot * num_kv_heads + head - num_heads - num_kv_heads;
                    float* out = v_cache + ((kv * num_blocks + block) * LANES + lane) * dv;
                    for (int d = 0; d < dv; d++) out[d] = v[d] * value_scale;
                    continue;
                }
                const bool is_query = head < num_heads;
                const float* head_norm = is_query ? q_norm : k_norm;
                if (head_norm) rms_norm(v, head_norm, dk, eps, v);
                for (int d = 0; d < rotary / 2; d++) {
                    float a = v[d], b = v[d + rotary / 2];
                    v[d] = a * cosine[d] - b * sine[d];
                    v[d + rotary / 2] = b * cosine[d] + a * sine[d];
                }
                if (is_query) {
                    std::memcpy(q_out + (int64_t(r0 + r) * num_heads + head) * dk, v, sizeof(float) * dk);
                } else {
                    const int64_t kv = slot * num_kv_heads + head - num_heads;
                    float* out = k_cache + (kv * num_blocks + block) * dk * LANES + lane;
                    for (int d = 0; d < dk; d++) out[d * LANES] = v[d];
                }
            }
        }
    }
}

// y = W x, or y += W x, and a copy of the result where a drafter taps this layer's output
void linear(const Op& op, const Rows& rows, const Worker& me) {
    const int K = op.i[0], N = op.i[1], accumulate = op.i[2], tap_stride = op.i[3];
    const float* x = (const float*)op.p[0];
    float *y = (float*)op.p[2], *tap = (float*)op.p[3];
    int begin, end;
    me.slice(N / LANES, begin, end);
    const int width = (end - begin) * LANES;
    if (!width) return;
    float* part = me.reserve(int64_t(ROW_BLOCK) * width);
    const Panels panels = weights_of(op, 1, K).at(begin);
    for (int r0 = 0; r0 < rows.num_rows; r0 += ROW_BLOCK) {
        const int num = std::min(ROW_BLOCK, rows.num_rows - r0);
        const float* xs[ROW_BLOCK];
        float* ys[ROW_BLOCK];
        for (int r = 0; r < num; r++) xs[r] = x + int64_t(r0 + r) * K, ys[r] = part + r * width;
        matmul(panels, end - begin, num, xs, ys);
        for (int r = 0; r < num; r++) {
            float* out = y + int64_t(r0 + r) * N + begin * LANES;
            for (int n = 0; n < width; n += LANES) {
                v16f value = load(ys[r] + n);
                if (accumulate) value += load(out + n);
                store(out + n, value);
                if (tap) store(tap + int64_t(r0 + r) * tap_stride + begin * LANES + n, value);
            }
        }
    }
}

// Norm, gate and up projections of a dense SwiGLU, activation. Gate and up panels alternate.
void gate_up(const Op& op, const Rows& rows, const Worker& me) {
    const int D = op.i[0], F = op.i[1];
    const float eps = op.f[0];
    const float *h = (const float*)op.p[0], *norm = (const float*)op.p[1];
    float* out = (float*)op.p[3];
    int begin, end;
    me.slice(F / LANES, begin, end);
    const int width = 2 * (end - begin) * LANES;
    if (!width) return;
    float* x = me.reserve(int64_t(ROW_BLOCK) * (D + width));
    const Panels panels = weights_of(op, 2, D).at(2 * begin);
    for (int r0 = 0; r0 < rows.num_rows; r0 += ROW_BLOCK) {
        const int num = std::min(ROW_BLOCK, rows.num_rows - r0);
        const float* xs[ROW_BLOCK];
        float* ys[ROW_BLOCK];
        for (int r = 0; r < num; r++) {
            rms_norm(h + int64_t(r0 + r) * D, norm, D, eps, x + r * D);
            xs[r] = x + r * D, ys[r] = x + ROW_BLOCK * D + r * width;
        }
        matmul(panels, width / LANES, num, xs, ys);
        for (int r = 0; r < num; r++)
            for (int n = begin; n < end; n++) {
                const float* pair = ys[r] + 2 * (n - begin) * LANES;
                store(out + int64_t(r0 + r) * F + n * LANES, silu16(load(pair)) * load(pair + LANES));
            }
    }
}

}  // namespace

extern "C" {

// What the caller must agree with before it passes a pointer.
int speedstack_layout() { return int(sizeof(Op) * 1000 + sizeof(Rows)); }

int speedstack_run(const Op* ops, int num_ops, const Rows* rows, int num_threads) {
    int unknown = 0;
#pragma omp parallel num_threads(num_threads)
    {
        static thread_local std::vector<float> scratch;
        const Worker me{omp_get_thread_num(), omp_get_num_threads(), scratch};
        for (int n = 0; n < num_ops; n++) {
            const Op& op = ops[n];
            switch (op.kind) {
                case EMBED: embed(op, *rows, me); break;
                case QKV: qkv(op, *rows, me); break;
                case ATTENTION: attention(op, *rows, me); break;
                case LINEAR: linear(op, *rows, me); break;
                case GATE_UP: gate_up(op, *rows, me); break;
                case ROUTER: router(op, *rows, me); break;
                case EXPERT_GATE_UP: expert_gate_up(op, *rows, me); break;
                case EXPERT_DOWN: expert_down(op, *rows, me); break;
                case LM_HEAD: lm_head(op, *rows, me); break;
                case ARGMAX: argmax(op, *rows, me); break;
                case MARKOV: markov(op, *rows, me); break;
                default:
                    if (me.id == 0) unknown = n + 1;
            }
#pragma omp barrier
        }
    }
    return unknown;
}
}
