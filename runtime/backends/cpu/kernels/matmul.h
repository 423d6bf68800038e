// Matrix products: rows of float32 activations by panels of weights.
//
// Every output element is one accumulation over the contraction axis in ascending order, in one vector lane. MXFP4 and
// INT8 accumulate per block of 32, then scale and add: as exact as scaling the weights, with one multiplication less
// per weight. Both ways below give the same bits, whatever else is computed.
//
// "Fused": values are decoded into registers and used at once, for as many rows as registers hold sums; further rows
// decode again. "Staged", for expensive decoding and few registers: a block is decoded into the L1 cache and multiplied
// by all rows.

#pragma once

#include <algorithm>

#include "weights.h"

constexpr int MAX_STEP_ROWS = 64;

// Measured by numbers of rows on AVX2 and AVX-512; NEON has 32 registers of four lanes.
constexpr int STAGED_ROWS = 6;
constexpr bool is_staged(int format, int rows) { return has_scales(format) && W < 16 && rows > 3; }

constexpr int fused_rows(int format) { return W == 16 ? 8 : has_scales(format) ? 3 : 4; }

// Panels of a fused tile: enough accumulators to hide a multiply-add's latency, and one stream per panel for the
// hardware prefetchers; a single panel is prefetched explicitly. With scales, blocks are independent sums already.
constexpr int fused_panels(int format, int rows) {
    if (W == 16) return has_scales(format) ? 1 : rows == 1 ? 8 : rows <= 4 ? 4 : 2;
    if (has_scales(format)) return rows == 1 ? 4 : 2;
    return rows == 1 ? 4 : 1;
}

// How far ahead of what is read.
constexpr int PREFETCH_BYTES = 2048;

// acc[r][v] += w[v] * x[r][k]: one load of an activation serves all vectors.
template <int R, int N>
inline __attribute__((always_inline)) void add_products(const vf (&w)[N], const float* const* x, int k, vf (&acc)[R][N]) {
    for (int r = 0; r < R; r++) {
        const vf xk = splat(x[r][k]);
        for (int v = 0; v < N; v++) acc[r][v] = mul_add(w[v], xk, acc[r][v]);
    }
}

template <int R, int P>
inline void fused_float32(const Panels& w, const float* const* x, vf (&acc)[R][P * VECTORS]) {
    const int64_t stride = w.panel_bytes();
    for (int k = 0; k < w.K; k++) {
        vf wk[P * VECTORS];
        if (P == 1) __builtin_prefetch(w.data + int64_t(k) * CHUNK_BYTES + PREFETCH_BYTES);
        for (int v = 0; v < P * VECTORS; v++)
            wk[v] = load((const float*)(w.data + v / VECTORS * stride + int64_t(k) * CHUNK_BYTES) + v % VECTORS * W);
        add_products(wk, x, k, acc);
    }
}

template <int R, int P>
inline void fused_bfloat16(const Panels& w, const float* const* x, vf (&acc)[R][P * VECTORS]) {
    const int64_t stride = w.panel_bytes();
    for (int k = 0; k < w.K; k += 2) {
        vi word[P * VECTORS];
        vf value[P * VECTORS];
        if (P == 1) __builtin_prefetch(w.data + int64_t(k / 2) * CHUNK_BYTES + PREFETCH_BYTES);
        for (int v = 0; v < P * VECTORS; v++) {
            word[v] = load_words(w.data + v / VECTORS * stride + int64_t(k / 2) * CHUNK_BYTES + v % VECTORS * W * 4);
            value[v] = (vf)(word[v] << 16);
        }
        add_products(value, x, k, acc);
        for (int v = 0; v < P * VECTORS; v++) value[v] = (vf)(word[v] & int32_t(0xFFFF0000));
        add_products(value, x, k + 1, acc);
    }
}

template <int FORMAT, int R, int P>
inline void fused_blocks(const Panels& w, const float* const* x, vf (&acc)[R][P * VECTORS]) {
    const int64_t stride = w.panel_bytes();
    for (int block = 0; block < w.K / BLOCK; block++) {
        vf sum[R][P * VECTORS], scale[P * VECTORS];
        for (int v = 0; v < P * VECTORS; v++) {
            for (int r = 0; r < R; r++) sum[r][v] = sums_blocks(FORMAT) ? vf{} : acc[r][v];
            if constexpr (!sums_blocks(FORMAT))
                scale[v] = block_scale<FORMAT>(w.data + v / VECTORS * stride, block, v % VECTORS);
        }
        const uint8_t* codes = block_codes<FORMAT>(w.data, block);
#pragma GCC unroll 1
        for (int k = 0; k < BLOCK; k += decoded_k(FORMAT)) {
            const int at = block * BLOCK + k;
            for (int p = 0; p < P; p++)
                __builtin_prefetch(codes + p * stride + k / chunk_k(FORMAT) * CHUNK_BYTES + PREFETCH_BYTES);
            for (int v = 0; v < P * VECTORS; v++)
                decode<FORMAT>(codes + v / VECTORS * stride, k, v % VECTORS, scale[v], [&](int j, vf wk) {
                    for (int r = 0; r < R; r++) sum[r][v] = mul_add(wk, splat(x[r][at + j]), sum[r][v]);
                });
        }
        for (int v = 0; v < P * VECTORS; v++) {
            // Read here: with few registers nothing but the sums is held over a block.
            if constexpr (sums_blocks(FORMAT))
                scale[v] = block_scale<FORMAT>(w.data + v / VECTORS * stride, block, v % VECTORS);
            for (int r = 0; r < R; r++)
                acc[r][v] = sums_blocks(FORMAT) ? mul_add(sum[r][v], scale[v], acc[r][v]) : sum[r][v];
        }
    }
}

template <int FORMAT, int R, int P>
inline void fused_tile(const Panels& w, const float* const* x, float* const* y, int column) {
    vf acc[R][P * VECTORS];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < P * VECTORS; v++) acc[r][v] = vf{};
    if constexpr (FORMAT == FLOAT32)
        fused_float32<R, P>(w, x, acc);
    else if constexpr (FORMAT == BFLOAT16)
        fused_bfloat16<R, P>(w, x, acc);
    else
        fused_blocks<FORMAT, R, P>(w, x, acc);
    for (int r = 0; r < R; r++)
        for (int v = 0; v < P * VECTORS; v++) store(y[r] + column + v * W, acc[r][v]);
}

template <int FORMAT, int R>
void fused(const Panels& w, int num_panels, const float* const* x, float* const* y) {
    constexpr int P = fused_panels(FORMAT, R);
    int panel = 0;
    for (; panel + P <= num_panels; panel += P) fused_tile<FORMAT, R, P>(w.at(panel), x, y, panel * LANES);
    for (; panel < num_panels; panel++) fused_tile<FORMAT, R, 1>(w.at(panel), x, y, panel * LANES);
}

template <int FORMAT, int R>
inline void fused_remainder(const Panels& w, int num_panels, int num_rows, const float* const* x, float* const* y) {
    if (num_rows == R) return fused<FORMAT, R>(w, num_panels, x, y);
    if constexpr (R > 1) fused_remainder<FORMAT, R - 1>(w, num_panels, num_rows, x, y);
}

// y[r] (+)= sum over a block of w[k] x[r][k], of R rows and a panel whose values are float32 [k][16]; with `scale` where
// the format sums blocks.
template <int FORMAT, int R>
inline void staged_tile(const float* w, const vf (&scale)[VECTORS], int block, const float* const* x, float* const* y,
                        int column) {
    vf sum[R][VECTORS];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < VECTORS; v++)
            sum[r][v] = sums_blocks(FORMAT) || !block ? vf{} : load(y[r] + column + v * W);
    for (int k = 0; k < BLOCK; k++) {
        vf wk[VECTORS];
        for (int v = 0; v < VECTORS; v++) wk[v] = load(w + k * LANES + v * W);
        add_products(wk, x, block * BLOCK + k, sum);
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < VECTORS; v++) {
            float* out = y[r] + column + v * W;
            store(out, sums_blocks(FORMAT) ? mul_add(sum[r][v], scale[v], block ? load(out) : vf{}) : sum[r][v]);
        }
}

template <int FORMAT, int R>
inline void staged_rows(int num_rows, const float* w, const vf (&scale)[VECTORS], int block, const float* const* x,
                        float* const* y, int column) {
    for (; num_rows >= R; num_rows -= R, x += R, y += R) staged_tile<FORMAT, R>(w, scale, block, x, y, column);
    if constexpr (R > 1)
        if (num_rows) staged_rows<FORMAT, R - 1>(num_rows, w, scale, block, x, y, column);
}

template <int FORMAT>
void staged_panel(const Panels& w, int num_rows, const float* const* x, float* const* y, int column) {
    alignas(64) float values[BLOCK * LANES];
    for (int block = 0; block < w.K / BLOCK; block++) {
        const uint8_t* codes = block_codes<FORMAT>(w.data, block);
        vf scale[VECTORS];
        for (int v = 0; v < VECTORS; v++) scale[v] = block_scale<FORMAT>(w.data, block, v);
        for (int k = 0; k < BLOCK; k += decoded_k(FORMAT))
            for (int v = 0; v < VECTORS; v++)
                decode<FORMAT>(codes, k, v, scale[v],
                               [&](int j, vf wk) { store(values + (k + j) * LANES + v * W, wk); });
        staged_rows<FORMAT, STAGED_ROWS>(num_rows, values, scale, block, x, y, column);
    }
}

template <int FORMAT>
inline void matmul_as(const Panels& w, int num_panels, int num_rows, const float* const* x, float* const* y) {
    if constexpr (is_staged(FORMAT, MAX_STEP_ROWS))
        if (is_staged(FORMAT, num_rows)) {
            for (int panel = 0; panel < num_panels; panel++)
                staged_panel<FORMAT>(w.at(panel), num_rows, x, y, panel * LANES);
            return;
        }
    constexpr int R = fused_rows(FORMAT);
    for (; num_rows > R; num_rows -= R, x += R, y += R) fused<FORMAT, R>(w, num_panels, x, y);
    fused_remainder<FORMAT, R>(w, num_panels, num_rows, x, y);
}

// y[r][0 : 16 * num_panels] = W x[r]
inline void matmul(const Panels& w, int num_panels, int num_rows, const float* const* x, float* const* y) {
    switch (w.format) {
        case FLOAT32: return matmul_as<FLOAT32>(w, num_panels, num_rows, x, y);
        case BFLOAT16: return matmul_as<BFLOAT16>(w, num_panels, num_rows, x, y);
        case MXFP4: return matmul_as<MXFP4>(w, num_panels, num_rows, x, y);
        case INT8: return matmul_as<INT8>(w, num_panels, num_rows, x, y);
        default: return matmul_as<FP8>(w, num_panels, num_rows, x, y);
    }
}
