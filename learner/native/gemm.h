// Matrix products of tall activations with small weights. Weights are packed once per call of a region and read
// by all its steps; accumulators of TILE_ROWS x PANEL entries stay in registers. Every entry is summed in the
// order of k whatever the tile, so results do not depend on how rows are shared among threads.
#pragma once

#include <algorithm>

#include "lanes.h"
#include "memory.h"

constexpr int PANEL = 2 * LANES;
constexpr int AHEAD = 16;  // rows of a panel fetched before they are needed

// [k, n] in panels of PANEL columns, [panels, k, PANEL]; zeros fill the last panel.
struct Packed {
    const float *data;
    int64_t k, n;
};

inline int64_t panel_count(int64_t n) { return (n + PANEL - 1) / PANEL; }

// Entry (i, j) of the matrix lies at from[i * row_step + j * column_step].
inline Packed pack(const float *from, int64_t k, int64_t n, int64_t row_step, int64_t column_step, Scratch &scratch) {
    float *data = scratch.take(panel_count(n) * PANEL * k);
    for (int64_t j0 = 0; j0 < n; j0 += PANEL) {
        const int64_t width = std::min<int64_t>(PANEL, n - j0);
        float *panel = data + j0 * k;
        for (int64_t i = 0; i < k; i++)
            for (int64_t j = 0; j < PANEL; j++)
                panel[i * PANEL + j] = j < width ? from[i * row_step + (j0 + j) * column_step] : 0.0f;
    }
    return {data, k, n};
}

// [columns, rows] of a matrix [rows, columns] whose rows lie `step` apart.
inline const float *transpose(const float *from, int64_t rows, int64_t columns, int64_t step, Scratch &scratch) {
    float *out = scratch.take(rows * columns);
    for (int64_t j = 0; j < columns; j++)
        for (int64_t i = 0; i < rows; i++) out[j * rows + i] = from[i * step + j];
    return out;
}

// Of a torch Linear: weight [outputs, inputs], applied to rows of inputs.
inline Packed pack_linear(const float *weight, int64_t outputs, int64_t inputs, Scratch &scratch, int64_t stride = 0) {
    return pack(weight, inputs, outputs, 1, stride ? stride : inputs, scratch);
}

// Of a matrix [rows, columns] applied from the right as it stands.
inline Packed pack_plain(const float *matrix, int64_t rows, int64_t columns, Scratch &scratch) {
    return pack(matrix, rows, columns, columns, 1, scratch);
}

template <int ROWS, class Lanes0, class Lanes1>
inline void gemm_tile(const float *a, int64_t a_step, const float *panel, int64_t k, float *c, int64_t c_step,
                      const float *bias, bool add, Lanes0 lanes0, Lanes1 lanes1, bool both) {
    Vec sums[ROWS][2];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) {
        sums[r][0] = add ? load(c + r * c_step, lanes0) : bias ? load(bias, lanes0) : Vec{};
        sums[r][1] = !both  ? Vec{}
                     : add  ? load(c + r * c_step + LANES, lanes1)
                     : bias ? load(bias + LANES, lanes1)
                            : Vec{};
    }
    for (int64_t p = 0; p < k; p++, panel += PANEL) {
        const Vec b0 = load(panel, Full{}), b1 = load(panel + LANES, Full{});
        __builtin_prefetch(panel + AHEAD * PANEL);
        __builtin_prefetch(panel + AHEAD * PANEL + LANES);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) {
            const float x = a[r * a_step + p];
            sums[r][0] += x * b0;
            sums[r][1] += x * b1;
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) {
        store(c + r * c_step, sums[r][0], lanes0);
        if (both) store(c + r * c_step + LANES, sums[r][1], lanes1);
    }
}

template <int ROWS>
inline void gemm_rows(int64_t rows, const float *a, int64_t a_step, const float *panel, int64_t k, float *c,
                      int64_t c_step, const float *bias, bool add, int64_t width) {
    if constexpr (ROWS > 1)
        if (rows < ROWS) return gemm_rows<ROWS - 1>(rows, a, a_step, panel, k, c, c_step, bias, add, width);
    if (width >= PANEL)
        gemm_tile<ROWS>(a, a_step, panel, k, c, c_step, bias, add, Full{}, Full{}, true);
    else if (width > LANES)
        gemm_tile<ROWS>(a, a_step, panel, k, c, c_step, bias, add, Full{}, Part{(int)width - LANES}, true);
    else
        gemm_tile<ROWS>(a, a_step, panel, k, c, c_step, bias, add, Part{(int)width}, Full{}, false);
}

// c [rows, n] = a [rows, k] b (+ bias [n], or + c itself); steps are floats from row to row.
inline void gemm(int64_t rows, const float *a, int64_t a_step, const Packed &b, float *c, int64_t c_step,
                 const float *bias = nullptr, bool add = false) {
    const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS, tall = tiles ? (rows + tiles - 1) / tiles : 0;
    for (int64_t j = 0; j < b.n; j += PANEL)
        for (int64_t i = 0; i < rows; i += tall)
            gemm_rows<TILE_ROWS>(std::min<int64_t>(tall, rows - i), a + i * a_step, a_step, b.data + j * b.k,
                                 b.k, c + i * c_step + j, c_step, bias ? bias + j : nullptr, add, b.n - j);
}

inline void gemm_add(int64_t rows, const float *a, int64_t a_step, const Packed &b, float *c, int64_t c_step) {
    gemm(rows, a, a_step, b, c, c_step, nullptr, true);
}

template <int COLUMNS>
inline void cross_tile(int64_t count, const float *a, const float *panel, int64_t rows, float *c, int64_t c_step,
                       int64_t width) {
    if constexpr (COLUMNS > 1)
        if (count < COLUMNS) return cross_tile<COLUMNS - 1>(count, a, panel, rows, c, c_step, width);
    Vec sums[COLUMNS][2] = {};
    for (int64_t p = 0; p < rows; p++, panel += PANEL, a += TILE_ROWS) {
        const Vec b0 = load(panel, Full{}), b1 = load(panel + LANES, Full{});
#pragma GCC unroll 16
        for (int i = 0; i < COLUMNS; i++) {
            sums[i][0] += a[i] * b0;
            sums[i][1] += a[i] * b1;
        }
    }
    const int first = (int)std::min<int64_t>(width, LANES), second = (int)std::min<int64_t>(width - first, LANES);
#pragma GCC unroll 16
    for (int i = 0; i < COLUMNS; i++) {
        float *row = c + i * c_step;
        store(row, load(row, Part{first}) + sums[i][0], Part{first});
        if (second > 0) store(row + LANES, load(row + LANES, Part{second}) + sums[i][1], Part{second});
    }
}

inline int64_t cross_space(int64_t rows, int64_t n) { return rows * (panel_count(n) * PANEL + TILE_ROWS); }

// c [m, n] += a^T b, a [rows, m], b [rows, n]: a weight gradient. `space` holds cross_space(rows, n) floats.
inline void cross(int64_t rows, const float *a, int64_t a_step, int64_t m, const float *b, int64_t b_step, int64_t n,
                  float *c, int64_t c_step, float *space) {
    float *columns = space + rows * panel_count(n) * PANEL;  // some of a, side by side
    for (int64_t j = 0; j < n; j += PANEL) {
        const int64_t width = std::min<int64_t>(PANEL, n - j);
        for (int64_t p = 0; p < rows; p++) {
            const float *from = b + p * b_step + j;
            float *to = space + j * rows + p * PANEL;
            if (width < PANEL) std::memset(to, 0, PANEL * sizeof(float));
            each(width, [&](int64_t i, auto lanes) { store(to + i, load(from + i, lanes), lanes); });
        }
    }
    for (int64_t i = 0; i < m; i += TILE_ROWS) {
        const int64_t count = std::min<int64_t>(TILE_ROWS, m - i);
        for (int64_t p = 0; p < rows; p++) {
            const float *from = a + p * a_step + i;
            __builtin_prefetch(from + 2 * TILE_ROWS);
            if (count == TILE_ROWS)
                std::memcpy(columns + p * TILE_ROWS, from, TILE_ROWS * sizeof(float));
            else
                each(count, [&](int64_t k, auto lanes) {
                    store(columns + p * TILE_ROWS + k, load(from + k, lanes), lanes);
                });
        }
        for (int64_t j = 0; j < n; j += PANEL)
            cross_tile<TILE_ROWS>(count, columns, space + j * rows, rows, c + i * c_step + j, c_step,
                                  std::min<int64_t>(PANEL, n - j));
    }
}
