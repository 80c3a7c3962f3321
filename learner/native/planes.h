// Feature maps of as many images as a register has lanes: entry (y, x, c) is one register, one image per lane.
// Whatever the channel count no lane is idle, and pooling, norms and borders need no shuffles. Convolutions keep
// the sides of their input, which lies in a border of zeros.
#pragma once

#include <algorithm>

#include "layers.h"
#include "memory.h"

typedef float Images __attribute__((vector_size(LANES * 4), may_alias));
typedef uint8_t Bytes __attribute__((vector_size(LANES), may_alias));

struct Registers {  // containers take no pointers to types that may alias
    Images *data;
};

#if defined(__AVX512F__)
constexpr int OUT_TILE = 4, PIXEL_TILE = 4;   // accumulators of a convolution
constexpr int LEFT_TILE = 4, RIGHT_TILE = 5;  // of a weight gradient
#else
constexpr int OUT_TILE = 2, PIXEL_TILE = 4;
constexpr int LEFT_TILE = 2, RIGHT_TILE = 4;
#endif
constexpr int64_t LONG_RUN = 64;       // pixels that pay for reading and writing accumulators
constexpr int64_t WINDOW = 512;        // registers of input that stay in the nearest cache

inline Vec inverse_root(Vec x) {
#if defined(__AVX512F__)
    const Vec guess = (Vec)_mm512_rsqrt14_ps((__m512)x);  // 14 bits, doubled by one Newton step
    return guess * (1.5f - 0.5f * x * guess * guess);
#else
    for (int i = 0; i < LANES; i++) x[i] = 1.0f / std::sqrt(x[i]);
    return x;
#endif
}

// [height, width, channels] in a border of `pad` zeros.
struct Planes {
    Images *data;
    int64_t height, width, channels, pad;

    Planes(int64_t height, int64_t width, int64_t channels, int64_t pad, Scratch &scratch)
        : data(nullptr), height(height), width(width), channels(channels), pad(pad) {
        const int64_t size = (height + 2 * pad) * row();
        data = scratch.take<Images>(size);
        std::memset(data, 0, (size_t)size * sizeof(Images));
    }
    int64_t row() const { return (width + 2 * pad) * channels; }
    Images *at(int64_t y, int64_t x) const { return data + (y + pad) * row() + (x + pad) * channels; }
    // What a convolution of side 2 * pad + 1 reads for the row y.
    const Images *window(int64_t y) const { return data + y * row(); }
};

// A convolution's weights in tiles of OUT_TILE outputs: [tile, side, side * inputs, OUT_TILE], zeros at the end.
struct Filter {
    const float *data, *bias;  // bias may be null
    int64_t outputs, inputs, side;
};

// weight [outputs, inputs, side, side], or for the gradient of the input: read backwards, its axes exchanged.
inline Filter pack_filter(const float *weight, const float *bias, int64_t outputs, int64_t inputs, int64_t side,
                          bool backwards, Scratch &scratch) {
    const int64_t O = backwards ? inputs : outputs, C = backwards ? outputs : inputs;
    const int64_t tiles = (O + OUT_TILE - 1) / OUT_TILE, taps = side * side;
    float *data = scratch.take(tiles * taps * C * OUT_TILE), *to = data;
    for (int64_t tile = 0; tile < tiles; tile++)
        for (int64_t tap = 0; tap < taps; tap++)
            for (int64_t c = 0; c < C; c++)
                for (int64_t o = tile * OUT_TILE; o < (tile + 1) * OUT_TILE; o++)
                    *to++ = o >= O      ? 0.0f
                            : backwards ? weight[(c * inputs + o) * taps + taps - 1 - tap]
                                        : weight[(o * inputs + c) * taps + tap];
    return {data, bias, O, C, side};
}

// One tile of results, of `rows` rows of the kernel; added to what there is unless they are the first.
template <int OUT, int PIXELS>
inline void filter_tile(const Images *in, int64_t row, int64_t rows, bool first, const float *weight, const Filter &f,
                        int64_t o, Images *out) {
    Vec sums[PIXELS][OUT];
#pragma GCC unroll 8
    for (int x = 0; x < PIXELS; x++)
#pragma GCC unroll 8
        for (int i = 0; i < OUT; i++)
            sums[x][i] = first ? splat(f.bias ? f.bias[o + i] : 0.0f) : (Vec)out[x * f.outputs + o + i];
    for (int64_t k = 0; k < rows; k++, in += row) {
        const Images *from = in;
        for (int64_t t = 0; t < f.side * f.inputs; t++, from++, weight += OUT_TILE) {
#pragma GCC unroll 8
            for (int i = 0; i < OUT; i++) {
                const float w = weight[i];
#pragma GCC unroll 8
                for (int x = 0; x < PIXELS; x++) sums[x][i] += w * (Vec)from[x * f.inputs];
            }
        }
    }
#pragma GCC unroll 8
    for (int x = 0; x < PIXELS; x++)
#pragma GCC unroll 8
        for (int i = 0; i < OUT; i++) out[x * f.outputs + o + i] = (Images)sums[x][i];
}

template <int OUT, int PIXELS>
inline void filter_part(int64_t outputs, int64_t pixels, const Images *in, int64_t row, int64_t rows, bool first,
                        const float *weight, const Filter &f, int64_t o, Images *out) {
    if constexpr (OUT > 1)
        if (outputs < OUT)
            return filter_part<OUT - 1, PIXELS>(outputs, pixels, in, row, rows, first, weight, f, o, out);
    if constexpr (PIXELS > 1)
        if (pixels < PIXELS)
            return filter_part<OUT, PIXELS - 1>(outputs, pixels, in, row, rows, first, weight, f, o, out);
    filter_tile<OUT, PIXELS>(in, row, rows, first, weight, f, o, out);
}

// Row y of the convolution of x, as [width, outputs].
inline void filter_row(const Filter &f, const Planes &x, int64_t y, Images *out) {
    const int64_t wide = f.side * f.inputs * OUT_TILE;
    const int64_t some = std::max<int64_t>(1, WINDOW / ((f.side + PIXEL_TILE - 1) * f.inputs));
    for (int64_t at = 0; at < x.width; at += PIXEL_TILE)
        for (int64_t k = 0; k < f.side; k += some)
            for (int64_t o = 0; o < f.outputs; o += OUT_TILE)
                filter_part<OUT_TILE, PIXEL_TILE>(f.outputs - o, x.width - at, x.window(y + k) + at * f.inputs, x.row(),
                                                  std::min(some, f.side - k), k == 0,
                                                  f.data + (o / OUT_TILE * f.side + k) * wide, f, o,
                                                  out + at * f.outputs);
}

// A run of pixels with `step` registers each, in rows that lie `row` apart.
struct Run {
    const Images *data;
    int64_t row, step;
};

// sums [RIGHT, LEFT] += products of the first registers of left and right at the same pixels.
template <int LEFT, int RIGHT>
inline void cross_images(Run left, Run right, int64_t rows, int64_t width, Images *sums, int64_t sums_step) {
    Vec totals[RIGHT][LEFT];
#pragma GCC unroll 8
    for (int j = 0; j < RIGHT; j++)
#pragma GCC unroll 8
        for (int i = 0; i < LEFT; i++) totals[j][i] = (Vec)sums[j * sums_step + i];
    for (int64_t y = 0; y < rows; y++) {
        const Images *a = left.data + y * left.row, *b = right.data + y * right.row;
        for (int64_t x = 0; x < width; x++, a += left.step, b += right.step)
#pragma GCC unroll 8
            for (int j = 0; j < RIGHT; j++) {
                const Vec factor = (Vec)b[j];
#pragma GCC unroll 8
                for (int i = 0; i < LEFT; i++) totals[j][i] += factor * (Vec)a[i];
            }
    }
#pragma GCC unroll 8
    for (int j = 0; j < RIGHT; j++)
#pragma GCC unroll 8
        for (int i = 0; i < LEFT; i++) sums[j * sums_step + i] = (Images)totals[j][i];
}

template <int LEFT, int RIGHT>
inline void cross_part(int64_t left_count, int64_t right_count, Run left, Run right, int64_t rows, int64_t width,
                       Images *sums, int64_t sums_step) {
    if constexpr (LEFT > 1)
        if (left_count < LEFT)
            return cross_part<LEFT - 1, RIGHT>(left_count, right_count, left, right, rows, width, sums, sums_step);
    if constexpr (RIGHT > 1)
        if (right_count < RIGHT)
            return cross_part<LEFT, RIGHT - 1>(left_count, right_count, left, right, rows, width, sums, sums_step);
    cross_images<LEFT, RIGHT>(left, right, rows, width, sums, sums_step);
}

// Adds to sums [side, side * C, O] the weight gradient of a convolution of x [.., C] by results whose gradient is g
// [.., O]; g's first row is x's row y.
inline void filter_grad(const Planes &g, const Planes &x, int64_t y, int64_t side, Images *sums) {
    const int64_t O = g.channels, taps = side * x.channels;
    const int64_t block = std::max<int64_t>(1, LONG_RUN / g.width), tiles = (taps + RIGHT_TILE - 1) / RIGHT_TILE;
    const int64_t tile = (taps + tiles - 1) / tiles;
    for (int64_t at = 0; at < g.height; at += block)
        for (int64_t k = 0; k < side; k++)
            for (int64_t t = 0; t < taps; t += tile)
                for (int64_t o = 0; o < O; o += LEFT_TILE)
                    cross_part<LEFT_TILE, RIGHT_TILE>(O - o, std::min(tile, taps - t), {g.at(at, 0) + o, g.row(), O},
                                                      {x.window(y + at + k) + t, x.row(), x.channels},
                                                      std::min(block, g.height - at), g.width,
                                                      sums + (k * taps + t) * O + o, O);
}

inline void add_lanes(const Images *sums, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i++) out[i] = sum((Vec)sums[i]);
}

// The sums of `filter_grad` over all lanes as out [O, C, side, side].
inline void add_filter_lanes(const Images *sums, int64_t outputs, int64_t inputs, int64_t side, float *out) {
    for (int64_t tap = 0; tap < side * side; tap++)
        for (int64_t c = 0; c < inputs; c++)
            for (int64_t o = 0; o < outputs; o++)
                out[(o * inputs + c) * side * side + tap] = sum((Vec)*sums++);
}

inline Vec inverse_rms(const Images *p, int64_t n) {
    Vec squares = {};
    for (int64_t i = 0; i < n; i++) squares += (Vec)p[i] * (Vec)p[i];
    return inverse_root(squares * (1.0f / (float)n) + NORM_EPS);
}

// x = silu(p / rms(p) * scale) of one pixel with n channels.
inline void norm_silu(const Images *p, const float *scale, Images *x, int64_t n) {
    const Vec inverse = inverse_rms(p, n);
    for (int64_t i = 0; i < n; i++) {
        const Vec y = (Vec)p[i] * inverse * scale[i];
        x[i] = (Images)(y * sigmoid(y));
    }
}

// Of the same: grad_p from grad_x, which may be the same memory; adds to the gradients of scale and of p's bias.
inline void norm_silu_back(const Images *p, const float *scale, const Images *grad_x, Images *grad_p, Images *by_scale,
                           Images *by_bias, int64_t n) {
    const Vec inverse = inverse_rms(p, n);
    Vec dots = {};
    for (int64_t i = 0; i < n; i++) {
        const Vec unit = (Vec)p[i] * inverse, y = unit * scale[i], gate = sigmoid(y);
        const Vec grad_y = (Vec)grad_x[i] * (gate + y * gate * (1.0f - gate));
        by_scale[i] += (Images)(grad_y * unit);
        const Vec scaled = grad_y * scale[i];
        grad_p[i] = (Images)scaled;
        dots += scaled * unit;
    }
    const Vec mean = dots * (1.0f / (float)n) * inverse;
    for (int64_t i = 0; i < n; i++) {
        grad_p[i] = (Images)(((Vec)grad_p[i] - (Vec)p[i] * mean) * inverse);
        by_bias[i] += grad_p[i];
    }
}

// The larger of two; not a number stays so.
inline VecInt larger(Vec x, Vec than) { return (x > than) | (x != x); }

// `count` images of `size` entries each, `step` apart, as registers; zeros for images that there are not.
inline void to_lanes(const float *from, int64_t count, int64_t step, int64_t size, Images *to) {
    float *out = (float *)to;
    for (int64_t n = 0; n < LANES; n++)
        for (int64_t i = 0; i < size; i++) out[i * LANES + n] = n < count ? from[n * step + i] : 0.0f;
}

inline void to_lanes(const uint8_t *from, int64_t count, int64_t step, int64_t size, Images *to) {
    for (int64_t i = 0; i < size; i += 4) {  // bytes of a word
        const int64_t some = std::min<int64_t>(4, size - i);
        uint8_t words[LANES][4] = {};
        if (some == 4)
            for (int64_t n = 0; n < count; n++) std::memcpy(words[n], from + n * step + i, 4);
        else
            for (int64_t n = 0; n < count; n++) std::memcpy(words[n], from + n * step + i, (size_t)some);
        VecInt all;
        std::memcpy(&all, words, sizeof all);
        for (int64_t b = 0; b < some; b++)
            to[i + b] = (Images)__builtin_convertvector((all >> (8 * (int)b)) & 255, Vec);
    }
}

inline void from_lanes(const Images *from, int64_t count, int64_t step, int64_t size, float *to) {
    const float *in = (const float *)from;
    for (int64_t n = 0; n < count; n++)
        for (int64_t i = 0; i < size; i++) to[n * step + i] = in[i * LANES + n];
}
