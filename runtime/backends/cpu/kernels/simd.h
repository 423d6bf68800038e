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

// Values of key/value buffers, which are float32 or bfloat16.
inline vf load_values(const float* p) { return load(p); }
inline vf load_values(const uint16_t* p) {
#if ISA_AVX512
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif ISA_AVX2
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
    return (vf)vshll_n_u16(vld1_u16(p), 16);
#endif
}
inline void store_value(float* p, float x) { *p = x; }
inline void store_value(uint16_t* p, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    // To the nearest, ties to even; what is NaN stays none.
    *p = uint16_t(x != x ? (bits >> 16) | 64 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline vi lane_numbers() {
    vi v;
    for (int l = 0; l < W; l++) v[l] = l;
    return v;
}

// The sum of a panel's 16 lanes, by halves: the same order whatever the width of a vector.
inline float sum_panel(const vf (&v)[VECTORS]) {
    float lanes[LANES];
    for (int n = 0; n < VECTORS; n++) store(lanes + n * W, v[n]);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int lane = 0; lane < width; lane++) lanes[lane] += lanes[lane + width];
    return lanes[0];
}

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
