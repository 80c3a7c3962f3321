// Heads over packed weights, and the policy's distributions; references: learner/nn/imagine.py and
// learner/nn/action_distribution.py.
#pragma once

#include "gemm.h"
#include "imagine.h"
#include "layers.h"

struct PackedLayer {
    Packed weight;
    const float *bias, *scale;
};

struct PackedHead {
    std::vector<PackedLayer> layers;
    Packed output;
    const float *bias;
};

// `tensors`: weight, bias, scale of each layer, then the output's; layers from `first` on are packed.
inline PackedHead pack_head(const float *const *tensors, int64_t layers, int64_t inputs, int64_t units, int64_t outputs,
                            int64_t first, Scratch &scratch) {
    PackedHead head{};
    for (int64_t level = 0; level < layers; level++) {
        Packed weight{};
        if (level >= first) weight = pack_linear(tensors[3 * level], units, level ? units : inputs, scratch);
        head.layers.push_back({weight, tensors[3 * level + 1], tensors[3 * level + 2]});
    }
    head.output = pack_linear(tensors[3 * layers], outputs, units, scratch);
    head.bias = tensors[3 * layers + 1];
    return head;
}

// What the distribution keeps of one row of outputs, in place.
inline void policy_raw(const Policy &policy, float *row) {
    if (policy.kind == NORMALS) {
        const int64_t A = policy.width;
        each(A, [&](int64_t i, auto lanes) { store(row + i, tanh(load(row + i, lanes)), lanes); });
        each(A, [&](int64_t i, auto lanes) {
            const Vec spread = sigmoid(load(row + A + i, lanes) + 2.0f);
            store(row + A + i, policy.min_std + (policy.max_std - policy.min_std) * spread, lanes);
        });
        return;
    }
    for (int64_t k = 0; k < policy.components; row += policy.classes[k++]) {
        const int64_t n = policy.classes[k];
        const float most = *std::max_element(row, row + n);
        Vec totals = {};
        each(n, [&](int64_t i, auto lanes) { totals += take(exp(load(row + i, lanes) - most), Vec{}, lanes); });
        const float base = most + std::log(sum(totals));
        each(n, [&](int64_t i, auto lanes) { store(row + i, load(row + i, lanes) - base, lanes); });
        if (policy.unimix != 0.0f)
            for (int64_t i = 0; i < n; i++)
                row[i] = std::log(std::exp(row[i]) * (1.0f - policy.unimix) + policy.unimix / (float)n);
    }
}

// Action [A] of one row of raw, and the same with entries beyond 1 in magnitude scaled back to +-1.
inline void policy_sample(const Policy &policy, const float *raw, const float *noise, float *action, float *squashed) {
    if (policy.kind == NORMALS) {
        each(policy.width, [&](int64_t i, auto lanes) {
            const Vec x = load(raw + i, lanes) + load(raw + policy.width + i, lanes) * load(noise + i, lanes);
            const Vec size = x < 0.0f ? -x : x;
            store(action + i, x, lanes);
            store(squashed + i, x / (size > 1.0f ? size : splat(1.0f)), lanes);
        });
        return;
    }
    for (int64_t k = 0, at = 0; k < policy.components; at += policy.classes[k++]) {
        const int64_t n = policy.classes[k];
        int64_t index = 0;
        float reached = 0.0f;
        for (int64_t i = 0; i + 1 < n; i++) {
            reached += std::exp(raw[at + i]);
            index += reached < noise[k];
        }
        for (int64_t i = 0; i < n; i++) action[at + i] = squashed[at + i] = i == index ? 1.0f : 0.0f;
    }
}
