// Imagination: chunks of trajectories roll their whole horizon and read all heads while their states are in cache.
// Contract and reference: learner/nn/imagine.py; letters: imagine.h.
#include "imagine.h"

#include "networks.h"

namespace {

// Heads side by side: at the start no reward is read, at the end neither policy nor slow value.
enum { REWARD, CONT, CRITIC, ACTOR, SLOW, HEADS };

struct Plan {
    Packed deter_in, action_in, shared, first;  // `first`: first layers of all heads, the part that reads deter
    const float *stoch_rows, *first_rows;       // [Z, U], [Z, 5V]: the parts that read the one-hot stoch
    const float *in_scale, *first_bias;         // [3, U], [5V]
    const Packed *own, *gates;                  // [G]
    PackedHead prior, heads[HEADS];
    Policy policy;
};

Plan make_plan(const Imagine &a, Scratch &scratch) {
    const int64_t D = a.deter, U = a.hidden, V = a.units, S = a.stoch, Z = S * a.classes, F = D + Z, K = a.bins;
    const int64_t G = a.blocks, d = D / G;
    float *shared = scratch.take(3 * U * D), *in_scale = scratch.take(3 * U);
    std::memcpy(shared, a.shared, (size_t)(2 * U * D) * sizeof(float));
    for (int64_t u = 0; u < U; u++)
        for (int64_t i = 0; i < D; i++) shared[(2 * U + u) * D + i] = a.driver[i * U + u];
    std::memcpy(in_scale, a.in_scale, (size_t)(2 * U) * sizeof(float));
    std::memcpy(in_scale + 2 * U, a.action_scale, (size_t)U * sizeof(float));
    const float *const *heads[HEADS] = {a.reward, a.cont, a.critic, a.actor, a.slow};
    const int64_t layers[HEADS] = {a.reward_layers, a.cont_layers, a.critic_layers, a.actor_layers, a.slow_layers};
    const int64_t outputs[HEADS] = {K, 1, K, a.outputs, K};
    float *first = scratch.take(HEADS * V * F), *first_bias = scratch.take(HEADS * V);
    for (int64_t j = 0; j < HEADS; j++) {
        std::memcpy(first + j * V * F, heads[j][0], (size_t)(V * F) * sizeof(float));
        std::memcpy(first_bias + j * V, heads[j][1], (size_t)V * sizeof(float));
    }
    Packed *own = scratch.take<Packed>(G), *gates = scratch.take<Packed>(G);
    for (int64_t g = 0; g < G; g++) {
        own[g] = pack_plain(a.own + g * d * d, d, d, scratch);
        gates[g] = pack_plain(a.gates + g * d * 3 * d, d, 3 * d, scratch);
    }
    Plan plan{};
    plan.deter_in = pack_linear(a.deter_in, U, D, scratch);
    plan.action_in = pack_linear(a.action_in, U, a.width, scratch);
    plan.shared = pack_plain(shared, 3 * U, D, scratch);
    plan.first = pack_linear(first, HEADS * V, D, scratch, F);
    plan.stoch_rows = transpose(a.stoch_in, U, Z, Z, scratch);
    plan.first_rows = transpose(first + D, HEADS * V, Z, F, scratch);
    plan.in_scale = in_scale;
    plan.first_bias = first_bias;
    plan.own = own;
    plan.gates = gates;
    plan.prior = pack_head(a.prior, a.prior_layers, D, U, Z, 0, scratch);
    for (int64_t j = 0; j < HEADS; j++) plan.heads[j] = pack_head(heads[j], layers[j], F, V, outputs[j], 1, scratch);
    plan.policy = {a.policy_kind, a.width, a.outputs, a.components, a.component_classes,
                   (float)a.policy_unimix, (float)a.min_std, (float)a.max_std};
    return plan;
}

// Calls f(first, count) for few rows at a time: what a product wrote is read while it is in the first cache.
template <class F> void few(int64_t rows, F &&f) {
    constexpr int64_t FEW = 2 * TILE_ROWS;
    for (int64_t r = 0; r < rows; r += FEW) f(r, std::min(FEW, rows - r));
}

// The rows of one chunk, and the space that its steps use again and again.
struct Chunk {
    const Imagine &a;
    const Plan &plan;
    const int64_t first, rows, N, D, U, V, S, C, Z, F, G, d, K;
    Scratch scratch;
    int32_t *index = scratch.take<int32_t>(rows * S);
    float *joint = scratch.take(rows * HEADS * V), *active = scratch.take(rows * HEADS * V);
    float *before = scratch.take(rows * V), *after = scratch.take(rows * V);
    float *logits = scratch.take(rows * std::max(K, Z)), *squashed = scratch.take(rows * a.width);
    float *embedded = scratch.take(rows * 3 * U), *inputs = scratch.take(rows * 3 * U);
    float *hidden = scratch.take(rows * D), *reached = scratch.take(rows * D), *gates = scratch.take(rows * 3 * d);

    Chunk(const Imagine &a, const Plan &plan, int64_t first, int64_t rows)
        : a(a), plan(plan), first(first), rows(rows), N(a.trajectories), D(a.deter), U(a.hidden), V(a.units),
          S(a.stoch), C(a.classes), Z(S * C), F(D + Z), G(a.blocks), d(D / G), K(a.bins) {}

    float *feat(int64_t h) const { return a.feat + (h * N + first) * F; }

    void roll() {
        for (int64_t r = 0; r < rows; r++) {
            const float *stoch = a.stoch_start + (first + r) * Z;
            std::memcpy(feat(0) + r * F, a.deter_start + (first + r) * D, (size_t)D * sizeof(float));
            std::memcpy(feat(0) + r * F + D, stoch, (size_t)Z * sizeof(float));
            for (int64_t s = 0; s < S; s++) {
                int32_t most = 0;
                for (int32_t c = 1; c < C; c++)
                    if (stoch[c * S + s] > stoch[most * S + s]) most = c;
                index[r * S + s] = most;
            }
        }
        for (int64_t h = 0; h <= a.horizon; h++) {
            read(h);
            if (h < a.horizon) advance(h);
        }
    }

    // Every head that a loss reads at step h.
    void read(int64_t h) {
        const int64_t from = h ? REWARD : CONT, to = h < a.horizon ? HEADS : ACTOR, wide = HEADS * V;
        const int64_t left = from * V / PANEL * PANEL, right = to * V;  // whole panels
        const Packed part{plan.first.data + left * D, D, right - left};
        gemm(rows, feat(h), F, part, joint + left, wide, plan.first_bias + left);
        for (int64_t r = 0; r < rows; r++) {
            float *row = joint + r * wide;
            gather_rows(index + r * S, plan.first_rows + from * V, wide, row + from * V, 1.0f, row + from * V, S,
                        right - from * V);
            for (int64_t j = from; j < to; j++)
                norm_silu(row + j * V, plan.heads[j].layers[0].scale, active + r * wide + j * V, V);
            if (h < a.horizon)
                std::memcpy(a.kept[0] + (h * N + first + r) * 2 * V, row + CRITIC * V, (size_t)(2 * V) * sizeof(float));
        }
        for (int64_t j = from; j < to; j++) output(h, j);
    }

    // Deeper layers of head j and what it predicts of step h.
    void output(int64_t h, int64_t j) {
        const PackedHead &head = plan.heads[j];
        const int64_t at = h * N + first, depth = (int64_t)head.layers.size();
        const float *x = active + j * V;
        int64_t step = HEADS * V;
        for (int64_t level = 1; level < depth; level++) {
            const int64_t width = ((level < a.critic_layers) + (level < a.actor_layers)) * V;
            const bool keep = (j == CRITIC || j == ACTOR) && h < a.horizon;
            float *out = before;
            if (keep) out = a.kept[level] + at * width + (j == ACTOR && level < a.critic_layers ? V : 0);
            gemm(rows, x, step, head.layers[level].weight, out, keep ? width : V, head.layers[level].bias);
            for (int64_t r = 0; r < rows; r++)
                norm_silu(out + r * (keep ? width : V), head.layers[level].scale, after + r * V, V);
            x = after;
            step = V;
        }
        if (j == ACTOR) {
            float *raw = a.raw + at * a.outputs;
            gemm(rows, x, step, head.output, raw, a.outputs, head.bias);
            for (int64_t r = 0; r < rows; r++) policy_raw(plan.policy, raw + r * a.outputs);
        } else if (j == CONT) {
            float *cont = a.out_cont + at;
            gemm(rows, x, step, head.output, cont, 1, head.bias);
            each(rows, [&](int64_t i, auto lanes) { store(cont + i, sigmoid(load(cont + i, lanes)), lanes); });
        } else {
            float *mean = j == REWARD ? a.out_reward + at - N : j == CRITIC ? a.value + at : a.out_slow + at;
            few(rows, [&](int64_t r, int64_t count) {
                gemm(count, x + r * step, step, head.output, logits, K, head.bias);
                for (int64_t i = 0; i < count; i++) mean[r + i] = two_hot_mean(logits + i * K, a.positions, K);
            });
        }
    }

    // Choose the action of step h and roll the state to step h + 1.
    void advance(int64_t h) {
        const int64_t at = h * N + first;
        const float *deter = feat(h);
        float *next = feat(h + 1);
        for (int64_t r = 0; r < rows; r++)
            policy_sample(plan.policy, a.raw + (at + r) * a.outputs, a.action_noise + ((first + r) * a.horizon + h) * a.noise,
                          a.action + (at + r) * a.width, squashed + r * a.width);
        gemm(rows, deter, F, plan.deter_in, embedded, 3 * U, a.deter_bias);
        gemm(rows, squashed, a.width, plan.action_in, embedded + 2 * U, 3 * U, a.action_bias);
        for (int64_t r = 0; r < rows; r++) {
            float *row = embedded + r * 3 * U;
            gather_rows(index + r * S, plan.stoch_rows, U, a.stoch_bias, 1.0f, row + U, S, U);
            for (int64_t i = 0; i < 3; i++) norm_silu(row + i * U, plan.in_scale + i * U, inputs + (3 * r + i) * U, U);
        }
        gemm(rows, inputs, 3 * U, plan.shared, hidden, D, a.hidden_bias);
        for (int64_t g = 0; g < G; g++) gemm_add(rows, deter + g * d, F, plan.own[g], hidden + g * d, D);
        for (int64_t r = 0; r < rows; r++) norm_silu(hidden + r * D, a.scale, reached + r * D, D);
        for (int64_t g = 0; g < G; g++)
            few(rows, [&](int64_t r, int64_t count) {
                gemm(count, reached + r * D + g * d, D, plan.gates[g], gates, 3 * d, a.gates_bias + g * 3 * d);
                for (int64_t i = 0; i < count; i++) {
                    const int64_t at_block = (r + i) * F + g * d;
                    gru(gates + i * 3 * d, deter + at_block, next + at_block, d);
                }
            });
        sample(h, next);
    }

    // stoch of step h + 1 from the prior.
    void sample(int64_t h, float *next) {
        const float *x = next, *uniform = a.stoch_noise + (first * a.horizon + h) * S;
        int64_t step = F;
        for (int64_t r = 0; r < rows; r++)  // scattered rows: on their way while the products run
            for (int64_t s = 0; s < S; s += 16) __builtin_prefetch(uniform + r * a.horizon * S + s);
        for (const PackedLayer &layer : plan.prior.layers) {
            gemm(rows, x, step, layer.weight, embedded, U, layer.bias);
            for (int64_t r = 0; r < rows; r++) norm_silu(embedded + r * U, layer.scale, inputs + r * U, U);
            x = inputs;
            step = U;
        }
        gemm(rows, x, step, plan.prior.output, logits, Z, plan.prior.bias);
        for (int64_t r = 0; r < rows; r++) {
            float *row = logits + r * Z;
            softmax_classes(row, row, C, S);
            sample_classes(row, uniform + r * a.horizon * S, (float)a.unimix, row, index + r * S, C, S);
            one_hot(index + r * S, next + r * F + D, C, S);
        }
    }
};

}  // namespace

REGION imagine(const Imagine *args) {
    const Imagine &a = *args;
    if (a.bytes != sizeof a) return WRONG_MIRROR;
    try {
        Scratch scratch;
        const Plan plan = make_plan(a, scratch);
        const int64_t parts = (a.trajectories + a.chunk - 1) / a.chunk;
        return each_part(parts, a.threads, [&](int64_t part) {
            const int64_t first = part * a.trajectories / parts;
            Chunk(a, plan, first, (part + 1) * a.trajectories / parts - first).roll();
        }) ? DONE : NO_MEMORY;
    } catch (const std::bad_alloc &) {
        return NO_MEMORY;
    }
}
