// A model of two layers with every operation and every format of weights, on all of decode_cpu.cpp: prints a hash of its
// logits and best tokens, which has to be the same on every instruction set; or one line, and returns 1, where a number
// of threads or of rows a step gives other bits.

#include <cstdio>
#include <deque>
#include <random>

#include "decode_cpu.cpp"

namespace {

enum Kind { EMBED, QKV, ATTENTION, LINEAR, GATE_UP, ROUTER, CHOOSE, EXPERT_GATE_UP, EXPERT_DOWN, LM_HEAD, ARGMAX };

constexpr int D = 64, HEADS = 4, KV_HEADS = 2, DK = 32, DV = 16, ROTARY = 16, F = 96, E = 8, TOP_K = 3, I = 32, V = 100,
              PADDED_V = 112, NUM_TOKENS = 150, WINDOW = 16, SIZE = HEADS * DK;
constexpr float EPS = 1e-6f;

std::mt19937 random_bits(5);
std::deque<std::vector<uint8_t>> memory;  // of the program's; a deque does not move them

void* bytes(size_t num) { return memory.emplace_back(num).data(); }
float uniform(float from, float to) { return from + (to - from) * (float(random_bits() >> 8) * 0x1p-24f); }
float* uniforms(int num, float from, float to) {
    float* values = (float*)bytes(sizeof(float) * num);
    for (int n = 0; n < num; n++) values[n] = uniform(from, to);
    return values;
}
float* floats(int width) { return (float*)bytes(sizeof(float) * width * MAX_STEP_ROWS); }

// Panels of random weights, of about the same size in every format.
void* weights(int format, int num_matrices, int N, int K, bool is_gate_up = false) {
    const int64_t num = int64_t(num_matrices) * N * K, num_scales = num / BLOCK;
    std::vector<uint32_t> values(num), scales(num_scales);
    uint16_t* halves = (uint16_t*)values.data();
    uint8_t *codes = (uint8_t*)values.data(), *scale_bytes = (uint8_t*)scales.data();
    for (int64_t n = 0; n < num; n++) {
        const float value = uniform(-.3f, .3f);
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        if (format == FLOAT32) values[n] = bits;
        if (format == BFLOAT16) halves[n] = uint16_t(bits >> 16);
        if (format == MXFP4 || format == INT8) codes[n] = uint8_t(bits >> 4);  // of MXFP4 half of them are read
        if (format == FP8) codes[n] = uint8_t(bits >> 4 & 0xBF);
    }
    for (int64_t n = 0; n < num_scales; n++) {
        if (format == MXFP4) scale_bytes[n] = uint8_t(122 + random_bits() % 4);
        if (format == INT8) ((uint16_t*)scale_bytes)[n] = uint16_t(0x3B00 + random_bits() % 256);  // about .002
        if (format == FP8) scales[n] = 0x3DA00000 + random_bits() % 0x400000;                      // about .1
    }
    const Panels one{format, K, nullptr};
    void* panels = bytes(num_matrices * ((N + 15) / 16) * one.panel_bytes());
    const Matrices m{format, is_gate_up, num_matrices, N, K, codes, scale_bytes, (uint8_t*)panels};
    if (speedstack_pack(&m, sizeof m, 3)) printf("not packed\n"), exit(1);
    return panels;
}

struct Model {
    std::vector<Op> ops;
    float *hidden = floats(D), *query = floats(SIZE), *attended = floats(HEADS * DV), *dense = floats(F),
          *scores = floats(16), *choice_weight = floats(TOP_K), *expert = floats(TOP_K * I), *logits = floats(PADDED_V),
          *probability = floats(1);
    int32_t *choice = (int32_t*)floats(TOP_K), *best = (int32_t*)floats(1);

    void add(Kind kind, std::vector<int> i, std::vector<float> f, std::vector<void*> p, int format = 0) {
        Op op{};
        op.kind = kind, op.i[11] = format;
        std::copy(i.begin(), i.end(), op.i);
        std::copy(f.begin(), f.end(), op.f);
        std::copy(p.begin(), p.end(), op.p);
        ops.push_back(op);
    }
    float* norm(int width) { return uniforms(width, .8f, 1.2f); }

    void add_attention(int format, int window, int num_blocks, bool is_bfloat16, bool has_extras) {
        const int width = (HEADS + KV_HEADS) * DK + KV_HEADS * DV;
        void *keys = bytes(4 * KV_HEADS * num_blocks * 16 * DK), *values = bytes(4 * KV_HEADS * num_blocks * 16 * DV);
        float *cosine = uniforms(NUM_TOKENS * ROTARY / 2, -1, 1), *sine = uniforms(NUM_TOKENS * ROTARY / 2, -1, 1);
        float *bias = uniforms(width, -.1f, .1f), *sinks = uniforms(HEADS, -1, 1), *q = norm(DK), *k = norm(DK);
        if (!has_extras) bias = sinks = q = k = nullptr;
        add(QKV, {D, HEADS, KV_HEADS, DK, DV, ROTARY, num_blocks, is_bfloat16}, {EPS, .7f},
            {hidden, norm(D), weights(format, 1, width, D), query, keys, values, q, k, cosine, sine, bias}, format);
        add(ATTENTION, {HEADS, KV_HEADS, DK, DV, num_blocks, window, 1 << 30, is_bfloat16}, {.2f},
            {query, keys, values, sinks, attended});
        add(LINEAR, {HEADS * DV, D, 1, 0}, {}, {attended, weights(format, 1, D, HEADS * DV), hidden, nullptr,
                                                has_extras ? uniforms(D, -.1f, .1f) : nullptr}, format);
    }

    void add_experts(int format, bool is_clamped) {
        add(ROUTER, {D, E}, {EPS}, {hidden, norm(D), weights(FLOAT32, 1, E, D), scores, uniforms(E, -.1f, .1f)});
        add(CHOOSE, {E, TOP_K, is_clamped, 1}, {1.f},
            {scores, is_clamped ? nullptr : uniforms(E, -.1f, .1f), choice, choice_weight});
        add(EXPERT_GATE_UP, {D, I, E, TOP_K, is_clamped}, {EPS, 1.5f, 1.702f},
            {hidden, norm(D), weights(format, E, 2 * I, D, true), choice, expert, uniforms(E * 2 * I, -.1f, .1f)}, format);
        add(EXPERT_DOWN, {I, D, E, TOP_K, 0}, {}, {expert, hidden, weights(format, E, D, I), choice, choice_weight,
                                                   nullptr, uniforms(E * D, -.1f, .1f)}, format);
    }

    Model() {
        add(EMBED, {D, 3, 0}, {}, {uniforms(V * D, -1, 1), hidden, uniforms(D, -1, 1)});
        add_attention(BFLOAT16, 0, (NUM_TOKENS + 15) / 16, false, false);
        add(GATE_UP, {D, F}, {EPS}, {hidden, norm(D), weights(INT8, 1, 2 * F, D, true), dense}, INT8);
        add(LINEAR, {F, D, 1, 0}, {}, {dense, weights(FP8, 1, D, F), hidden, nullptr, nullptr}, FP8);
        add_experts(MXFP4, false);
        add_attention(FLOAT32, WINDOW, (WINDOW + MAX_STEP_ROWS) / 16, true, true);
        add_experts(MXFP4, true);
        add(LM_HEAD, {D, PADDED_V}, {EPS}, {hidden, norm(D), weights(FP8, 1, PADDED_V, D), logits}, FP8);
        add(ARGMAX, {V, PADDED_V, 0, 1}, {}, {logits, best, probability});
    }

    // Hash of a text's logits, best tokens and their probabilities, `chunk` rows a step.
    uint64_t run(int chunk, int num_threads) {
        uint64_t hash = 0xCBF29CE484222325;  // FNV-1a
        const auto take = [&hash](const void* from) {
            uint32_t bits;
            std::memcpy(&bits, from, 4);
            hash = (hash ^ bits) * 0x100000001B3;
        };
        for (int first = 0; first < NUM_TOKENS; first += chunk) {
            std::vector<int32_t> token, slot, position, end, row;
            for (int n = first; n < std::min(NUM_TOKENS, first + chunk); n++)
                token.push_back(n * 37 % V), slot.push_back(0), position.push_back(n), end.push_back(n + 1),
                    row.push_back(n - first);
            const int num = int(token.size());
            const Rows rows{num, num, token.data(), slot.data(), position.data(), end.data(), row.data()};
            if (speedstack_run(ops.data(), int(ops.size()), &rows, num_threads)) printf("refused\n"), exit(1);
            for (int r = 0; r < num; r++) {
                take(best + r), take(probability + r);
                for (int v = 0; v < V; v++) take(logits + r * PADDED_V + v);
                if (!(logits[r * PADDED_V] * 0 == 0)) printf("row %d: not a number\n", first + r), exit(1);
            }
        }
        return hash;
    }
};

}  // namespace

int main() {
    Model model;
    const uint64_t alone = model.run(1, 1);
    for (int num_threads : {1, 2, 3, 8})
        for (int chunk : {1, 2, 5, 8, 13, 64})
            if (model.run(chunk, num_threads) != alone) {
                printf("%d threads, %d rows a step: other bits\n", num_threads, chunk);
                return 1;
            }
    printf("right %016llx\n", (unsigned long long)alone);
    return 0;
}
