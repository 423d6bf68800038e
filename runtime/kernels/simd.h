// Sixteen floats at a time, in GCC vector extensions instead of intrinsics: AVX-512, AVX2 or NEON by the target.

#pragma once

#include <cstdint>
#include <cstring>

constexpr int LANES = 16;

typedef float v16f __attribute__((vector_size(64)));
typedef int32_t v16i __attribute__((vector_size(64)));

inline v16f load(const float* p) {
    v16f v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline void store(float* p, v16f v) { std::memcpy(p, &v, sizeof v); }
inline v16f splat(float x) { return v16f{} + x; }

inline float sum_lanes(v16f v) {
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int lane = 0; lane < width; lane++) v[lane] += v[lane + width];
    return v[0];
}

// exp on 16 lanes: 2^n * p(r), |r| <= ln(2)/2, degree-6 minimax-like polynomial (Cephes expf), about 1 ulp.
inline v16f exp16(v16f x) {
    const v16f lo = splat(-87.33654f), hi = splat(88.37626f);
    x = x < lo ? lo : x;
    x = x > hi ? hi : x;
    v16f n = x * 1.44269504088896341f + 0.5f;
    v16i ni = __builtin_convertvector(n, v16i);
    v16f nf = __builtin_convertvector(ni, v16f);
    v16i too_big = nf > n;  // truncation rounds negatives up: -1 where one must be taken off
    ni += too_big;
    nf = __builtin_convertvector(ni, v16f);
    v16f r = x - nf * 0.693359375f;
    r = r - nf * -2.12194440e-4f;
    v16f y = splat(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    v16i bits = (ni + 127) << 23;
    v16f scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return y * scale;
}

inline v16f silu16(v16f x) { return x / (1.0f + exp16(-x)); }
