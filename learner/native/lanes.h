// One vector register of floats, reads and writes of its parts, and the functions that are not arithmetic.
// Widths follow the machine the library is built on; everything else is written against LANES.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr int TILE_ROWS = 12;  // 24 accumulators of 32 registers
#elif defined(__AVX__)
constexpr int LANES = 8;
constexpr int TILE_ROWS = 6;  // 12 of 16
#else
constexpr int LANES = 4;
constexpr int TILE_ROWS = 6;
#endif

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t VecInt __attribute__((vector_size(LANES * 4)));
typedef float VecAnywhere __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

struct Full {};              // all lanes
struct Part { int count; };  // the first lanes of the last register of a row

inline Vec splat(float x) { return Vec{} + x; }
inline Vec load(const float *from, Full) { return *reinterpret_cast<const VecAnywhere *>(from); }
inline void store(float *to, Vec x, Full) { *reinterpret_cast<VecAnywhere *>(to) = x; }

#if defined(__AVX512F__)
inline Vec load(const float *from, Part part) {
    return (Vec)_mm512_maskz_loadu_ps((__mmask16)((1u << part.count) - 1), from);
}
inline void store(float *to, Vec x, Part part) {
    _mm512_mask_storeu_ps(to, (__mmask16)((1u << part.count) - 1), (__m512)x);
}
#else
inline Vec load(const float *from, Part part) {
    Vec x = {};
    std::memcpy(&x, from, part.count * sizeof(float));
    return x;
}
inline void store(float *to, Vec x, Part part) { std::memcpy(to, &x, part.count * sizeof(float)); }
#endif

// Calls f(at, lanes) over [0, count) register by register; the last call may be of Part.
template <class F> inline void each(int64_t count, F &&f) {
    int64_t at = 0;
    for (; at + LANES <= count; at += LANES) f(at, Full{});
    if (at < count) f(at, Part{(int)(count - at)});
}

// Sum and maximum of all lanes, always in the same order.
#if defined(__AVX512F__)
inline float sum(Vec x) { return _mm512_reduce_add_ps((__m512)x); }
inline float largest(Vec x) { return _mm512_reduce_max_ps((__m512)x); }
#else
inline float sum(Vec x) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] += x[i + half];
    return x[0];
}
inline float largest(Vec x) {
    float most = x[0];
    for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
    return most;
}
#endif

// Limits of x; not a number stays not a number.
#if defined(__AVX512F__)
inline Vec at_least(Vec x, Vec low) { return (Vec)_mm512_max_ps((__m512)low, (__m512)x); }
inline Vec at_most(Vec x, Vec high) { return (Vec)_mm512_min_ps((__m512)high, (__m512)x); }
#elif defined(__AVX__)
inline Vec at_least(Vec x, Vec low) { return (Vec)_mm256_max_ps((__m256)low, (__m256)x); }
inline Vec at_most(Vec x, Vec high) { return (Vec)_mm256_min_ps((__m256)high, (__m256)x); }
#else
inline Vec at_least(Vec x, Vec low) { return x < low ? low : x; }
inline Vec at_most(Vec x, Vec high) { return x > high ? high : x; }
#endif

// x in the lanes that count, `other` elsewhere.
inline Vec take(Vec x, Vec, Full) { return x; }
inline Vec take(Vec x, Vec other, Part part) {
    float parts[LANES];
    std::memcpy(parts, &other, sizeof other);
    std::memcpy(parts, &x, part.count * sizeof(float));
    return load(parts, Full{});
}

inline Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
    const Vec guess = (Vec)_mm512_rcp14_ps((__m512)x);  // 14 bits, doubled by one Newton step
    return guess * (2.0f - x * guess);
#else
    return 1.0f / x;
#endif
}

// exp(x) = power + power * rest, power = 2^n; x between -87 and 88. Not a number stays not a number.
inline Vec exp_parts(Vec x, Vec &power) {
    constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
    const Vec shifted = x * 1.44269504f + ROUND;
    const Vec whole = shifted - ROUND;
    const Vec r = (x - whole * 0.693145752f) - whole * 1.42860677e-6f;  // ln 2 in two parts; |r| <= ln(2) / 2
    power = (Vec)(((VecInt)shifted - 0x4b400000 + 127) << 23);
    // Chebyshev interpolation of (exp(r) - 1 - r) / r^2, off by 1e-8 of exp(r).
    const Vec high = 0.00836320297f + r * 0.00139262135f;
    const Vec poly = 0.5f + r * (0.166665768f + r * (0.0416665544f + r * high));
    return power * (r + r * r * poly);
}

// For x up to 88.
inline Vec exp(Vec x) {
    Vec power;
    const Vec rest = exp_parts(at_least(x, splat(-87.0f)), power);
    return power + rest;
}

inline Vec sigmoid(Vec x) {
    Vec power;  // limits: so that powers and the reciprocal stay normal numbers
    const Vec rest = exp_parts(-at_most(at_least(x, splat(-80.0f)), splat(87.0f)), power);
    return reciprocal(1.0f + (power + rest));
}

inline Vec tanh(Vec x) {
    const VecInt sign = (VecInt)x & (int32_t)0x80000000;
    const Vec size = (Vec)((VecInt)x ^ sign);
    Vec power;
    const Vec rest = exp_parts(-2.0f * at_most(size, splat(20.0f)), power);
    const Vec minus = rest + (power - 1.0f);  // exp(-2 |x|) - 1 without cancellation
    return (Vec)((VecInt)(-minus * reciprocal(2.0f + minus)) | sign);
}
