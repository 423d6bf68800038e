// MXFP4 on a CPU in one pass over memory: what speedstack/quant/mxfp4.py defines, bit for bit.
//
// A block of 32 elements is two vectors of 16 lanes, in GCC vector extensions instead of intrinsics: AVX-512, AVX2 or
// NEON by the target. Arithmetic is that of the reference, on magnitudes instead of signed values; build it without
// contraction (-ffp-contract=off), because the squared errors of `mse` must be rounded before they are added.

#include <cstdint>
#include <cstring>

namespace {

constexpr int BLOCK_SIZE = 32;
constexpr int LANES = 16;

typedef int32_t v16i __attribute__((vector_size(64)));
typedef float v16f __attribute__((vector_size(64)));
typedef float v8f __attribute__((vector_size(32)));
typedef double v8d __attribute__((vector_size(64)));
typedef uint16_t v16h __attribute__((vector_size(32)));
typedef uint8_t v16b __attribute__((vector_size(16)));
typedef uint64_t v8q __attribute__((vector_size(64)));
typedef uint8_t v8b __attribute__((vector_size(8)));

enum Rule { FLOOR, RCEIL, EVEN, MSE };

constexpr int32_t MAGNITUDE_BITS = 0x7FFFFFFF;
constexpr int32_t SIGN_BIT = INT32_MIN;
constexpr int32_t INFINITY_BITS = 0x7F800000;
constexpr int32_t NAN_BITS = 0x7FC00000;
constexpr int32_t ONE_BITS = 0x3F800000;
constexpr int32_t MAGIC_BITS = (22 << 23) + (1 << 22);  // times a power of two: 1.5 * 2**23 half steps
constexpr int MAX_SCALE = 127 + 125;
constexpr int NAN_SCALE = 255;
constexpr float E2M1_MAX = 6.0f;

template <typename To, typename From>
inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
inline v16i min16(v16i a, v16i b) { return a < b ? a : b; }
inline v16i max16(v16i a, v16i b) { return a > b ? a : b; }

struct Float32 {
    using type = float;
    static v16i load(const float* p) {
        v16i bits;
        std::memcpy(&bits, p, sizeof bits);
        return bits;
    }
    static void store(float* p, v16i bits) { std::memcpy(p, &bits, sizeof bits); }
};

struct BFloat16 {
    using type = uint16_t;
    static v16i load(const uint16_t* p) {
        v16h halves;
        std::memcpy(&halves, p, sizeof halves);
        return __builtin_convertvector(halves, v16i) << 16;
    }
    // MXFP4 values have at most two significant bits: cutting the low half off is exact.
    static void store(uint16_t* p, v16i bits) {
        const v16h halves = __builtin_convertvector((bits >> 16) & 0xFFFF, v16h);
        std::memcpy(p, &halves, sizeof halves);
    }
};

// 2**(scale - 127), NaN for 255.
inline float power_of_two(int scale) {
    if (scale == NAN_SCALE) return bit_cast<float>(NAN_BITS);
    return bit_cast<float>(scale == 0 ? 1 << 22 : scale << 23);
}

struct Block {
    v16i sign[2];
    v16f magnitude[2];
};

template <typename T>
inline Block load_block(const typename T::type* w) {
    Block block;
    for (int half = 0; half < 2; half++) {
        const v16i bits = T::load(w + half * LANES);
        block.sign[half] = bits & SIGN_BIT;
        block.magnitude[half] = bit_cast<v16f>(bits & MAGNITUDE_BITS);
    }
    return block;
}

// Bits of the largest magnitude. Bits of magnitudes order as integers, NaN above infinity.
inline int32_t amax_bits(const Block& block) {
    v16i m = max16(bit_cast<v16i>(block.magnitude[0]), bit_cast<v16i>(block.magnitude[1]));
    m = max16(m, __builtin_shufflevector(m, m, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    m = max16(m, __builtin_shufflevector(m, m, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    m = max16(m, __builtin_shufflevector(m, m, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    m = max16(m, __builtin_shufflevector(m, m, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
    return m[0];
}

// What rounding one vector to a grid gives: the code needs the sum and the magic number, the value their difference.
struct Rounded {
    v16i binade;
    v16f magic, sum;
};

inline Rounded round_to_grid(v16f magnitude, float inverse_scale) {
    const v16f y = magnitude * inverse_scale;
    Rounded r;
    r.binade = max16(bit_cast<v16i>(y) & INFINITY_BITS, v16i{} + ONE_BITS);
    r.magic = bit_cast<v16f>(r.binade + MAGIC_BITS);
    r.sum = y + r.magic;
    return r;
}

inline v16f value_of(const Rounded& r, float scale) {
    const v16f y = r.sum - r.magic;
    return (y > E2M1_MAX ? v16f{} + E2M1_MAX : y) * scale;
}

// Steps from the binade's zero, plus two codes for every binade above [1, 2).
inline v16i code_of(const Rounded& r) {
    const v16i steps = bit_cast<v16i>(r.sum) - bit_cast<v16i>(r.magic);
    return min16(steps + (r.binade >> 22) - (ONE_BITS >> 22), v16i{} + 7);
}

// Squared errors of eight lanes, in float64.
inline v8d squares(v16f value, v16f magnitude, int half) {
    const auto eight = [half](v16f v) {
        const v8f lanes = half ? __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15)
                               : __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
        return __builtin_convertvector(lanes, v8d);
    };
    const v8d error = eight(value) - eight(magnitude);
    return error * error;
}

// Summed over the reference's tree: always the low half plus the high half.
inline double squared_error(const Block& block, int scale) {
    const float inverse_scale = power_of_two(2 * 127 - scale), scale_value = power_of_two(scale);
    const v16f low = value_of(round_to_grid(block.magnitude[0], inverse_scale), scale_value);
    const v16f high = value_of(round_to_grid(block.magnitude[1], inverse_scale), scale_value);
    v8d sum = (squares(low, block.magnitude[0], 0) + squares(high, block.magnitude[1], 0)) +
              (squares(low, block.magnitude[0], 1) + squares(high, block.magnitude[1], 1));
    sum += __builtin_shufflevector(sum, sum, 4, 5, 6, 7, 0, 1, 2, 3);
    sum += __builtin_shufflevector(sum, sum, 2, 3, 0, 1, 6, 7, 4, 5);
    sum += __builtin_shufflevector(sum, sum, 1, 0, 3, 2, 5, 4, 7, 6);
    return sum[0];
}

inline int clamp_scale(int scale) { return scale < 0 ? 0 : scale > MAX_SCALE ? MAX_SCALE : scale; }

template <Rule rule>
inline int scale_byte(const Block& block) {
    constexpr int32_t CARRY[] = {0, 0x3FFFFF, 0x200000, 0};
    const int32_t amax = amax_bits(block);
    if (amax >= INFINITY_BITS) return NAN_SCALE;
    const int scale = clamp_scale(((amax + CARRY[rule]) >> 23) - 2);
    if (rule != MSE) return scale;
    int best = scale;
    double least = squared_error(block, scale);
    for (int step = 1; step >= -1; step -= 2) {
        const int other = clamp_scale(scale + step);
        const double error = squared_error(block, other);
        if (error < least) best = other, least = error;
    }
    return best;
}

template <typename T, Rule rule>
void fake_quantize_block(const typename T::type* w, typename T::type* out) {
    const Block block = load_block<T>(w);
    const int scale = scale_byte<rule>(block);
    if (scale == NAN_SCALE) {
        for (int half = 0; half < 2; half++) T::store(out + half * LANES, v16i{} + NAN_BITS);
        return;
    }
    for (int half = 0; half < 2; half++) {
        const Rounded r = round_to_grid(block.magnitude[half], power_of_two(2 * 127 - scale));
        const v16f value = value_of(r, power_of_two(scale));
        T::store(out + half * LANES, bit_cast<v16i>(value) | block.sign[half]);
    }
}

template <typename T, Rule rule>
void quantize_block(const typename T::type* w, uint8_t* codes, uint8_t* scale_out) {
    const Block block = load_block<T>(w);
    const int scale = scale_byte<rule>(block);
    *scale_out = static_cast<uint8_t>(scale);
    const float inverse_scale = scale == NAN_SCALE ? 0.0f : power_of_two(2 * 127 - scale);
    for (int half = 0; half < 2; half++) {
        const v16i code = code_of(round_to_grid(block.magnitude[half], inverse_scale)) | ((block.sign[half] >> 28) & 8);
        const v8q pairs = bit_cast<v8q>(code);  // lanes 2i and 2i + 1 in the low and the high word
        const v8b bytes = __builtin_convertvector((pairs | (pairs >> 28)) & 0xFF, v8b);
        std::memcpy(codes + half * sizeof bytes, &bytes, sizeof bytes);
    }
}

// Bits of the float32 values of codes 0 to 15 under a scale.
inline v16i value_bits(v16i code, float scale) {
    const v16i index = code & 7;
    const v16i zero_or_half = -index & 0x3F000000;
    const v16i normal = (index << 22) + (ONE_BITS - (2 << 22));
    const v16f value = bit_cast<v16f>(index < 2 ? zero_or_half : normal) * scale;
    return bit_cast<v16i>(value) | (code << 28 & SIGN_BIT);
}

inline void dequantize_block(const uint8_t* codes, uint8_t scale_byte, float* out) {
    v16b bytes;
    std::memcpy(&bytes, codes, sizeof bytes);
    const v16i pairs = __builtin_convertvector(bytes, v16i);
    const float scale = power_of_two(scale_byte);
    const v16i low = value_bits(pairs & 15, scale), high = value_bits(pairs >> 4, scale);
    Float32::store(out, __builtin_shufflevector(low, high, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
    Float32::store(
        out + LANES, __builtin_shufflevector(low, high, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
}

inline void dequantize_block(const uint8_t* codes, uint8_t scale_byte, uint16_t* out) {
    v16b bytes;
    std::memcpy(&bytes, codes, sizeof bytes);
    const v16i pairs = __builtin_convertvector(bytes, v16i);
    const float scale = power_of_two(scale_byte);
    // Two bfloat16 of a byte are one word: the even element in its low half. The values of the codes fill two bytes.
    const v16i low = value_bits(pairs & 15, scale), high = value_bits(pairs >> 4, scale);
    const v16i words = ((low >> 16) & 0xFFFF) | (high & ~0xFFFF);
    std::memcpy(out, &words, sizeof words);
}

template <typename Body>
void for_each_block(int64_t num_blocks, int num_threads, Body body) {
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (int64_t block = 0; block < num_blocks; block++) body(block);
}

template <typename T, Rule rule>
void fake_quantize(const void* w, void* out, int64_t num_blocks, int num_threads) {
    const auto* from = static_cast<const typename T::type*>(w);
    auto* to = static_cast<typename T::type*>(out);
    for_each_block(num_blocks, num_threads, [=](int64_t block) {
        fake_quantize_block<T, rule>(from + block * BLOCK_SIZE, to + block * BLOCK_SIZE);
    });
}

template <typename T, Rule rule>
void quantize(const void* w, uint8_t* codes, uint8_t* scales, int64_t num_blocks, int num_threads) {
    const auto* from = static_cast<const typename T::type*>(w);
    for_each_block(num_blocks, num_threads, [=](int64_t block) {
        quantize_block<T, rule>(from + block * BLOCK_SIZE, codes + block * BLOCK_SIZE / 2, scales + block);
    });
}

template <typename Value>
void dequantize(const uint8_t* codes, const uint8_t* scales, void* out, int64_t num_blocks, int num_threads) {
    auto* to = static_cast<Value*>(out);
    for_each_block(num_blocks, num_threads, [=](int64_t block) {
        dequantize_block(codes + block * BLOCK_SIZE / 2, scales[block], to + block * BLOCK_SIZE);
    });
}

}  // namespace

// `rule` is 0 floor, 1 rceil, 2 even, 3 mse; float32 unless `is_bfloat16`. Blocks lie one behind the other.
extern "C" {

void mxfp4_fake_quantize(const void* w, void* out, int64_t num_blocks, int rule, int is_bfloat16, int num_threads) {
    constexpr decltype(&fake_quantize<Float32, FLOOR>) VARIANTS[2][4] = {
        {fake_quantize<Float32, FLOOR>, fake_quantize<Float32, RCEIL>, fake_quantize<Float32, EVEN>,
         fake_quantize<Float32, MSE>},
        {fake_quantize<BFloat16, FLOOR>, fake_quantize<BFloat16, RCEIL>, fake_quantize<BFloat16, EVEN>,
         fake_quantize<BFloat16, MSE>}};
    VARIANTS[is_bfloat16][rule](w, out, num_blocks, num_threads);
}

void mxfp4_quantize(const void* w, uint8_t* codes, uint8_t* scales, int64_t num_blocks, int rule, int is_bfloat16,
                    int num_threads) {
    constexpr decltype(&quantize<Float32, FLOOR>) VARIANTS[2][4] = {
        {quantize<Float32, FLOOR>, quantize<Float32, RCEIL>, quantize<Float32, EVEN>, quantize<Float32, MSE>},
        {quantize<BFloat16, FLOOR>, quantize<BFloat16, RCEIL>, quantize<BFloat16, EVEN>, quantize<BFloat16, MSE>}};
    VARIANTS[is_bfloat16][rule](w, codes, scales, num_blocks, num_threads);
}

void mxfp4_dequantize(const uint8_t* codes, const uint8_t* scales, void* out, int64_t num_blocks, int is_bfloat16,
                      int num_threads) {
    (is_bfloat16 ? dequantize<uint16_t> : dequantize<float>)(codes, scales, out, num_blocks, num_threads);
}
}
