// MXFP4 on a CPU in one pass over memory: what speedstack/quant/mxfp4.py defines, bit for bit.
//
// A block of 32 elements is two, four or eight vectors of as many lanes as the target has (AVX-512, AVX2, NEON), in GCC
// vector extensions instead of intrinsics. Vectors wider than the target's registers work too, but GCC shuffles and
// converts them one lane at a time. Arithmetic is that of the reference, on magnitudes instead of signed values; build it
// without contraction (-ffp-contract=off), because the squared errors of `mse` must be rounded before they are added.

#include <cstdint>
#include <cstring>
#include <utility>

namespace {

constexpr int BLOCK_SIZE = 32;
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int NUM_VECTORS = BLOCK_SIZE / LANES;

// Vectors of LANES words, of half as many double words, and of as many smaller numbers.
typedef int32_t vint __attribute__((vector_size(4 * LANES)));
typedef float vfloat __attribute__((vector_size(4 * LANES)));
typedef double vdouble __attribute__((vector_size(4 * LANES)));
typedef uint64_t vlong __attribute__((vector_size(4 * LANES)));
typedef uint16_t vshort __attribute__((vector_size(2 * LANES)));
typedef float half_vfloat __attribute__((vector_size(2 * LANES)));
typedef uint8_t vbyte __attribute__((vector_size(LANES)));
typedef uint8_t half_vbyte __attribute__((vector_size(LANES / 2)));

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
inline vint min(vint a, vint b) { return a < b ? a : b; }
inline vint max(vint a, vint b) { return a > b ? a : b; }

template <int distance, typename V, int... lane>
inline V swapped_lanes(V v, std::integer_sequence<int, lane...>) {
    return __builtin_shufflevector(v, v, (lane ^ distance)...);
}
// Every lane has the lane that is `distance`, a power of two, away from it.
template <int distance, typename V>
inline V swapped(V v) {
    return swapped_lanes<distance>(v, std::make_integer_sequence<int, sizeof(V) / sizeof(v[0])>());
}
// Combines the low half of the lanes with the high half until one is left, in lane 0.
template <int num_lanes, typename V, typename Combine>
inline V folded(V v, Combine combine) {
    if constexpr (num_lanes == 1) {
        return v;
    } else {
        return folded<num_lanes / 2>(combine(v, swapped<num_lanes / 2>(v)), combine);
    }
}

struct Float32 {
    using type = float;
    static vint load(const float* p) {
        vint bits;
        std::memcpy(&bits, p, sizeof bits);
        return bits;
    }
    static void store(float* p, vint bits) { std::memcpy(p, &bits, sizeof bits); }
};

struct BFloat16 {
    using type = uint16_t;
    static vint load(const uint16_t* p) {
        vshort halves;
        std::memcpy(&halves, p, sizeof halves);
        return __builtin_convertvector(halves, vint) << 16;
    }
    // MXFP4 values have at most two significant bits: cutting the low half off is exact.
    static void store(uint16_t* p, vint bits) {
        const vshort halves = __builtin_convertvector((bits >> 16) & 0xFFFF, vshort);
        std::memcpy(p, &halves, sizeof halves);
    }
};

// 2**(scale - 127), NaN for 255.
inline float power_of_two(int scale) {
    if (scale == NAN_SCALE) return bit_cast<float>(NAN_BITS);
    return bit_cast<float>(scale == 0 ? 1 << 22 : scale << 23);
}

struct Block {
    vint sign[NUM_VECTORS];
    vfloat magnitude[NUM_VECTORS];
};

template <typename T>
inline Block load_block(const typename T::type* w) {
    Block block;
    for (int i = 0; i < NUM_VECTORS; i++) {
        const vint bits = T::load(w + i * LANES);
        block.sign[i] = bits & SIGN_BIT;
        block.magnitude[i] = bit_cast<vfloat>(bits & MAGNITUDE_BITS);
    }
    return block;
}

// Bits of the largest magnitude. Bits of magnitudes order as integers, NaN above infinity.
inline int32_t amax_bits(const Block& block) {
    vint m = bit_cast<vint>(block.magnitude[0]);
    for (int i = 1; i < NUM_VECTORS; i++) m = max(m, bit_cast<vint>(block.magnitude[i]));
    return folded<LANES>(m, max)[0];
}

// What rounding one vector to a grid gives: the code needs the sum and the magic number, the value their difference.
struct Rounded {
    vint binade;
    vfloat magic, sum;
};

inline Rounded round_to_grid(vfloat magnitude, float inverse_scale) {
    const vfloat y = magnitude * inverse_scale;
    Rounded r;
    r.binade = max(bit_cast<vint>(y) & INFINITY_BITS, vint{} + ONE_BITS);
    r.magic = bit_cast<vfloat>(r.binade + MAGIC_BITS);
    r.sum = y + r.magic;
    return r;
}

inline vfloat value_of(const Rounded& r, float scale) {
    const vfloat y = r.sum - r.magic;
    return (y > E2M1_MAX ? vfloat{} + E2M1_MAX : y) * scale;
}

// Steps from the binade's zero, plus two codes for every binade above [1, 2).
inline vint code_of(const Rounded& r) {
    const vint steps = bit_cast<vint>(r.sum) - bit_cast<vint>(r.magic);
    return min(steps + (r.binade >> 22) - (ONE_BITS >> 22), vint{} + 7);
}

template <int first, int... lane>
inline vdouble widened(vfloat v, std::integer_sequence<int, lane...>) {
    const half_vfloat lanes = __builtin_shufflevector(v, v, (first + lane)...);
    return __builtin_convertvector(lanes, vdouble);
}

// Squared errors of the LANES / 2 lanes from `first` on, in float64.
template <int first>
inline vdouble squares(vfloat value, vfloat magnitude) {
    constexpr std::make_integer_sequence<int, LANES / 2> lanes;
    const vdouble error = widened<first>(value, lanes) - widened<first>(magnitude, lanes);
    return error * error;
}

// Summed over the reference's tree: always the low half plus the high half.
inline double squared_error(const Block& block, int scale) {
    const float inverse_scale = power_of_two(2 * 127 - scale), scale_value = power_of_two(scale);
    vdouble sums[2 * NUM_VECTORS];
    for (int i = 0; i < NUM_VECTORS; i++) {
        const vfloat value = value_of(round_to_grid(block.magnitude[i], inverse_scale), scale_value);
        sums[2 * i] = squares<0>(value, block.magnitude[i]);
        sums[2 * i + 1] = squares<LANES / 2>(value, block.magnitude[i]);
    }
    for (int num_left = NUM_VECTORS; num_left > 0; num_left /= 2) {
        for (int i = 0; i < num_left; i++) sums[i] += sums[i + num_left];
    }
    return folded<LANES / 2>(sums[0], [](vdouble a, vdouble b) { return a + b; })[0];
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
        for (int i = 0; i < NUM_VECTORS; i++) T::store(out + i * LANES, vint{} + NAN_BITS);
        return;
    }
    for (int i = 0; i < NUM_VECTORS; i++) {
        const Rounded r = round_to_grid(block.magnitude[i], power_of_two(2 * 127 - scale));
        const vfloat value = value_of(r, power_of_two(scale));
        T::store(out + i * LANES, bit_cast<vint>(value) | block.sign[i]);
    }
}

template <typename T, Rule rule>
void quantize_block(const typename T::type* w, uint8_t* codes, uint8_t* scale_out) {
    const Block block = load_block<T>(w);
    const int scale = scale_byte<rule>(block);
    *scale_out = static_cast<uint8_t>(scale);
    const float inverse_scale = scale == NAN_SCALE ? 0.0f : power_of_two(2 * 127 - scale);
    for (int i = 0; i < NUM_VECTORS; i++) {
        const vint code = code_of(round_to_grid(block.magnitude[i], inverse_scale)) | ((block.sign[i] >> 28) & 8);
        const vlong pairs = bit_cast<vlong>(code);  // lanes 2i and 2i + 1 in the low and the high word
        const half_vbyte bytes = __builtin_convertvector((pairs | (pairs >> 28)) & 0xFF, half_vbyte);
        std::memcpy(codes + i * sizeof bytes, &bytes, sizeof bytes);
    }
}

// Bits of the float32 values of codes 0 to 15 under a scale.
inline vint value_bits(vint code, float scale) {
    const vint index = code & 7;
    const vint zero_or_half = -index & 0x3F000000;
    const vint normal = (index << 22) + (ONE_BITS - (2 << 22));
    const vfloat value = bit_cast<vfloat>(index < 2 ? zero_or_half : normal) * scale;
    return bit_cast<vint>(value) | (code << 28 & SIGN_BIT);
}

inline void dequantize_block(const uint8_t* codes, uint8_t scale_byte, float* out) {
    const float scale = power_of_two(scale_byte);
    for (int i = 0; i < NUM_VECTORS; i++) {
        half_vbyte bytes;
        std::memcpy(&bytes, codes + i * sizeof bytes, sizeof bytes);
        const vlong pairs = __builtin_convertvector(bytes, vlong);
        // The even element's code ends the low word, the odd one's the high word.
        Float32::store(out + i * LANES, value_bits(bit_cast<vint>(pairs | pairs << 28) & 15, scale));
    }
}

inline void dequantize_block(const uint8_t* codes, uint8_t scale_byte, uint16_t* out) {
    const float scale = power_of_two(scale_byte);
    for (int i = 0; i < NUM_VECTORS / 2; i++) {
        vbyte bytes;
        std::memcpy(&bytes, codes + i * sizeof bytes, sizeof bytes);
        const vint pairs = __builtin_convertvector(bytes, vint);
        // Two bfloat16 of a byte are one word: the even element in its low half. Values of codes fill two bytes.
        const vint low = value_bits(pairs & 15, scale), high = value_bits(pairs >> 4, scale);
        const vint words = ((low >> 16) & 0xFFFF) | (high & ~0xFFFF);
        std::memcpy(out + 2 * i * LANES, &words, sizeof words);
    }
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
