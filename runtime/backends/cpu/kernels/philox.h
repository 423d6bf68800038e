// Philox4x32-10 for the tokens of a row, a chunk of 32 at a time: `philox4x32` and `gumbel_noise` of
// runtime/rounds/sampling.py.
//
// GCC vector extensions, as wide as the target's registers. Two things they lack are intrinsics: a 64-bit product of
// 32-bit lanes, which would become three multiplications or scalar code, and "any lane".

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512DQ__)
constexpr int W = 16;  // 32-bit lanes of a register
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint64_t vq __attribute__((vector_size(4 * W)));

constexpr int LANES64 = W / 2;
constexpr int CHUNK = 32;  // tokens; a block of Philox is the words of four
constexpr int PARTS = CHUNK / W;
constexpr int QUADS = CHUNK / 4 / LANES64;  // registers that hold a word of each of a chunk's blocks

// Of each 64-bit lane the lower half counts, in both.
inline vq low_product(vq a, vq b) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    return (vq)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (vq)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__aarch64__)
    return (vq)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
#else
    return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

// Even lanes of both, alternating; odd lanes of both. ORDER makes the first hold LANES64 / 2 consecutive numbers of
// each, and the second the following ones.
#if defined(__AVX512F__) && defined(__AVX512DQ__)
inline vq even_lanes(vq a, vq b) { return __builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14); }
inline vq odd_lanes(vq a, vq b) { return __builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15); }
constexpr vq ORDER = {0, 4, 1, 5, 2, 6, 3, 7};
constexpr vi LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif defined(__AVX2__)
inline vq even_lanes(vq a, vq b) { return __builtin_shufflevector(a, b, 0, 4, 2, 6); }
inline vq odd_lanes(vq a, vq b) { return __builtin_shufflevector(a, b, 1, 5, 3, 7); }
constexpr vq ORDER = {0, 2, 1, 3};
constexpr vi LANE = {0, 1, 2, 3, 4, 5, 6, 7};
#else
inline vq even_lanes(vq a, vq b) { return __builtin_shufflevector(a, b, 0, 2); }
inline vq odd_lanes(vq a, vq b) { return __builtin_shufflevector(a, b, 1, 3); }
constexpr vq ORDER = {0, 1};
constexpr vi LANE = {0, 1, 2, 3};
#endif

// Whether a comparison holds in any lane.
inline bool any(vi lanes) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    return _mm512_movepi32_mask((__m512i)lanes) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_ps((__m256)lanes) != 0;
#elif defined(__aarch64__)
    return vmaxvq_u32((uint32x4_t)lanes) != 0;
#else
    int32_t found = 0;
    for (int lane = 0; lane < W; lane++) found |= lanes[lane];
    return found != 0;
#endif
}

inline vf larger(vf a, vf b) { return a > b ? a : b; }

inline float largest_lane(vf v) {
#pragma GCC unroll 4
    for (int width = W / 2; width > 0; width /= 2) v = larger(v, __builtin_shuffle(v, LANE ^ width));
    return v[0];
}

template <typename Vector, typename Scalar>
inline Vector load(const Scalar* p) {
    Vector v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// The words of one (seed, sequence, position).
class Philox {
   public:
    Philox(uint64_t seed, uint64_t sequence, uint32_t position) {
        uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
        for (int round = 0; round < ROUNDS; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
            keys_[round][0] = k0;
            keys_[round][1] = k1;
        }
        // Blocks differ in one of four counters: half of the first two rounds is the same for all of them.
        const uint64_t first = (uint64_t)(uint32_t)sequence * M1;
        const uint32_t c0 = (uint32_t)(first >> 32) ^ position ^ keys_[0][0];
        c1_ = (uint32_t)first;
        c3_ = (uint32_t)(sequence >> 32);
        second_ = (uint64_t)c0 * M0;
    }

    // Words of the 32 tokens from 4 * first_block on, in order.
    void chunk(uint32_t first_block, vu words[PARTS]) const {
        const vq m0 = vq{} + M0, m1 = vq{} + M1;
        vq c0[QUADS], c1[QUADS], c2[QUADS], c3[QUADS];
        for (int q = 0; q < QUADS; q++) {
            const vq p0 = low_product(ORDER + (uint64_t)(first_block + q * LANES64), m0);
            const vq p1 = low_product((p0 >> 32) ^ (uint64_t)(c3_ ^ keys_[0][1]), m1);
            c0[q] = (p1 >> 32) ^ (uint64_t)(c1_ ^ keys_[1][0]);
            c1[q] = p1;
            c2[q] = p0 ^ (uint64_t)((uint32_t)(second_ >> 32) ^ keys_[1][1]);
            c3[q] = vq{} + (uint64_t)(uint32_t)second_;
        }
#pragma GCC unroll 8
        for (int round = 2; round < ROUNDS; round++) {
            const vq k0 = vq{} + (uint64_t)keys_[round][0], k1 = vq{} + (uint64_t)keys_[round][1];
#pragma GCC unroll 4
            for (int q = 0; q < QUADS; q++) {
                const vq p0 = low_product(c0[q], m0), p1 = low_product(c2[q], m1);
                c0[q] = (p1 >> 32) ^ c1[q] ^ k0;
                c2[q] = (p0 >> 32) ^ c3[q] ^ k1;
                c1[q] = p1;
                c3[q] = p0;
            }
        }
#pragma GCC unroll 4
        for (int q = 0; q < QUADS; q++) {
            const vq lower = (c0[q] & 0xFFFFFFFFu) | (c1[q] << 32), upper = (c2[q] & 0xFFFFFFFFu) | (c3[q] << 32);
            words[2 * q] = (vu)even_lanes(lower, upper);
            words[2 * q + 1] = (vu)odd_lanes(lower, upper);
        }
    }

   private:
    static constexpr int ROUNDS = 10;
    static constexpr uint64_t M0 = 0xD2511F53u, M1 = 0xCD9E8D57u;
    uint32_t keys_[ROUNDS][2], c1_, c3_;
    uint64_t second_;
};
