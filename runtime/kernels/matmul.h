// Matrix products: rows of float32 activations by panels of weights.
//
// Every output element is one accumulation over the contraction axis in ascending order, in one lane of a vector. With
// MXFP4 and INT8 it is one accumulation a block of 32, whose sum is scaled and added: as exact as scaling the
// weights, and a multiplication less a weight. Whichever of the two ways below computes an
// element, and beside whichever others, its bits are the same.
//
// A few rows: values are decoded into registers and used at once ("fused"). Many: a block of a panel or two is decoded
// into the first-level cache and multiplied by all rows from there ("staged").

#pragma once

#include <algorithm>

#include "weights.h"

constexpr int MAX_STEP_ROWS = 64;

// Rows that are computed at once, chosen by the number of vector registers: 32, 16 or 32 narrow ones. With AVX-512
// decoding is two instructions, and doing it again for every eight rows is faster than going through the cache.
#if ISA_AVX512
constexpr int FUSED_ROWS = 8, STAGED_PANELS = 2, STAGED_ROWS = 12;
constexpr bool STAGES_SCALED = false;
#else
constexpr int FUSED_ROWS = 4, STAGED_PANELS = 1, STAGED_ROWS = 6;
constexpr bool STAGES_SCALED = true;
#endif

// Panels of a fused tile: accumulators that hide the latency of a multiply-add. One panel is read in one stream, which
// prefetchers like best, and where there are scales its blocks are independent sums already.
constexpr int fused_panels(int format, int rows) {
    if (W == 16) return has_scales(format) ? 1 : rows == 1 ? 8 : rows <= 4 ? 4 : 2;
    if (has_scales(format)) return rows == 1 ? 4 : rows <= 3 ? 2 : 1;
    return rows == 1 ? 4 : rows == 2 ? 2 : 1;
}

// Bytes ahead of the codes that are read that are asked for.
constexpr int PREFETCH_BYTES = 1024;

template <int R, int P>
inline void fused_float32(const Panels& w, const float* const* x, vf (&acc)[R][P * VECTORS]) {
    const int64_t stride = w.panel_bytes();
    for (int k = 0; k < w.K; k++) {
        for (int v = 0; v < P * VECTORS; v++) {
            const vf wk =
                load((const float*)(w.data + v / VECTORS * stride + int64_t(k) * CHUNK_BYTES) + v % VECTORS * W);
            for (int r = 0; r < R; r++) acc[r][v] = mul_add(wk, splat(x[r][k]), acc[r][v]);
        }
    }
}

template <int R, int P>
inline void fused_bfloat16(const Panels& w, const float* const* x, vf (&acc)[R][P * VECTORS]) {
    const int64_t stride = w.panel_bytes();
    for (int k = 0; k < w.K; k += 2) {
        for (int v = 0; v < P * VECTORS; v++) {
            const uint8_t* chunk = w.data + v / VECTORS * stride + int64_t(k / 2) * CHUNK_BYTES;
            const vi word = load_words(chunk + v % VECTORS * W * 4);
            const vf even = (vf)(word << 16), odd = (vf)(word & int32_t(0xFFFF0000));
            for (int r = 0; r < R; r++) acc[r][v] = mul_add(even, splat(x[r][k]), acc[r][v]);
            for (int r = 0; r < R; r++) acc[r][v] = mul_add(odd, splat(x[r][k + 1]), acc[r][v]);
        }
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

template <int FORMAT, int R = FUSED_ROWS>
inline void fused_rows(const Panels& w, int num_panels, int num_rows, const float* const* x, float* const* y) {
    if (num_rows == R) return fused<FORMAT, R>(w, num_panels, x, y);
    if constexpr (R > 1) fused_rows<FORMAT, R - 1>(w, num_panels, num_rows, x, y);
}

// Values of k from `first` to `end` of a panel as float32 [k][16]; where there are scales, of a block. Those of formats
// that sum blocks are left out.
template <int FORMAT>
inline void decode_panel(const Panels& w, int first, int end, float* out) {
    if constexpr (FORMAT == BFLOAT16) {
        for (int k = first; k < end; k += 2, out += 2 * LANES)
            for (int v = 0; v < VECTORS; v++) {
                const vi word = load_words(w.data + int64_t(k / 2) * CHUNK_BYTES + v * W * 4);
                store(out + v * W, (vf)(word << 16));
                store(out + LANES + v * W, (vf)(word & int32_t(0xFFFF0000)));
            }
    } else {
        const uint8_t* codes = block_codes<FORMAT>(w.data, first / BLOCK);
        vf scale[VECTORS];
        for (int v = 0; v < VECTORS; v++) scale[v] = block_scale<FORMAT>(w.data, first / BLOCK, v);
        for (int k = 0; k < BLOCK; k += decoded_k(FORMAT))
            for (int v = 0; v < VECTORS; v++)
                decode<FORMAT>(codes, k, v, scale[v], [&](int j, vf wk) { store(out + (k + j) * LANES + v * W, wk); });
    }
}

// y[r] (+)= scale * sum over k of w[k] x[r][k], of R rows and P panels whose values are float32 [k][16].
// `is_first`: y holds nothing yet. Without scales the sum goes on from y.
template <int R, int P, bool IS_SCALED>
inline void staged_tile(const float* const* w, const vf* scale, int first, int end, bool is_first,
                        const float* const* x, float* const* y, int column) {
    vf sum[R][P * VECTORS];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < P * VECTORS; v++)
            sum[r][v] = IS_SCALED || is_first ? vf{} : load(y[r] + column + v * W);
    for (int k = first; k < end; k++) {
        vf wk[P * VECTORS];
        for (int v = 0; v < P * VECTORS; v++) wk[v] = load(w[v / VECTORS] + (k - first) * LANES + v % VECTORS * W);
        for (int r = 0; r < R; r++) {
            const vf xk = splat(x[r][k]);
            for (int v = 0; v < P * VECTORS; v++) sum[r][v] = mul_add(wk[v], xk, sum[r][v]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < P * VECTORS; v++) {
            float* out = y[r] + column + v * W;
            store(out, IS_SCALED ? mul_add(sum[r][v], scale[v], is_first ? vf{} : load(out)) : sum[r][v]);
        }
}

template <int R, int P, bool IS_SCALED>
inline void staged_rows(int num_rows, const float* const* w, const vf* scale, int first, int end, bool is_first,
                        const float* const* x, float* const* y, int column) {
    while (num_rows >= R) {
        staged_tile<R, P, IS_SCALED>(w, scale, first, end, is_first, x, y, column);
        num_rows -= R, x += R, y += R;
    }
    if constexpr (R > 1)
        if (num_rows) staged_rows<R - 1, P, IS_SCALED>(num_rows, w, scale, first, end, is_first, x, y, column);
}

template <int FORMAT, int P>
void staged_panels(const Panels& w, int num_rows, const float* const* x, float* const* y, int column) {
    constexpr int STEP = has_scales(FORMAT) ? BLOCK : 2 * BLOCK;
    alignas(64) float buffer[P][STEP * LANES];
    for (int first = 0; first < w.K; first += STEP) {
        const int end = std::min(first + STEP, w.K);
        const float* values[P];
        vf scale[P * VECTORS];
        for (int p = 0; p < P; p++) {
            const Panels panel = w.at(p);
            values[p] = buffer[p];
            if constexpr (FORMAT == FLOAT32)
                values[p] = (const float*)panel.data + int64_t(first) * LANES;
            else
                decode_panel<FORMAT>(panel, first, end, buffer[p]);
            if constexpr (sums_blocks(FORMAT))
                for (int v = 0; v < VECTORS; v++)
                    scale[p * VECTORS + v] = block_scale<FORMAT>(panel.data, first / BLOCK, v);
        }
        staged_rows<STAGED_ROWS, P, sums_blocks(FORMAT)>(num_rows, values, scale, first, end, !first, x, y, column);
    }
}

template <int FORMAT>
inline void matmul_as(const Panels& w, int num_panels, int num_rows, const float* const* x, float* const* y) {
    if (num_rows > FUSED_ROWS && (!has_scales(FORMAT) || STAGES_SCALED)) {
        int panel = 0;
        for (; panel + STAGED_PANELS <= num_panels; panel += STAGED_PANELS)
            staged_panels<FORMAT, STAGED_PANELS>(w.at(panel), num_rows, x, y, panel * LANES);
        for (; panel < num_panels; panel++)
            staged_panels<FORMAT, 1>(w.at(panel), num_rows, x, y, panel * LANES);
        return;
    }
    for (; num_rows > FUSED_ROWS; num_rows -= FUSED_ROWS, x += FUSED_ROWS, y += FUSED_ROWS)
        fused<FORMAT, FUSED_ROWS>(w, num_panels, x, y);
    fused_rows<FORMAT>(w, num_panels, num_rows, x, y);
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
