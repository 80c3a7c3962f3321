// Arguments of the posterior rollout. learner/native/rollout.py mirrors these structures field by field.
// T time, B batch, D deter, S variables, C classes, Z = C*S, U hidden units, G blocks, d = D / G; arrays are
// contiguous float32.
#pragma once

#include <cstdint>

struct Rollout {
    int64_t bytes;  // size of this structure, a check of the mirror
    int64_t time, batch, deter, stoch, classes, hidden, blocks, threads;
    double unimix;
    const float *deter_start, *stoch_start;                    // [B, D], [B, Z]
    const float *drive, *projected, *keep, *uniform;           // [T, B, D], [T, B, U], [T, B], [T, B, S]
    const float *deter_in, *deter_bias, *stoch_in, *stoch_bias;  // [U, D], [U], [U, Z], [U]
    const float *in_scale, *own, *shared, *scale;              // [2, U], [G, d, d], [2U, D], [D]
    const float *gates, *gates_bias;                           // [G, d, 3d], [G, 3d]
    const float *read_in, *read_scale, *logits, *logits_bias;  // [U, D], [U], [Z, U], [Z]
    float *out_deter, *probs, *sample;                         // results [T, B, D], [T, B, Z] twice
    float *soft, *embedded, *pre_hidden, *pre_gates, *read;    // kept: [T, B, Z | 2U | D | 3D | U]
};

struct RolloutGrads {
    int64_t bytes;
    const float *by_deter, *by_probs, *by_stoch;  // [T, B, D | Z | Z]
    // By row: gradients of pre-activations; `read` is also that of projected, `pre_hidden` that of drive.
    float *read, *pre_hidden, *logits, *gates, *embedded;  // [T, B, U | D | Z | 3D | 2U]
    float *before, *before_stoch;                          // inputs of each step, masked: [T, B, D | Z]
    float *read_active, *hidden_active, *inputs_active;    // after norm and SiLU: [T, B, U | D | 2U]
    float *read_scale_rows, *scale_rows, *in_scale_rows;   // shares of the gradients of norm scales
    // Weight gradients, zero before: shapes as in Rollout.
    float *deter_in, *deter_bias, *stoch_in, *stoch_bias, *in_scale, *own, *shared, *scale, *gates_weight;
    float *gates_bias, *read_in, *read_scale, *logits_weight, *logits_bias;
};
