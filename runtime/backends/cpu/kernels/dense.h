// Embedding, projections and the dense SwiGLU.

#pragma once

#include <algorithm>

#include "program.h"

constexpr int EMBED_ROWS = 16;

inline int embed_items(const Op&, const Rows& rows, int) { return num_blocks_of(rows.num_rows, EMBED_ROWS); }

// Rows of the embedding table, float32 or bfloat16; with a third pointer one token has that vector instead of its row.
inline void embed(const Item& at) {
    const Op& op = at.op;
    const int D = op.i[0], replaced = op.i[1], is_bfloat16 = op.i[2];
    const float* replacement = (const float*)op.p[2];
    float* h = (float*)op.p[1];
    const int end = std::min(at.rows.num_rows, (at.item + 1) * EMBED_ROWS);
    for (int r = at.item * EMBED_ROWS; r < end; r++) {
        float* out = h + int64_t(r) * D;
        const int64_t row = int64_t(at.rows.token[r]) * D;
        if (replacement && at.rows.token[r] == replaced) {
            std::memcpy(out, replacement, sizeof(float) * D);
        } else if (is_bfloat16) {
            const uint16_t* from = (const uint16_t*)op.p[0] + row;
            for (int d = 0; d < D; d++) {
                const uint32_t bits = uint32_t(from[d]) << 16;
                std::memcpy(out + d, &bits, 4);
            }
        } else {
            std::memcpy(out, (const float*)op.p[0] + row, sizeof(float) * D);
        }
    }
}

inline int qkv_items(const Op& op, const Rows&, int) { return op.i[1] + 2 * op.i[2]; }

template <class T>
inline void qkv_of(const Item& at) {
    const Op& op = at.op;
    const Rows& rows = at.rows;
    const int D = op.i[0], num_heads = op.i[1], num_kv_heads = op.i[2], dk = op.i[3], dv = op.i[4], rotary = op.i[5],
              num_blocks = op.i[6];
    const float eps = op.f[0], value_scale = op.f[1];
    const int head = at.item, num_qk = num_heads + num_kv_heads;
    const bool is_query = head < num_heads, is_value = head >= num_qk;
    const int column = std::min(head, num_qk) * dk + std::max(head - num_qk, 0) * dv, width = is_value ? dv : dk;
    const float* x = at.me.normed(at.number, rows.num_rows, D, (const float*)op.p[0], nullptr, (const float*)op.p[1], eps);
    float* y = at.me.reserve(int64_t(rows.num_rows) * width);
    const float* xs[MAX_STEP_ROWS];
    float* ys[MAX_STEP_ROWS];
    for (int r = 0; r < rows.num_rows; r++) xs[r] = x + int64_t(r) * D, ys[r] = y + int64_t(r) * width;
    matmul(weights_of(op, 2, D).at(column / LANES), width / LANES, rows.num_rows, xs, ys);
    const float *bias = (const float*)op.p[10], *head_norm = (const float*)op.p[is_query ? 6 : 7];
    for (int r = 0; r < rows.num_rows; r++) {
        float* v = ys[r];
        if (bias)
            for (int d = 0; d < width; d += W) store(v + d, load(v + d) + load(bias + column + d));
        const int64_t position = rows.position[r], slot = rows.slot[r], block = (position / LANES) % num_blocks;
        const int lane = position % LANES;
        if (is_value) {
            const int64_t kv = slot * num_kv_heads + head - num_qk;
            T* out = (T*)op.p[5] + ((kv * num_blocks + block) * LANES + lane) * dv;
            for (int d = 0; d < dv; d++) store_value(out + d, v[d] * value_scale);
            continue;
        }
        if (head_norm) rms_norm(v, head_norm, dk, eps, v);
        const float *cosine = (const float*)op.p[8] + position * (rotary / 2),
                    *sine = (const float*)op.p[9] + position * (rotary / 2);
        for (int d = 0; d < rotary / 2; d++) {
            const float a = v[d], b = v[d + rotary / 2];
            v[d] = a * cosine[d] - b * sine[d];
            v[d + rotary / 2] = b * cosine[d] + a * sine[d];
        }
        if (is_query) {
            std::memcpy((float*)op.p[3] + (int64_t(r) * num_heads + head) * dk, v, sizeof(float) * dk);
        } else {
            const int64_t kv = slot * num_kv_heads + head - num_heads;
            T* out = (T*)op.p[4] + (kv * num_blocks + block) * dk * LANES + lane;
            for (int d = 0; d < dk; d++) store_value(out + d * LANES, v[d]);
        }
    }
}

// Norm, projection (and bias), QK-norm, rotary embedding and cache append of one query, key or value head; the buffers
// are float32, or bfloat16.
inline void qkv(const Item& at) {
    if (at.op.i[7])
        qkv_of<uint16_t>(at);
    else
        qkv_of<float>(at);
}

inline Columns linear_columns(const Op& op, int num_threads) {
    return {op.i[1] / LANES, weights_of(op, 1, op.i[0]).panel_bytes(), num_threads};
}
inline int linear_items(const Op& op, const Rows&, int num_threads) {
    return linear_columns(op, num_threads).num_items();
}

// y = W x (+ bias), or y += W x (+ bias), and a copy of the result where a drafter taps this layer's output.
inline void linear(const Item& at) {
    const Op& op = at.op;
    const int K = op.i[0], N = op.i[1], accumulate = op.i[2], tap_stride = op.i[3], num_rows = at.rows.num_rows;
    const float *x = (const float*)op.p[0], *bias = (const float*)op.p[4];
    float *y = (float*)op.p[2], *tap = (float*)op.p[3];
    const Columns columns = linear_columns(op, at.me.num_threads);
    const int begin = columns.begin(at.item), end = columns.end(at.item), width = (end - begin) * LANES;
    float* part = at.me.reserve(int64_t(num_rows) * width);
    const float* xs[MAX_STEP_ROWS];
    float* ys[MAX_STEP_ROWS];
    for (int r = 0; r < num_rows; r++) xs[r] = x + int64_t(r) * K, ys[r] = part + int64_t(r) * width;
    matmul(weights_of(op, 1, K).at(begin), end - begin, num_rows, xs, ys);
    for (int r = 0; r < num_rows; r++) {
        float* out = y + int64_t(r) * N + begin * LANES;
        for (int n = 0; n < width; n += W) {
            vf value = load(ys[r] + n);
            if (bias) value += load(bias + begin * LANES + n);
            if (accumulate) value += load(out + n);
            store(out + n, value);
            if (tap) store(tap + int64_t(r) * tap_stride + begin * LANES + n, value);
        }
    }
}

inline Columns gate_up_columns(const Op& op, int num_threads) {
    return {2 * op.i[1] / LANES, weights_of(op, 2, op.i[0]).panel_bytes(), num_threads};
}
inline int gate_up_items(const Op& op, const Rows&, int num_threads) {
    return gate_up_columns(op, num_threads).num_items();
}

// Norm, gate and up projections of a dense SwiGLU, activation. Gate and up panels alternate.
inline void gate_up(const Item& at) {
    const Op& op = at.op;
    const int D = op.i[0], F = op.i[1], num_rows = at.rows.num_rows;
    float* out = (float*)op.p[3];
    const Columns columns = gate_up_columns(op, at.me.num_threads);
    const int begin = columns.begin(at.item), end = columns.end(at.item), width = (end - begin) * LANES;
    const float* x = at.me.normed(at.number, num_rows, D, (const float*)op.p[0], nullptr, (const float*)op.p[1], op.f[0]);
    float* part = at.me.reserve(int64_t(num_rows) * width);
    const float* xs[MAX_STEP_ROWS];
    float* ys[MAX_STEP_ROWS];
    for (int r = 0; r < num_rows; r++) xs[r] = x + int64_t(r) * D, ys[r] = part + int64_t(r) * width;
    matmul(weights_of(op, 2, D).at(begin), end - begin, num_rows, xs, ys);
    for (int r = 0; r < num_rows; r++)
        for (int pair = 0; pair < (end - begin) / 2; pair++)
            for (int v = 0; v < LANES; v += W) {
                const float* gate = ys[r] + 2 * pair * LANES + v;
                store(out + int64_t(r) * F + (begin / 2 + pair) * LANES + v, silu(load(gate)) * load(gate + LANES));
            }
}
