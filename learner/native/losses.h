// Losses of one row and their gradients by a network's outputs; references: learner/nn/twohot.py and
// learner/nn/action_distribution.py.
#pragma once

#include <algorithm>

#include "imagine.h"
#include "layers.h"

struct TwoHotCode {
    int64_t index[2];
    float weight[2];
};

// Neighbouring bins of a target and their weights; positions as from mirrored_bins.
inline TwoHotCode two_hot(float target, const float *positions, int64_t bins) {
    const int64_t half = bins / 2;
    const float size = std::fabs(target);
    int64_t below = std::upper_bound(positions, positions + half + 1, size) - positions - 1;
    below = std::min(std::max<int64_t>(below, 0), half);
    const int64_t above = std::min(below + 1, half);
    float to_below = 1.0f, to_above = 1.0f;
    if (below != above) {
        to_below = std::fabs(positions[below] - size);
        to_above = std::fabs(positions[above] - size);
    }
    // A target that is not finite must not pass for a large one: its weights become not a number.
    const float taint = target - target, total = to_below + to_above;
    TwoHotCode code{{below, above}, {to_above / total + taint, to_below / total + taint}};
    if (target < 0.0f)
        for (int64_t &index : code.index) index += index > 0 ? half : 0;
    return code;
}

// Cross-entropy of logits [bins] towards the codes times their weights. The logits become the gradient, times
// `factor`.
inline float two_hot_loss(float *logits, int64_t bins, const TwoHotCode *codes, const float *weights, int64_t count,
                          float factor) {
    Vec mosts = splat(logits[0]);
    each(bins, [&](int64_t i, auto lanes) {
        mosts = take(at_least(load(logits + i, lanes), mosts), mosts, lanes);
    });
    const float most = largest(mosts);
    float weight = 0.0f, aimed = 0.0f;
    for (int64_t k = 0; k < count; k++)
        for (int side = 0; side < 2; side++) {
            weight += weights[k] * codes[k].weight[side];
            aimed += weights[k] * codes[k].weight[side] * logits[codes[k].index[side]];
        }
    Vec totals = {};
    each(bins, [&](int64_t i, auto lanes) {
        const Vec e = exp(load(logits + i, lanes) - most);
        store(logits + i, e, lanes);
        totals += take(e, Vec{}, lanes);
    });
    const float total = sum(totals), share = weight * factor / total;
    each(bins, [&](int64_t i, auto lanes) { store(logits + i, load(logits + i, lanes) * share, lanes); });
    for (int64_t k = 0; k < count; k++)
        for (int side = 0; side < 2; side++)
            logits[codes[k].index[side]] -= factor * weights[k] * codes[k].weight[side];
    return weight * (most + std::log(total)) - aimed;
}

struct PolicyTerms {
    float log_prob, entropy;
};

inline PolicyTerms normal_gradient(const Policy &policy, const float *raw, const float *action, float by_log_prob,
                                   float by_entropy, float *out) {
    const int64_t A = policy.width;
    const float width = policy.max_std - policy.min_std;
    Vec squares = {};
    each(A, [&](int64_t i, auto lanes) {
        const Vec mean = load(raw + i, lanes), std = load(raw + A + i, lanes), share = 1.0f / std;
        const Vec score = (load(action + i, lanes) - mean) * share;
        const Vec by_std = (by_log_prob * (score * score - 1.0f) + by_entropy) * share;
        squares += take(score * score, Vec{}, lanes);
        store(out + i, by_log_prob * score * share * (1.0f - mean * mean), lanes);
        const Vec slope = width > 0.0f ? (std - policy.min_std) * (policy.max_std - std) / width : Vec{};
        store(out + A + i, by_std * slope, lanes);
    });
    float logs = 0.0f;
    for (int64_t i = 0; i < A; i++) logs += std::log(raw[A + i]);
    constexpr float HALF_LOG_2PI = 0.918938533f;
    return {-0.5f * sum(squares) - logs - HALF_LOG_2PI * (float)A, logs + (HALF_LOG_2PI + 0.5f) * (float)A};
}

inline PolicyTerms categorical_gradient(const Policy &policy, const float *raw, const float *action, float by_log_prob,
                                        float by_entropy, float *out) {
    PolicyTerms terms{0.0f, 0.0f};
    const float unimix = policy.unimix;
    for (int64_t k = 0, at = 0; k < policy.components; at += policy.classes[k++]) {
        const int64_t n = policy.classes[k];
        float total = 0.0f;
        for (int64_t i = at; i < at + n; i++) {
            const float p = std::exp(raw[i]);
            terms.log_prob += raw[i] * action[i];
            terms.entropy -= p * raw[i];
            // Through the logarithm and the mixing; without mixing the mixed probability is the softmax's own.
            const float soft = (p - unimix / (float)n) / (1.0f - unimix);
            out[i] = unimix == 0.0f ? action[i] * by_log_prob - p * raw[i] * by_entropy
                                    : soft * (1.0f - unimix) * (action[i] / p * by_log_prob - (raw[i] + 1.0f) * by_entropy);
            total += out[i];
        }
        for (int64_t i = at; i < at + n; i++)
            out[i] -= (std::exp(raw[i]) - unimix / (float)n) / (1.0f - unimix) * total;
    }
    return terms;
}

// Log-probability of the action and entropy; `out` [O] is the gradient by the policy's outputs.
inline PolicyTerms policy_gradient(const Policy &policy, const float *raw, const float *action, float by_log_prob,
                                   float by_entropy, float *out) {
    return policy.kind == NORMALS ? normal_gradient(policy, raw, action, by_log_prob, by_entropy, out)
                                  : categorical_gradient(policy, raw, action, by_log_prob, by_entropy, out);
}
