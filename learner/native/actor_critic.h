// Arguments of the actor and critic losses. learner/native/actor_critic.py mirrors the structure field by field;
// contract and reference: learner/nn/actor_critic.py. Letters as in imagine.h; R = H*N imagined rows, the first N of
// which are also the replayed ones.
#pragma once

#include <cstdint>

struct ActorCritic {
    int64_t bytes;
    int64_t rows, starts, feat_size, units, bins, threads, critic_layers, actor_layers;
    int64_t policy_kind, width, outputs, components;
    double policy_unimix, min_std, max_std;
    double policy_factor, value_factor, replay_factor, entropy_factor, slow_factor;
    const int64_t *component_classes;
    const float *positions;                                        // [K], mirrored bins
    const float *const *critic, *const *actor;                     // weight, bias, scale of each layer, then the output
    const float *feat, *action, *raw, *slow;                       // [R, F | A | O], [R]
    const float *const *kept;                                      // as imagination left them
    const float *returns, *advantage, *weight;                     // [R]
    const float *replay_returns, *replay_weight;                   // [N]
    float *losses;                                                 // [4]: policy, value, replay value, entropy
    float *by_feat;                                                // [N, F]
    float *const *critic_grads, *const *actor_grads;               // as critic and actor
};
