// The parts of a program: operations, the rows of a step, and thread-private memory.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "matmul.h"

extern "C" {

// Mirrored field by field by `Op` and `RowArrays` in runtime/backends/cpu/program.py.
struct Op {
    int32_t kind;
    int32_t i[12];
    float f[4];
    void* p[12];
};

struct Rows {
    int32_t num_rows;
    int32_t num_logit_rows;
    const int32_t* token;      // [num_rows]
    const int32_t* slot;       // [num_rows] index of the sequence's cache
    const int32_t* position;   // [num_rows]
    const int32_t* key_end;    // [num_rows] one past the last position that the row attends to
    const int32_t* logit_row;  // [num_logit_rows] rows whose logits are wanted
};
}

// The format of an operation's weights: its last integer.
inline int32_t format_of(const Op& op) { return op.i[11]; }

inline Panels weights_of(const Op& op, int pointer, int K) {
    return {format_of(op), K, (const uint8_t*)op.p[pointer]};
}

// RMSNorm; a null weight copies.
inline void rms_norm(const float* x, const float* weight, int D, float eps, float* y) {
    if (!weight) {
        std::memcpy(y, x, sizeof(float) * D);
        return;
    }
    vf square[VECTORS] = {};
    for (int d = 0; d < D; d += LANES)
        for (int v = 0; v < VECTORS; v++) square[v] = mul_add(load(x + d + v * W), load(x + d + v * W), square[v]);
    const float inverse = 1.0f / std::sqrt(sum_panel(square) / D + eps);
    for (int d = 0; d < D; d += W) store(y + d, load(x + d) * inverse * load(weight + d));
}

inline int num_blocks_of(int total, int size) { return (total + size - 1) / size; }

// Columns of a matrix product per work item: a few panels, enough to make taking an item cheap and few enough to occupy
// every thread.
struct Columns {
    int num_panels, chunk;
    Columns(int num_panels, int64_t panel_bytes, int num_threads) : num_panels(num_panels), chunk(4) {
        while (chunk * panel_bytes < 32768 && num_panels >= 8 * chunk * num_threads) chunk *= 2;
    }
    int num_items() const { return num_blocks_of(num_panels, chunk); }
    int begin(int item) const { return item * chunk; }
    int end(int item) const { return std::min(num_panels, (item + 1) * chunk); }
};

// One thread: the number of threads, its private memory, and the operations that `prepared` and `lists` are for.
struct alignas(64) Worker {
    int num_threads = 1;
    std::vector<float> scratch, prepared;
    std::vector<int32_t> lists;
    int prepared_for = -1, lists_for = -1;

    // A step begins: what was prepared was for another.
    void begin(int threads) {
        num_threads = threads;
        prepared_for = lists_for = -1;
    }

    static float* reserve(std::vector<float>& memory, int64_t floats) {
        if (int64_t(memory.size()) < floats) memory.resize(floats);
        return memory.data();
    }
    float* reserve(int64_t floats) { return reserve(scratch, floats); }

    // Normed rows, computed by each thread that needs them, which is cheaper than waiting for another thread.
    float* normed(int op, int num_rows, int D, const float* h, const int32_t* row_of, const float* weight, float eps) {
        float* x = reserve(prepared, int64_t(num_rows) * D);
        if (prepared_for == op) return x;
        for (int r = 0; r < num_rows; r++)
            rms_norm(h + int64_t(row_of ? row_of[r] : r) * D, weight, D, eps, x + int64_t(r) * D);
        prepared_for = op;
        return x;
    }
};

// Arguments of a work item: its operation and that operation's index, the rows, its own index, its thread.
struct Item {
    const Op& op;
    int number;
    const Rows& rows;
    int item;
    Worker& me;
};
