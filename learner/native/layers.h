// The layers of one row: RMS norm with SiLU and its gradient, block GRU gates, grouped softmax, inverse-CDF
// samples. Equations and references: learner/nn/layers.py, categorical.py and bptt.py.
#pragma once

#include "lanes.h"

constexpr float NORM_EPS = 1e-4f;  // added to the mean square
constexpr float UPDATE_BIAS = -1.0f;

inline float inverse_rms(const float *a, int64_t n) {
    Vec squares = {};
    each(n, [&](int64_t i, auto lanes) {
        const Vec x = load(a + i, lanes);
        squares += x * x;
    });
    return 1.0f / std::sqrt(sum(squares) / (float)n + NORM_EPS);
}

// x = silu(a / rms(a) * scale).
inline void norm_silu(const float *a, const float *scale, float *x, int64_t n) {
    const float inverse = inverse_rms(a, n);
    each(n, [&](int64_t i, auto lanes) {
        const Vec y = load(a + i, lanes) * inverse * load(scale + i, lanes);
        store(x + i, y * sigmoid(y), lanes);
    });
}

// Of the same: grad_a from grad_x, which may be the same memory; also x again, and the row's share of the
// gradient of scale.
inline void norm_silu_back(const float *a, const float *scale, const float *grad_x, float *grad_a, float *x,
                           float *grad_scale, int64_t n) {
    const float inverse = inverse_rms(a, n);
    Vec dots = {};
    each(n, [&](int64_t i, auto lanes) {
        const Vec unit = load(a + i, lanes) * inverse, factor = load(scale + i, lanes);
        const Vec y = unit * factor, gate = sigmoid(y), active = y * gate;
        const Vec grad_y = load(grad_x + i, lanes) * (gate + active * (1.0f - gate));
        store(x + i, active, lanes);
        store(grad_scale + i, grad_y * unit, lanes);
        store(grad_a + i, grad_y * factor * inverse, lanes);
        dots += grad_y * factor * inverse * unit;
    });
    const float mean = sum(dots) / (float)n;
    each(n, [&](int64_t i, auto lanes) {
        store(grad_a + i, load(grad_a + i, lanes) - load(a + i, lanes) * inverse * mean, lanes);
    });
}

// New deter of one block from the old one and gates [3, d]: reset, candidate, update. May be the same memory.
inline void gru(const float *gates, const float *before, float *after, int64_t d) {
    each(d, [&](int64_t i, auto lanes) {
        const Vec old = load(before + i, lanes), reset = sigmoid(load(gates + i, lanes));
        const Vec candidate = tanh(reset * load(gates + d + i, lanes));
        const Vec update = sigmoid(load(gates + 2 * d + i, lanes) + UPDATE_BIAS);
        store(after + i, old + update * (candidate - old), lanes);
    });
}

// Gradient of the gates from that of the new deter; `kept` is the direct part of the old deter's.
inline void gru_back(const float *gates, const float *before, const float *grad, float *grad_gates, float *kept,
                     int64_t d) {
    each(d, [&](int64_t i, auto lanes) {
        const Vec old = load(before + i, lanes), by = load(grad + i, lanes);
        const Vec reset = sigmoid(load(gates + i, lanes)), raw = load(gates + d + i, lanes);
        const Vec candidate = tanh(reset * raw), update = sigmoid(load(gates + 2 * d + i, lanes) + UPDATE_BIAS);
        const Vec inner = by * update * (1.0f - candidate * candidate) * reset;
        store(grad_gates + i, inner * raw * (1.0f - reset), lanes);
        store(grad_gates + d + i, inner, lanes);
        store(grad_gates + 2 * d + i, by * (candidate - old) * update * (1.0f - update), lanes);
        store(kept + i, by * (1.0f - update), lanes);
    });
}

// Softmax over the first axis of [classes, variables].
inline void softmax_classes(const float *logits, float *soft, int64_t classes, int64_t variables) {
    each(variables, [&](int64_t s, auto lanes) {
        Vec most = load(logits + s, lanes);
        for (int64_t c = 1; c < classes; c++) {
            most = at_least(load(logits + c * variables + s, lanes), most);
        }
        Vec total = {};
        for (int64_t c = 0; c < classes; c++) {
            const Vec e = exp(load(logits + c * variables + s, lanes) - most);
            total += e;
            store(soft + c * variables + s, e, lanes);
        }
        const Vec share = 1.0f / total;
        for (int64_t c = 0; c < classes; c++)
            store(soft + c * variables + s, load(soft + c * variables + s, lanes) * share, lanes);
    });
}

// Class of each variable: how many of the cumulated probabilities, mixed with the uniform distribution, lie below
// its uniform number; the last class takes what the others leave. `mixed` may be the same memory as `soft`.
inline void sample_classes(const float *soft, const float *uniform, float unimix, float *mixed, int32_t *index,
                           int64_t classes, int64_t variables) {
    const float keep = 1.0f - unimix, floor = unimix / (float)classes;
    each(variables, [&](int64_t s, auto lanes) {
        const Vec u = load(uniform + s, lanes);
        Vec reached = {};
        VecInt below = {};
        for (int64_t c = 0; c < classes; c++) {
            Vec p = load(soft + c * variables + s, lanes);
            if (unimix != 0.0f) p = p * keep + floor;
            store(mixed + c * variables + s, p, lanes);
            reached += p;
            if (c + 1 < classes) below -= reached < u;  // true is -1
        }
        float bits[LANES];
        std::memcpy(bits, &below, sizeof bits);
        store((float *)index + s, load(bits, Full{}), lanes);
    });
}

// One-hot [classes, variables] of the sampled classes.
inline void one_hot(const int32_t *index, float *out, int64_t classes, int64_t variables) {
    std::memset(out, 0, (size_t)(classes * variables) * sizeof(float));
    for (int64_t s = 0; s < variables; s++) out[index[s] * variables + s] = 1.0f;
}

template <int BLOCK, class Last>
inline void gather_block(const int32_t *index, const float *table, int64_t step, int64_t variables, const float *bias,
                         float factor, float *out, Last last) {
    Vec totals[BLOCK] = {};
    for (int64_t s = 0; s < variables; s++) {
        const float *row = table + ((int64_t)index[s] * variables + s) * step;
#pragma GCC unroll 8
        for (int b = 0; b + 1 < BLOCK; b++) totals[b] += load(row + b * LANES, Full{});
        totals[BLOCK - 1] += load(row + (BLOCK - 1) * LANES, last);
    }
#pragma GCC unroll 8
    for (int b = 0; b < BLOCK; b++) {
        const int64_t i = b * LANES;
        if (b + 1 < BLOCK)
            store(out + i, load(bias + i, Full{}) + factor * totals[b], Full{});
        else
            store(out + i, load(bias + i, last) + factor * totals[b], last);
    }
}

// out [n] = bias [n] + factor * sum of the rows of `table` [classes * variables, n] that a one-hot selects; `step`
// from row to row of the table. `bias` may be `out`.
inline void gather_rows(const int32_t *index, const float *table, int64_t step, const float *bias, float factor,
                        float *out, int64_t variables, int64_t n) {
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        gather_block<4>(index, table + i, step, variables, bias + i, factor, out + i, Full{});
    each(n - i, [&](int64_t j, auto lanes) {
        gather_block<1>(index, table + i + j, step, variables, bias + i + j, factor, out + i + j, lanes);
    });
}

// Expected value under softmax(logits [bins]) of `positions` [bins]: zero, upper half, lower half. Mirrored bins are
// subtracted before the sum: they reach 5e8, and a uniform distribution must give zero.
inline float two_hot_mean(const float *logits, const float *positions, int64_t bins) {
    const int64_t half = bins / 2;
    Vec mosts = splat(logits[0]);
    each(half, [&](int64_t i, auto lanes) {
        const Vec upper = load(logits + 1 + i, lanes), lower = load(logits + 1 + half + i, lanes);
        mosts = take(at_least(at_least(upper, lower), mosts), mosts, lanes);
    });
    const float most = largest(mosts);
    Vec totals = {}, means = {};
    each(half, [&](int64_t i, auto lanes) {
        const Vec upper = exp(load(logits + 1 + i, lanes) - most), lower = exp(load(logits + 1 + half + i, lanes) - most);
        totals += take(upper + lower, Vec{}, lanes);
        means += (upper - lower) * load(positions + 1 + i, lanes);
    });
    return sum(means) / (sum(totals) + exp(splat(logits[0] - most))[0]);
}
