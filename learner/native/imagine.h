// Arguments of imagination. learner/native/imagine.py mirrors the structure field by field; contract and reference:
// learner/nn/imagine.py. N trajectories, H steps, D deter, S variables, C classes, Z = C*S, F = D + Z, U units of the
// core and the prior, V units of the heads, G blocks, d = D / G, A action width, O outputs of the policy, W noise
// width, K bins; arrays are contiguous float32.
#pragma once

#include <cstdint>

enum { NORMALS = 0, CATEGORICALS = 1 };

struct Policy {
    int64_t kind, width, outputs;  // A, O
    int64_t components;
    const int64_t *classes;  // [components]
    float unimix, min_std, max_std;
};

struct Imagine {
    int64_t bytes;
    int64_t trajectories, horizon, deter, stoch, classes, hidden, blocks, threads, chunk, units, bins;
    int64_t prior_layers, reward_layers, cont_layers, critic_layers, actor_layers, slow_layers;
    int64_t policy_kind, width, outputs, noise, components;
    double unimix, policy_unimix, min_std, max_std;
    const int64_t *component_classes;
    const float *deter_start, *stoch_start, *action_noise, *stoch_noise;  // [N, D | Z], [N, H, W | S]
    const float *positions;                                               // [K], mirrored bins
    const float *deter_in, *deter_bias, *stoch_in, *stoch_bias, *in_scale, *own, *shared, *scale, *gates, *gates_bias;
    const float *action_in, *action_bias, *action_scale;  // [U, A], [U], [U]
    const float *driver, *hidden_bias;                    // [D, U], [D]
    // Heads: weight, bias, scale of each layer, then weight and bias of the output.
    const float *const *prior, *const *reward, *const *cont, *const *critic, *const *actor, *const *slow;
    float *feat, *action, *raw, *out_reward, *out_cont, *value, *out_slow;  // [H + 1 | H, N, ...]
    float *const *kept;  // per level, layers of critic and actor before their norm: [H, N, V * those that have it]
};
