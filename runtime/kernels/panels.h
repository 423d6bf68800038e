// Matrix products over weights in panels of 16 outputs: float32, bfloat16, or MXFP4 decoded in registers.
//
// Every output element is one accumulation over the contraction axis in ascending order, one lane of a vector. How many
// rows (R) and panels (NB) a register tile holds decides only which elements are computed at the same time: the bits of
// an element are the same in every tile.

#pragma once

#include "simd.h"

constexpr int ROW_BLOCK = 8;

// The E2M1 values of the sixteen codes (OCP MX v1.0, 5.3.3).
const v16f E2M1 = {0.f, .5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f, -0.f, -.5f, -1.f, -1.5f, -2.f, -3.f, -4.f, -6.f};

inline v16i load_words(const uint8_t* p) {
    v16i v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// Scales of one block for 16 outputs: a word a lane holds the bytes of four consecutive blocks.
inline v16f decode_scale(const uint8_t* scales, int block) {
    v16i b = (load_words(scales + (block / 4) * 4 * LANES) >> (8 * (block % 4))) & 255;
    v16i bits = b << 23;
    bits = b == 0 ? v16i{} + 0x00400000 : bits;    // 2^-127 is a subnormal float
    bits = b == 255 ? v16i{} + 0x7FC00000 : bits;  // NaN
    v16f scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return scale;
}

// acc[r][n] += sum over k of x[r][k] * W[panel n][k]
template <int R, int NB>
inline void tile_f32(const float* w, int K, const float* const* x, v16f (&acc)[R][NB]) {
    for (int k = 0; k < K; k++) {
        v16f wk[NB];
        for (int n = 0; n < NB; n++) wk[n] = load(w + (int64_t(n) * K + k) * LANES);
        for (int r = 0; r < R; r++)
            for (int n = 0; n < NB; n++) acc[r][n] += wk[n] * x[r][k];
    }
}

// As above from bfloat16: a word a lane holds k in its lower and k + 1 in its upper half, each the top half of a float.
template <int R, int NB>
inline void tile_bf16(const uint8_t* w, int K, const float* const* x, v16f (&acc)[R][NB]) {
    for (int k = 0; k < K; k += 2) {
        v16f even[NB], odd[NB];
        for (int n = 0; n < NB; n++) {
            v16i word = load_words(w + (int64_t(n) * (K / 2) + k / 2) * 4 * LANES);
            v16i low = word << 16, high = word & int32_t(0xFFFF0000);
            std::memcpy(&even[n], &low, sizeof low);
            std::memcpy(&odd[n], &high, sizeof high);
        }
        for (int r = 0; r < R; r++)
            for (int n = 0; n < NB; n++) {
                acc[r][n] += even[n] * x[r][k];
                acc[r][n] += odd[n] * x[r][k + 1];
            }
    }
}

template <int R, int NB>
inline void tile_mxfp4(const uint8_t* codes, const uint8_t* scales, int K, const float* const* x, v16f (&acc)[R][NB]) {
    const int64_t scale_stride = int64_t((K + 127) / 128) * 4 * LANES;
    for (int block = 0; block < K / 32; block++) {
        v16f scale[NB];
        for (int n = 0; n < NB; n++) scale[n] = decode_scale(scales + n * scale_stride, block);
        for (int k = block * 32; k < block * 32 + 32; k += 8) {
            v16i word[NB];
            for (int n = 0; n < NB; n++) word[n] = load_words(codes + (int64_t(n) * (K / 8) + k / 8) * 4 * LANES);
            for (int j = 0; j < 8; j++) {
                v16f wk[NB];
                for (int n = 0; n < NB; n++) wk[n] = __builtin_shuffle(E2M1, (word[n] >> (4 * j)) & 15) * scale[n];
                for (int r = 0; r < R; r++)
                    for (int n = 0; n < NB; n++) acc[r][n] += wk[n] * x[r][k + j];
            }
        }
    }
}

// A weight matrix in panels: float32, bfloat16, or MXFP4 with scales.
enum Format : int32_t { FLOAT32 = 0, BFLOAT16 = 1, MXFP4 = 2 };

struct Panels {
    int32_t format;
    int K;
    const uint8_t* data;
    const uint8_t* scales;
    Panels at(int64_t panel) const {
        const int64_t bytes = format == FLOAT32 ? K * 4 * LANES : format == BFLOAT16 ? K * 2 * LANES : K / 2 * LANES;
        return {format, K, data + panel * bytes, scales ? scales + panel * ((K + 127) / 128) * 4 * LANES : nullptr};
    }
};

template <int R, int NB>
inline void tile(const Panels& w, const float* const* x, float* const* y) {
    v16f acc[R][NB];
    for (int r = 0; r < R; r++)
        for (int n = 0; n < NB; n++) acc[r][n] = v16f{};
    if (w.format == FLOAT32)
        tile_f32<R, NB>((const float*)w.data, w.K, x, acc);
    else if (w.format == BFLOAT16)
        tile_bf16<R, NB>(w.data, w.K, x, acc);
    else
        tile_mxfp4<R, NB>(w.data, w.scales, w.K, x, acc);
    for (int r = 0; r < R; r++)
        for (int n = 0; n < NB; n++) store(y[r] + n * LANES, acc[r][n]);
}

template <int R, int NB>
void tiles(const Panels& w, int num_panels, const float* const* x, float* const* y) {
    float* out[R];
    int panel = 0;
    for (; panel + NB <= num_panels; panel += NB) {
        for (int r = 0; r < R; r++) out[r] = y[r] + panel * LANES;
        tile<R, NB>(w.at(panel), x, out);
    }
    for (; panel < num_panels; panel++) {
        for (int r = 0; r < R; r++) out[r] = y[r] + panel * LANES;
        tile<R, 1>(w.at(panel), x, out);
    }
}

// y[r][0 : 16 * num_panels] = W x[r], for at most ROW_BLOCK rows
void matmul(const Panels& w, int num_panels, int num_rows, const float* const* x, float* const* y) {
    switch (num_rows) {
        case 1: tiles<1, 8>(w, num_panels, x, y); break;
        case 2: tiles<2, 4>(w, num_panels, x, y); break;
        case 3: tiles<3, 4>(w, num_panels, x, y); break;
        case 4: tiles<4, 4>(w, num_panels, x, y); break;
        case 5: tiles<5, 2>(w, num_panels, x, y); break;
        case 6: tiles<6, 2>(w, num_panels, x, y); break;
        case 7: tiles<7, 2>(w, num_panels, x, y); break;
        case 8: tiles<8, 2>(w, num_panels, x, y); break;
    }
}
