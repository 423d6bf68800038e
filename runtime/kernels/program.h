// What a program is made of: operations, the rows of a step, and one thread's share of the work.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "panels.h"

extern "C" {

// Mirrored field by field by `Op` and `RowArrays` in runtime/program.py.
struct Op {
    int32_t kind;
    int32_t i[11];
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

// The weights of an operation: their format is its last integer, the scales of MXFP4 are its last pointer.
inline Panels weights_of(const Op& op, int pointer, int K) {
    return {op.i[10], K, (const uint8_t*)op.p[pointer], (const uint8_t*)op.p[11]};
}

// RMSNorm; a null weight copies.
inline void rms_norm(const float* x, const float* weight, int D, float eps, float* y) {
    if (!weight) {
        std::memcpy(y, x, sizeof(float) * D);
        return;
    }
    v16f square = v16f{};
    for (int d = 0; d < D; d += LANES) square += load(x + d) * load(x + d);
    float inverse = 1.0f / std::sqrt(sum_lanes(square) / D + eps);
    for (int d = 0; d < D; d += LANES) store(y + d, load(x + d) * inverse * load(weight + d));
}

// One thread's part of the team's work, and its private scratch.
struct Worker {
    int id, count;
    std::vector<float>& scratch;
    void slice(int total, int& begin, int& end) const {
        begin = int(int64_t(total) * id / count);
        end = int(int64_t(total) * (id + 1) / count);
    }
    float* reserve(int64_t floats) const {
        if (int64_t(scratch.size()) < floats) scratch.resize(floats);
        return scratch.data();
    }
};
