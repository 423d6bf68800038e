// Vectors as wide as the instruction set has them, and the few operations on them whose form matters.
//
// GCC's vector extensions say what they can; intrinsics say what GCC 12 makes scalar code or two instructions of.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>
#define ISA_AVX512 1
constexpr int W = 16;
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define ISA_AVX2 1
constexpr int W = 8;
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#define ISA_NEON 1
constexpr int W = 4;
#else
#error "these kernels are written for AVX-512, AVX2 with FMA, and NEON"
#endif

// Outputs of a weight panel, positions of a key block: a fixed number, so that layouts are the same everywhere.
constexpr int LANES = 16;
// Vectors that hold them.
constexpr int VECTORS = LANES / W;

typedef float vf __attribute__((vector_size(W * 4), may_alias));
typedef int32_t vi __attribute__((vector_size(W * 4), may_alias));

inline vf load(const float* p) {
    vf v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline vi load_words(const void* p) {
    vi v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
inline vf splat(float x) {
#if ISA_AVX512
    return (vf)_mm512_set1_ps(x);
#elif ISA_AVX2
    return (vf)_mm256_set1_ps(x);
#else
    return (vf)vdupq_n_f32(x);
#endif
}

// a * b + c, rounded once: the same bits wherever a sum is made, whatever the compiler would contract.
inline vf mul_add(vf a, vf b, vf c) {
#if ISA_AVX512
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif ISA_AVX2
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#endif
}

inline vi lane_numbers() {
    vi v;
    for (int l = 0; l < W; l++) v[l] = l;
    return v;
}

// Of the lanes of all vectors of a panel, pairwise by halves.
inline float sum_lanes(vf v) {
    float lanes[W];
    store(lanes, v);
    for (int width = W / 2; width > 0; width /= 2)
        for (int lane = 0; lane < width; lane++) lanes[lane] += lanes[lane + width];
    return lanes[0];
}

inline vf larger(vf a, vf b) { return a > b ? a : b; }

// exp: 2^n * p(r), |r| <= ln(2)/2, degree-6 minimax-like polynomial (Cephes expf), about 1 ulp.
inline vf exp_lanes(vf x) {
    const vf lo = splat(-87.33654f), hi = splat(88.37626f);
    x = x < lo ? lo : x;
    x = x > hi ? hi : x;
    vf n = mul_add(x, splat(1.44269504088896341f), splat(0.5f));
    vi ni = __builtin_convertvector(n, vi);
    vf nf = __builtin_convertvector(ni, vf);
    ni += (vi)(nf > n);  // truncation rounds negatives up: -1 where one must be taken off
    nf = __builtin_convertvector(ni, vf);
    vf r = mul_add(nf, splat(-0.693359375f), x);
    r = mul_add(nf, splat(2.12194440e-4f), r);
    vf y = splat(1.9875691500e-4f);
    y = mul_add(y, r, splat(1.3981999507e-3f));
    y = mul_add(y, r, splat(8.3334519073e-3f));
    y = mul_add(y, r, splat(4.1665795894e-2f));
    y = mul_add(y, r, splat(1.6666665459e-1f));
    y = mul_add(y, r, splat(5.0000001201e-1f));
    y = mul_add(y, r * r, r) + 1.0f;
    return y * (vf)((ni + 127) << 23);
}

inline vf silu(vf x) { return x / (1.0f + exp_lanes(-x)); }
