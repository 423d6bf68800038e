// Compares the matrix products of matmul.h, and the layouts that pack.h writes for them, with a plain loop: bit for bit,
// because the order in which an output element is summed, and where it is rounded, is documented (see matmul.h).
// Prints "right", the instruction set's lanes and a hash of what other functions of a vector give, which has to be the
// same on every instruction set; or one line about the first difference, and returns 1.
//
//   matmul_check [few]    `few`: not every number of rows and panels for the longer sums, for emulators

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "matmul.h"
#include "pack.h"

namespace {

// The values of the sixteen codes: OCP MX v1.0, 5.3.3.
const float E2M1[16] = {0.f,  .5f,  1.f,  1.5f,  2.f,  3.f,  4.f,  6.f,
                        -0.f, -.5f, -1.f, -1.5f, -2.f, -3.f, -4.f, -6.f};
const uint8_t SPECIAL_SCALES[] = {0, 1, 127, 254, 255};

uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
// 1 sign, 4 exponent and 3 mantissa bits, no infinities: OCP FP8, table 1.
float e4m3(uint8_t code) {
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    const float size = std::ldexp(exponent ? 8.f + mantissa : mantissa, (exponent ? exponent : 1) - 10);
    return code & 0x80 ? -size : size;
}
// To the nearest, ties to even.
float bfloat16(float x) {
    const uint32_t bits = bits_of(x), rest = bits & 0xFFFF;
    return float_of((bits & 0xFFFF0000) + (rest > 0x8000 || (rest == 0x8000 && bits >> 16 & 1) ? 0x10000 : 0));
}
bool is_same(float a, float b) { return bits_of(a) == bits_of(b) || (std::isnan(a) && std::isnan(b)); }

// Memory that ends where a page begins that nobody may touch.
struct Guarded {
    uint8_t *pages, *begin;
    size_t num_mapped;
    explicit Guarded(size_t num_bytes) {
        const size_t page = size_t(sysconf(_SC_PAGESIZE)), size = (num_bytes + page - 1) / page * page;
        num_mapped = size + page;
        pages = (uint8_t*)mmap(nullptr, num_mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        mprotect(pages + size, page, PROT_NONE);
        begin = pages + size - num_bytes;
    }
    ~Guarded() { munmap(pages, num_mapped); }
};

// A matrix as checkpoints have it, its values, its scales as floats, and its panels.
struct Matrix {
    int32_t format;
    int N, K;
    std::vector<uint8_t> stored, scales;
    std::vector<float> value, scale;
    std::unique_ptr<Guarded> panels;

    Matrix(int32_t format, int num_panels, int K, std::mt19937& random) : format(format), N(num_panels * LANES), K(K) {
        std::normal_distribution<float> normal;
        value.resize(size_t(N) * K), scale.resize(has_scales(format) ? size_t(N) * (K / BLOCK) : 0);
        stored.resize(format == FLOAT32 ? 4 * value.size() : format == BFLOAT16 ? 2 * value.size()
                      : format == MXFP4 ? value.size() / 2 : value.size());
        for (size_t n = 0; n < value.size(); n++) {
            const uint32_t bits = bits_of(normal(random)), code = random();
            if (format == FLOAT32) {
                value[n] = float_of(bits);
                std::memcpy(&stored[4 * n], &bits, 4);
            } else if (format == BFLOAT16) {
                value[n] = float_of(bits & 0xFFFF0000);
                stored[2 * n] = uint8_t(bits >> 16), stored[2 * n + 1] = uint8_t(bits >> 24);
            } else if (format == INT8) {
                value[n] = int8_t(code), stored[n] = uint8_t(code);
            } else if (format == FP8) {
                stored[n] = uint8_t((code & 0x7F) == 0x7F ? 0 : code);  // none of them NaN, as the kernels are promised
                value[n] = e4m3(stored[n]);
            } else {
                value[n] = E2M1[code & 15], stored[n / 2] |= uint8_t((code & 15) << 4 * (n & 1));
            }
        }
        for (size_t n = 0; n < scale.size(); n++) {
            const int row = int(n / (K / BLOCK)), block = int(n % (K / BLOCK)), special = row % 8;
            if (format == FP8 && block % 2) {
                scale[n] = scale[n - 1];
                continue;
            }
            if (format == FP8 || format == INT8) {
                const int num_bytes = format == FP8 ? 4 : 2;
                const uint32_t bits = bits_of(normal(random) * 0x1p-8f) >> (32 - 8 * num_bytes);
                scale[n] = float_of(bits << (32 - 8 * num_bytes));
                for (int byte = 0; byte < num_bytes; byte++) scales.push_back(uint8_t(bits >> 8 * byte));
                continue;
            }
            // One special scale in a row of blocks, at another place in every row.
            const bool is_special = special < 5 && block == row * 7 % (K / BLOCK);
            scales.push_back(is_special ? SPECIAL_SCALES[special] : uint8_t(110 + random() % 30));
            scale[n] = scales[n] == 255 ? NAN : std::ldexp(1.0f, scales[n] - 127);
        }
        for (size_t n = 0; n < value.size() && format == FP8; n++) value[n] = bfloat16(value[n] * scale[n / BLOCK]);
        const int64_t panel_bytes = Panels{format, K, nullptr}.panel_bytes();
        panels = std::make_unique<Guarded>(panel_bytes * num_panels);
        Guarded from(stored.size()), scales_from(scales.size());
        std::copy(stored.begin(), stored.end(), from.begin);
        std::copy(scales.begin(), scales.end(), scales_from.begin);
        const Matrices m{format, 0, 1, N, K, from.begin, scales_from.begin, panels->begin};
        for (int panel = 0; panel < num_panels; panel++) pack_panel(m, panel);
    }

    Panels view() const { return {format, K, panels->begin}; }

    // The documented order: k ascending, one rounding a multiply-add; with MXFP4 and INT8 a sum a block, scaled and added.
    float product(int n, const float* x) const {
        const float* w = &value[size_t(n) * K];
        float y = 0.f;
        if (!sums_blocks(format)) {
            for (int k = 0; k < K; k++) y = std::fma(w[k], x[k], y);
            return y;
        }
        for (int block = 0; block < K / BLOCK; block++) {
            float sum = 0.f;
            for (int k = block * BLOCK; k < (block + 1) * BLOCK; k++) sum = std::fma(w[k], x[k], sum);
            y = std::fma(sum, scale[size_t(n) * (K / BLOCK) + block], y);
        }
        return y;
    }
};

// Rows of activations and of results, each with a margin that has to stay as it is.
struct Rows {
    static constexpr int MARGIN = 16;
    const float UNTOUCHED = -12345.f;
    Guarded memory;
    int N;
    std::vector<float> y;
    const float* x[MAX_STEP_ROWS];
    float* out[MAX_STEP_ROWS];

    Rows(int K, int N, std::mt19937& random) : memory(sizeof(float) * K * MAX_STEP_ROWS), N(N) {
        std::normal_distribution<float> normal;
        y.resize(size_t(N + MARGIN) * MAX_STEP_ROWS);
        for (int r = 0; r < MAX_STEP_ROWS; r++) {
            float* row = (float*)memory.begin + int64_t(r) * K;
            for (int k = 0; k < K; k++) row[k] = normal(random);
            x[r] = row, out[r] = &y[size_t(N + MARGIN) * r];
        }
    }
    void clear() { std::fill(y.begin(), y.end(), UNTOUCHED); }

    void check(const std::vector<float>& expected, int first, int num_rows, const char* how, const Matrix& m) const {
        for (int r = 0; r < MAX_STEP_ROWS; r++)
            for (int n = 0; n < N + MARGIN; n++) {
                const bool is_computed = r >= first && r < first + num_rows && n < N;
                const float wanted = is_computed ? expected[size_t(r) * N + n] : UNTOUCHED;
                if (is_same(out[r][n], wanted)) continue;
                printf("%s, format %d, K %d, N %d, rows %d to %d: row %d, output %d is %a (%08x), not %a (%08x)\n", how,
                       m.format, m.K, N, first, first + num_rows - 1, r, n, out[r][n], bits_of(out[r][n]), wanted,
                       bits_of(wanted));
                exit(1);
            }
    }
};

template <int FORMAT, int R = fused_rows(FORMAT)>
void check_fused(const Matrix& m, Rows& rows, const std::vector<float>& expected) {
    rows.clear();
    fused<FORMAT, R>(m.view(), m.N / LANES, rows.x + 3, rows.out + 3);
    rows.check(expected, 3, R, "fused", m);
    if constexpr (R > 1) check_fused<FORMAT, R - 1>(m, rows, expected);
}

template <int FORMAT>
void check_staged(const Matrix& m, Rows& rows, const std::vector<float>& expected) {
    for (int num_rows : {1, 2, 5, 6, 7, 11, 12, 13, 23, 64}) {
        rows.clear();
        for (int panel = 0; panel < m.N / LANES; panel++)
            staged_panel<FORMAT>(m.view().at(panel), num_rows, rows.x, rows.out, panel * LANES);
        rows.check(expected, 0, num_rows, "staged", m);
    }
}

template <int FORMAT>
void check_format(bool is_few) {
    std::mt19937 random(FORMAT + 1);
    for (int K : {32, 96, 160, 384, 2880})
        for (int num_panels : {1, 2, 3, 9}) {
            if ((K > 160 && num_panels == 9) || (is_few && K > 384 && num_panels > 1)) continue;
            const Matrix m(FORMAT, num_panels, K, random);
            Rows rows(K, m.N, random);
            std::vector<float> expected(size_t(m.N) * MAX_STEP_ROWS);
            for (int r = 0; r < MAX_STEP_ROWS; r++)
                for (int n = 0; n < m.N; n++) expected[size_t(r) * m.N + n] = m.product(n, rows.x[r]);
            for (int num_rows = 1; num_rows <= MAX_STEP_ROWS; num_rows++) {
                if (is_few && K > 96 && num_rows > 14 && num_rows % 25) continue;
                rows.clear();
                matmul(m.view(), num_panels, num_rows, rows.x, rows.out);
                rows.check(expected, 0, num_rows, "matmul", m);
            }
            check_fused<FORMAT>(m, rows, expected);
            if constexpr (has_scales(FORMAT)) check_staged<FORMAT>(m, rows, expected);  // whether it is used here or not
        }
}

// exp within 2 units in the last place, of all sizes; then what else has to have the same bits everywhere.
uint64_t check_functions() {
    uint64_t hash = 0xCBF29CE484222325;  // FNV-1a
    const auto add = [&hash](float x) { hash = (hash ^ bits_of(x)) * 0x100000001B3; };
    for (int step = -89000; step < 89000; step++) {
        const float x = step * 1e-3f, got = exp_lanes(splat(x))[step & (W - 1)];
        const double wanted = std::exp(double(x < -87.33654f ? -87.33654f : x > 88.37626f ? 88.37626f : x));
        if (std::fabs(got - wanted) > wanted * 0x1p-22) {
            printf("exp(%a) is %a, not %a\n", x, got, wanted);
            exit(1);
        }
        add(got), add(silu(splat(x))[0]);
    }
    for (uint32_t code = 0; code < 0x10000; code++) {
        uint16_t half[LANES];
        std::fill(half, half + LANES, uint16_t(code));
        const float wide = load_values(half)[W - 1];
        uint16_t back;
        store_value(&back, wide);
        if (bits_of(wide) != code << 16 || (back != code && !(std::isnan(wide) && back == (code | 64)))) {
            printf("bfloat16 %04x comes out as %08x and goes in as %04x\n", code, bits_of(wide), back);
            exit(1);
        }
    }
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    for (int trial = 0; trial < 100000; trial++) {
        const uint32_t bits = trial % 8 ? bits_of(normal(random)) : uint32_t(random() % 0x7F00) << 16 | 0x8000;
        const double x = float_of(bits), below = x - float_of(bits & 0xFFFF0000);
        const double above = float_of((bits & 0xFFFF0000) + 0x10000) - x;
        const bool is_up = std::fabs(below) == std::fabs(above) ? bits >> 16 & 1 : std::fabs(above) < std::fabs(below);
        uint16_t got;
        store_value(&got, float_of(bits));
        if (got != (bits >> 16) + is_up) {
            printf("%08x is rounded to bfloat16 %04x\n", bits, got);
            exit(1);
        }
    }
    for (int trial = 0; trial < 1000; trial++) {
        float lanes[LANES];
        for (float& lane : lanes) lane = normal(random);
        vf v[VECTORS];
        for (int n = 0; n < VECTORS; n++) v[n] = load(lanes + n * W);
        const float sum = sum_panel(v);
        for (int width = LANES / 2; width; width /= 2)
            for (int lane = 0; lane < width; lane++) lanes[lane] += lanes[lane + width];
        if (!is_same(sum, lanes[0])) {
            printf("a sum of sixteen lanes is %a, not %a\n", sum, lanes[0]);
            exit(1);
        }
    }
    return hash;
}

}  // namespace

int main(int num_words, char**) {
    const bool is_few = num_words > 1;
    const uint64_t hash = check_functions();
    check_format<FLOAT32>(is_few);
    check_format<BFLOAT16>(is_few);
    check_format<MXFP4>(is_few);
    check_format<INT8>(is_few);
    check_format<FP8>(is_few);
    printf("right %d %016llx\n", W, (unsigned long long)hash);
    return 0;
}
