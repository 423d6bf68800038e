// Weight matrices in panels of 16 outputs, and how their values come out of memory.
//
// A panel holds all contraction positions k of 16 outputs, in chunks of 64 bytes:
//   float32   a chunk a k: 16 values
//   bfloat16  a chunk two k: 16 words, k in the lower half and k + 1 in the upper
//   MXFP4     for every 128 k (fewer at the end) a chunk of scales, 16 words of the four blocks' E8M0 bytes, then a
//             chunk for every 8 k. With AVX-512 (words) a word a lane holds eight codes, lowest nibble lowest k. Elsewhere
//             (bytes) they are in the order in which a table lookup of 16 bytes and an interleaving of bytes give whole
//             vectors: of four outputs 16 bytes, byte 2e + (k & 1) + 8 * (k / 2) of output e, k + 4 in the upper nibble.
//   INT8      for every 64 k (fewer at the end) a chunk of scales, 16 words of the two blocks' bfloat16 scales, then a
//             chunk for every 4 k: 16 bytes a k
//   FP8       for every 64 k (fewer at the end) a chunk of float32 scales, then a chunk of E4M3 codes for every 4 k; a
//             value is their product in float32 rounded to bfloat16, as everywhere
// pack.h writes these layouts.

#pragma once

#include "simd.h"

// Mirrored by runtime/backends/cpu/packed_layout.py.
enum Format : int32_t { FLOAT32 = 0, BFLOAT16 = 1, MXFP4_WORDS = 2, MXFP4_BYTES = 3, INT8 = 4, FP8 = 5 };

// The layout that is read here, and the one that kernels for other instruction sets read.
constexpr Format MXFP4 = W == LANES ? MXFP4_WORDS : MXFP4_BYTES, OTHER_MXFP4 = W == LANES ? MXFP4_BYTES : MXFP4_WORDS;

constexpr int CHUNK_BYTES = 64;
constexpr int BLOCK = 32;         // k that share a scale, of MXFP4 (OCP MX v1.0, 5.2) and of INT8
constexpr int GROUP_CHUNKS = 16;  // chunks of codes that follow a chunk of scales

constexpr bool has_scales(int format) { return format == MXFP4 || format == INT8 || format == FP8; }
// Whether a block is summed before it is scaled; a value of FP8 is rounded after it is scaled.
constexpr bool sums_blocks(int format) { return format == MXFP4 || format == INT8; }
// k in a chunk of codes, or of values.
constexpr int chunk_k(int format) {
    return format == MXFP4 ? 8 : has_scales(format) ? 4 : format == BFLOAT16 ? 2 : 1;
}

struct Panels {
    int32_t format;
    int K;
    const uint8_t* data;

    int64_t panel_bytes() const {
        const int64_t chunks = K / chunk_k(format);
        return CHUNK_BYTES * (chunks + (has_scales(format) ? (chunks + GROUP_CHUNKS - 1) / GROUP_CHUNKS : 0));
    }
    Panels at(int64_t panel) const { return {format, K, data + panel * panel_bytes()}; }
};

// Where the codes of a block begin in its panel, and the scales of its group.
template <int FORMAT>
inline const uint8_t* block_codes(const uint8_t* panel, int block) {
    constexpr int CHUNKS = BLOCK / chunk_k(FORMAT), BLOCKS = GROUP_CHUNKS / CHUNKS;
    return panel + CHUNK_BYTES * (int64_t(block) * CHUNKS + block / BLOCKS + 1);
}
template <int FORMAT>
inline const uint8_t* block_scales(const uint8_t* panel, int block) {
    constexpr int BLOCKS = GROUP_CHUNKS / (BLOCK / chunk_k(FORMAT));
    return panel + CHUNK_BYTES * int64_t(block / BLOCKS) * (GROUP_CHUNKS + 1);
}

// The scales of a block, for the outputs of one vector.
template <int FORMAT>
inline vf block_scale(const uint8_t* panel, int block, int vector) {
    const vi word = load_words(block_scales<FORMAT>(panel, block) + vector * W * 4);
    if constexpr (FORMAT == FP8) return (vf)word;
    if constexpr (FORMAT == INT8) return (vf)(block % 2 ? word & int32_t(0xFFFF0000) : word << 16);
    const vi b = (word >> (8 * (block % 4))) & 255;
    vi bits = b << 23;
    bits = b == 0 ? vi{} + 0x00400000 : bits;    // 2^-127 is a subnormal float
    bits = b == 255 ? vi{} + 0x7FC00000 : bits;  // NaN
    return (vf)bits;
}

// How many k are decoded at once: with few registers half a chunk of MXFP4, so that nothing is spilled.
constexpr int decoded_k(int format) { return format == MXFP4 && W == 16 ? 8 : 4; }

// Calls use(j, value) for the values of k = j, ascending, of a part of a chunk, for the outputs of one vector.
// The E2M1 values of the sixteen codes: OCP MX v1.0, 5.3.3.
template <class Use>
inline __attribute__((always_inline)) void decode_e2m1(const uint8_t* chunk, [[maybe_unused]] int vector, [[maybe_unused]] int part,
                                                       const Use& use) {
#if ISA_AVX512
    const __m512 table = _mm512_setr_ps(0.f, .5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f, -0.f, -.5f, -1.f, -1.5f, -2.f, -3.f,
                                        -4.f, -6.f);
    const __m512i word = (__m512i)load_words(chunk);
    for (int j = 0; j < 8; j++) use(j, (vf)_mm512_permutexvar_ps(_mm512_srli_epi32(word, 4 * j), table));
#elif ISA_AVX2
    // A value's bfloat16 in two bytes, each looked up by the code.
    const __m256i upper = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 0x3F, 0x3F, 0x3F, 0x40, 0x40, 0x40, 0x40, -128,
                                                                    -65, -65, -65, -64, -64, -64, -64));
    const __m256i lower = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 0, -128, -64, 0, 0x40, -128, -64, 0, 0, -128, -64, 0, 0x40, -128, -64));
    const __m256i bytes = _mm256_loadu_si256((const __m256i*)(chunk + 32 * vector));
    const __m256i codes =
        _mm256_and_si256(_mm256_srl_epi16(bytes, _mm_cvtsi32_si128(4 * part)), _mm256_set1_epi8(15));
    const __m256i high = _mm256_shuffle_epi8(upper, codes), low = _mm256_shuffle_epi8(lower, codes);
    const __m256i first = _mm256_unpacklo_epi8(low, high), second = _mm256_unpackhi_epi8(low, high);
    const __m256i top = _mm256_set1_epi32(int(0xFFFF0000));
    use(0, (vf)_mm256_slli_epi32(first, 16));
    use(1, (vf)_mm256_and_si256(first, top));
    use(2, (vf)_mm256_slli_epi32(second, 16));
    use(3, (vf)_mm256_and_si256(second, top));
#else
    const uint8x16_t upper = {0,    0x3F, 0x3F, 0x3F, 0x40, 0x40, 0x40, 0x40,
                              0x80, 0xBF, 0xBF, 0xBF, 0xC0, 0xC0, 0xC0, 0xC0};
    const uint8x16_t lower = {0, 0, 0x80, 0xC0, 0, 0x40, 0x80, 0xC0, 0, 0, 0x80, 0xC0, 0, 0x40, 0x80, 0xC0};
    const uint8x16_t bytes = vld1q_u8(chunk + 16 * vector);
    const uint8x16_t codes = vandq_u8(vshlq_u8(bytes, vdupq_n_s8(-4 * part)), vdupq_n_u8(15));
    const uint8x16_t high = vqtbl1q_u8(upper, codes), low = vqtbl1q_u8(lower, codes);
    const uint32x4_t first = vreinterpretq_u32_u8(vzip1q_u8(low, high));
    const uint32x4_t second = vreinterpretq_u32_u8(vzip2q_u8(low, high));
    const uint32x4_t top = vdupq_n_u32(0xFFFF0000u);
    use(0, (vf)vshlq_n_u32(first, 16));
    use(1, (vf)vandq_u32(first, top));
    use(2, (vf)vshlq_n_u32(second, 16));
    use(3, (vf)vandq_u32(second, top));
#endif
}

// The same of a chunk of INT8 codes.
template <class Use>
inline __attribute__((always_inline)) void decode_int8(const uint8_t* chunk, int vector, const Use& use) {
    for (int j = 0; j < 4; j++) {
        const uint8_t* codes = chunk + j * LANES + vector * W;
#if ISA_AVX512
        use(j, (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)codes))));
#elif ISA_AVX2
        use(j, (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)codes))));
#else
        int32_t four;
        std::memcpy(&four, codes, 4);
        const int16x8_t wide = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
        use(j, (vf)vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))));
#endif
    }
}

// The same of a chunk of FP8 codes, none of them NaN: products with `scale`, rounded to bfloat16. An E4M3 code's bits are
// those of a float16 of 2^-8 its value, subnormal ones too (OCP FP8, table 1).
template <class Use>
inline __attribute__((always_inline)) void decode_fp8(const uint8_t* chunk, int vector, vf scale, const Use& use) {
    for (int j = 0; j < 4; j++) {
        const uint8_t* codes = chunk + j * LANES + vector * W;
#if ISA_AVX512
        const __m256i wide = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)codes)), 8);
        const __m256i half = _mm256_and_si256(_mm256_srai_epi16(wide, 1), _mm256_set1_epi16(int16_t(0xBFFF)));
        const vf value = (vf)_mm512_cvtph_ps(half);
#elif ISA_AVX2
        const __m128i wide = _mm_slli_epi16(_mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)codes)), 8);
        const __m128i half = _mm_and_si128(_mm_srai_epi16(wide, 1), _mm_set1_epi16(int16_t(0xBFFF)));
        const vf value = (vf)_mm256_cvtph_ps(half);
#else
        uint32_t four;
        std::memcpy(&four, codes, 4);
        const int16x4_t wide = vreinterpret_s16_u16(vget_low_u16(vshll_n_u8(vreinterpret_u8_u32(vdup_n_u32(four)), 8)));
        const int16x4_t half = vand_s16(vshr_n_s16(wide, 1), vdup_n_s16(int16_t(0xBFFF)));
        const vf value = (vf)vcvt_f32_f16(vreinterpret_f16_s16(half));
#endif
        const vi bits = (vi)(value * (scale * 256.0f));
        use(j, (vf)((bits + 0x7FFF + (bits >> 16 & 1)) & int32_t(0xFFFF0000)));
    }
}

// Calls use(j, value) for the values of decoded_k(FORMAT) k from `k` of a block on, of one vector. `scale` is the
// block's; values of formats that sum blocks come without it.
template <int FORMAT, class Use>
inline __attribute__((always_inline)) void decode(const uint8_t* codes, int k, int vector, vf scale, const Use& use) {
    const uint8_t* chunk = codes + k / chunk_k(FORMAT) * CHUNK_BYTES;
    if constexpr (FORMAT == MXFP4)
        decode_e2m1(chunk, vector, k % chunk_k(MXFP4) / decoded_k(MXFP4), use);
    else if constexpr (FORMAT == INT8)
        decode_int8(chunk, vector, use);
    else
        decode_fp8(chunk, vector, scale, use);
}
