// Packs weight matrices from checkpoint order into panels; bits are moved, never changed.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "weights.h"

extern "C" {

// Mirrored field by field by `Matrices` in runtime/backends/cpu/packed_layout.py.
struct Matrices {
    int32_t format;      // of the panels, and of `values` but for the order
    int32_t is_gate_up;  // rows are gates, then as many ups: their panels come out alternating
    int64_t num_matrices, N, K;
    const uint8_t* values;  // [num_matrices, N, K]; of MXFP4 two codes a byte, the even one in the lower nibble
    // [num_matrices, N, K / 32], bytes of MXFP4 and bfloat16 of INT8; float32 [num_matrices, N, ceil(K / 64)] of FP8.
    const uint8_t* scales;
    uint8_t* panels;        // [num_matrices, ceil(N / 16), panel_bytes]
};
}

inline int64_t scale_bytes_a_row(int format, int64_t K) {
    const int64_t num_blocks = K / BLOCK;
    return format == FP8 ? (num_blocks + 1) / 2 * 4 : format == INT8 ? num_blocks * 2 : has_scales(format) ? num_blocks : 0;
}

inline int64_t panels_a_matrix(const Matrices& m) { return (m.N + LANES - 1) / LANES; }

// A chunk of sixteen outputs, of which `words` has four bytes each.
inline void pack_chunk(int format, const uint32_t* words, uint8_t* chunk) {
    if (chunk_k(format) == 4) {
        for (int j = 0; j < 4; j++)
            for (int l = 0; l < LANES; l++) chunk[j * LANES + l] = uint8_t(words[l] >> 8 * j);
    } else if (format == MXFP4_BYTES) {
        uint16_t pairs[2 * LANES];
        for (int l = 0; l < LANES; l++) {
            // Byte j: code j in the lower nibble, code j + 4 in the upper.
            uint32_t low = words[l] & 0xFFFF, high = words[l] >> 16;
            low = (low | low << 8) & 0x00FF00FF, high = (high | high << 8) & 0x00FF00FF;
            low = (low | low << 4) & 0x0F0F0F0F, high = (high | high << 4) & 0x0F0F0F0F;
            const uint32_t bytes = low | high << 4;
            pairs[l / 4 * 8 + l % 4] = uint16_t(bytes), pairs[l / 4 * 8 + 4 + l % 4] = uint16_t(bytes >> 16);
        }
        std::memcpy(chunk, pairs, CHUNK_BYTES);
    } else {
        std::memcpy(chunk, words, CHUNK_BYTES);
    }
}

// The `panel`th of all panels of all matrices. Rows past a matrix's last are zeros.
inline void pack_panel(const Matrices& m, int64_t panel) {
    const int64_t all = panels_a_matrix(m), matrix = panel / all, number = panel % all;
    const int64_t from = LANES * (m.is_gate_up ? number % 2 * (all / 2) + number / 2 : number);
    const int64_t num_chunks = m.K / chunk_k(m.format), row_bytes = 4 * num_chunks;
    const int64_t scale_bytes = scale_bytes_a_row(m.format, m.K);
    const int num_rows = int(std::min<int64_t>(m.N - from, LANES));
    const uint8_t* values = m.values + (matrix * m.N + from) * row_bytes;
    const uint8_t* scales = m.scales + (matrix * m.N + from) * scale_bytes;
    uint8_t* out = m.panels + panel * Panels{m.format, int(m.K), nullptr}.panel_bytes();
    uint32_t words[LANES] = {};
    for (int64_t chunk = 0; chunk < num_chunks; chunk++) {
        if (scale_bytes && chunk % GROUP_CHUNKS == 0) {
            const int64_t begin = chunk / GROUP_CHUNKS * 4, num = std::min<int64_t>(scale_bytes - begin, 4);
            uint32_t group[LANES] = {};
            for (int l = 0; l < num_rows; l++) std::memcpy(&group[l], scales + l * scale_bytes + begin, num);
            std::memcpy(out, group, CHUNK_BYTES);
            out += CHUNK_BYTES;
        }
        for (int l = 0; l < num_rows; l++) std::memcpy(&words[l], values + l * row_bytes + 4 * chunk, 4);
        pack_chunk(m.format, words, out);
        out += CHUNK_BYTES;
    }
}
