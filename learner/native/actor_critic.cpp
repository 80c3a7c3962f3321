// Losses of actor and critic and their gradients. Rows are cut into GROUPS, whatever the number of threads; each adds
// up its own gradients block by block, and the groups are added in order.
#include "actor_critic.h"

#include "losses.h"
#include "networks.h"

namespace {

constexpr int64_t GROUPS = 8;
constexpr int64_t BLOCK = 96;  // rows whose activations and gradients stay in cache

struct Plan {
    PackedHead critic, actor;          // for the forward pass of the output layers; hidden ones are not packed
    std::vector<Packed> critic_back, actor_back;  // per level the weights turned; the last is the output's
    Policy policy;
};

std::vector<Packed> pack_back(const float *const *tensors, int64_t layers, int64_t inputs, int64_t units,
                              int64_t outputs, Scratch &scratch) {
    std::vector<Packed> packed;
    for (int64_t level = 0; level < layers; level++)
        packed.push_back(pack_plain(tensors[3 * level], units, level ? units : inputs, scratch));
    packed.push_back(pack_plain(tensors[3 * layers], outputs, units, scratch));
    return packed;
}

Plan make_plan(const ActorCritic &a, Scratch &scratch) {
    const int64_t F = a.feat_size, V = a.units, K = a.bins, Lc = a.critic_layers, La = a.actor_layers;
    return {pack_head(a.critic, Lc, F, V, K, Lc, scratch),
            pack_head(a.actor, La, F, V, a.outputs, La, scratch),
            pack_back(a.critic, Lc, F, V, K, scratch),
            pack_back(a.actor, La, F, V, a.outputs, scratch),
            {a.policy_kind, a.width, a.outputs, a.components, a.component_classes, (float)a.policy_unimix,
             (float)a.min_std, (float)a.max_std}};
}

// Gradients of one head: weight, bias, scale of each layer, then the output's; the first weight lies elsewhere.
struct HeadGrads {
    int64_t layers, units, outputs;
    std::vector<float *> tensors;

    static int64_t size(int64_t layers, int64_t units, int64_t outputs) {
        return 2 * layers * units + (layers - 1) * units * units + outputs * (units + 1);
    }
    HeadGrads(float *at, int64_t layers, int64_t units, int64_t outputs) : layers(layers), units(units), outputs(outputs) {
        for (size_t i = 0; i < (size_t)(3 * layers + 2); i++) {
            tensors.push_back(i ? at : nullptr);
            at += count(i);
        }
    }
    int64_t count(size_t i) const {
        if (i == 0) return 0;
        if (i == (size_t)(3 * layers)) return outputs * units;
        if (i == (size_t)(3 * layers + 1)) return outputs;
        return i % 3 ? units : units * units;
    }
};

void add_to(float *to, const float *from, int64_t n) {
    each(n, [&](int64_t i, auto lanes) { store(to + i, load(to + i, lanes) + load(from + i, lanes), lanes); });
}

// What one group adds up: a flat block of gradients, and its losses.
struct Group {
    const ActorCritic &a;
    const Plan &plan;
    const int64_t F, V, K, O, depth;
    float *first;  // [F, 2V], first layers of critic and actor, turned
    HeadGrads critic_grads, actor_grads;
    double losses[4] = {};
    Scratch scratch;
    float *space = scratch.take(cross_space(BLOCK, 2 * V)), *logits = scratch.take(BLOCK * std::max(K, O));
    float *active = scratch.take(depth * BLOCK * V), *by_x = scratch.take(BLOCK * V), *by_a = scratch.take(BLOCK * V);
    float *again = scratch.take(V), *by_scale = scratch.take(V), *joint = scratch.take(BLOCK * 2 * V);

    static int64_t size(const ActorCritic &a) {
        return a.feat_size * 2 * a.units + HeadGrads::size(a.critic_layers, a.units, a.bins) +
               HeadGrads::size(a.actor_layers, a.units, a.outputs);
    }
    Group(const ActorCritic &a, const Plan &plan, float *sums)
        : a(a), plan(plan), F(a.feat_size), V(a.units), K(a.bins), O(a.outputs),
          depth(std::max(a.critic_layers, a.actor_layers)), first(sums),
          critic_grads(sums + F * 2 * V, a.critic_layers, V, K),
          actor_grads(sums + F * 2 * V + HeadGrads::size(a.critic_layers, V, K), a.actor_layers, V, O) {}

    void imagined(int64_t at, int64_t rows) {
        read(at, rows, true);
        gemm(rows, top(a.critic_layers), V, plan.critic.output, logits, K, plan.critic.bias);
        for (int64_t r = 0; r < rows; r++)
            losses[1] += value_loss(logits + r * K, a.returns[at + r], a.slow[at + r], a.weight[at + r], a.value_factor);
        back(at, rows, true);
        read(at, rows, false);
        for (int64_t r = at; r < at + rows; r++) {
            const float scaled = a.weight[r] * -(float)a.policy_factor, entropy = (float)a.entropy_factor;
            const PolicyTerms terms = policy_gradient(plan.policy, a.raw + r * O, a.action + r * a.width,
                                                      scaled * a.advantage[r], scaled * entropy, logits + (r - at) * O);
            losses[0] -= a.weight[r] * (terms.log_prob * a.advantage[r] + entropy * terms.entropy);
            losses[3] += terms.entropy;
        }
        back(at, rows, false);
        cross(rows, a.feat + at * F, F, F, joint, 2 * V, 2 * V, first, 2 * V, space);
    }

    void replayed(int64_t at, int64_t rows) {
        read(at, rows, true);
        gemm(rows, top(a.critic_layers), V, plan.critic.output, logits, K, plan.critic.bias);
        for (int64_t r = 0; r < rows; r++)
            losses[2] += value_loss(logits + r * K, a.replay_returns[at + r], a.slow[at + r], a.replay_weight[at + r],
                                    a.replay_factor);
        back(at, rows, true);
        cross(rows, a.feat + at * F, F, F, joint, 2 * V, V, first, 2 * V, space);
        gemm(rows, joint, 2 * V, plan.critic_back[0], a.by_feat + at * F, F);
    }

    float value_loss(float *row, float target, float slow, float weight, double factor) const {
        const TwoHotCode codes[2] = {two_hot(target, a.positions, K), two_hot(slow, a.positions, K)};
        const float weights[2] = {weight, weight * (float)a.slow_factor};
        return two_hot_loss(row, K, codes, weights, 2, (float)factor);
    }

    float *top(int64_t layers) const { return active + (layers - 1) * BLOCK * V; }

    // Where a head's layer lies before its norm, and the step from row to row.
    const float *before(int64_t level, int64_t at, bool critic, int64_t &step) const {
        step = ((level < a.critic_layers) + (level < a.actor_layers)) * V;
        return a.kept[level] + at * step + (critic || level >= a.critic_layers ? 0 : V);
    }

    // Outputs of a head's hidden layers.
    void read(int64_t at, int64_t rows, bool critic) {
        const float *const *tensors = critic ? a.critic : a.actor;
        for (int64_t level = 0; level < (critic ? a.critic_layers : a.actor_layers); level++) {
            int64_t step;
            const float *from = before(level, at, critic, step);
            for (int64_t r = 0; r < rows; r++) {
                for (int64_t i = 0; i < V; i += 16) __builtin_prefetch(from + (r + 8) * step + i);
                norm_silu(from + r * step, tensors[3 * level + 2], active + (level * BLOCK + r) * V, V);
            }
        }
    }

    // From the gradient by the outputs, in `logits`, down to that of the first layer before its norm, in `joint`.
    void back(int64_t at, int64_t rows, bool critic) {
        const float *const *tensors = critic ? a.critic : a.actor;
        const std::vector<Packed> &turned = critic ? plan.critic_back : plan.actor_back;
        const HeadGrads &grads = critic ? critic_grads : actor_grads;
        const int64_t layers = grads.layers, outputs = grads.outputs;
        for (int64_t r = 0; r < rows; r++) add_to(grads.tensors[3 * layers + 1], logits + r * outputs, outputs);
        cross(rows, logits, outputs, outputs, top(layers), V, V, grads.tensors[3 * layers], V, space);
        gemm(rows, logits, outputs, turned[layers], by_x, V);
        for (int64_t level = layers - 1; level >= 0; level--) {
            int64_t step;
            const float *from = before(level, at, critic, step);
            float *out = level ? by_a : joint + (critic ? 0 : V);
            const int64_t out_step = level ? V : 2 * V;
            for (int64_t r = 0; r < rows; r++) {
                norm_silu_back(from + r * step, tensors[3 * level + 2], by_x + r * V, out + r * out_step, again, by_scale, V);
                add_to(grads.tensors[3 * level + 1], out + r * out_step, V);
                add_to(grads.tensors[3 * level + 2], by_scale, V);
            }
            if (!level) break;
            cross(rows, by_a, V, V, top(level), V, V, grads.tensors[3 * level], V, space);
            gemm(rows, by_a, V, turned[level], by_x, V);
        }
    }
};

// Add up the groups and put every gradient where it belongs.
void finish(const ActorCritic &a, const Group &group, float *sums, int64_t size) {
    const int64_t F = a.feat_size, V = a.units;
    for (int64_t g = 1; g < GROUPS; g++) add_to(sums, sums + g * size, size);
    for (int64_t v = 0; v < V; v++)
        for (int64_t f = 0; f < F; f++) {
            a.critic_grads[0][v * F + f] = sums[f * 2 * V + v];
            a.actor_grads[0][v * F + f] = sums[f * 2 * V + V + v];
        }
    for (const bool critic : {true, false}) {
        const HeadGrads &grads = critic ? group.critic_grads : group.actor_grads;
        float *const *out = critic ? a.critic_grads : a.actor_grads;
        for (size_t i = 1; i < grads.tensors.size(); i++)
            std::memcpy(out[i], grads.tensors[i], (size_t)grads.count(i) * sizeof(float));
    }
}

}  // namespace

REGION actor_critic(const ActorCritic *args) {
    const ActorCritic &a = *args;
    if (a.bytes != sizeof a) return WRONG_MIRROR;
    try {
        Scratch scratch;
        const Plan plan = make_plan(a, scratch);
        const int64_t size = Group::size(a);
        float *sums = scratch.take(GROUPS * size);
        double losses[GROUPS][4];
        const bool enough = each_part(GROUPS, a.threads, [&](int64_t part) {
            float *own = sums + part * size;
            std::memset(own, 0, (size_t)size * sizeof(float));
            Group group(a, plan, own);
            const int64_t last = (part + 1) * a.rows / GROUPS, last_start = (part + 1) * a.starts / GROUPS;
            for (int64_t at = part * a.rows / GROUPS; at < last; at += BLOCK)
                group.imagined(at, std::min(BLOCK, last - at));
            for (int64_t at = part * a.starts / GROUPS; at < last_start; at += BLOCK)
                group.replayed(at, std::min(BLOCK, last_start - at));
            std::copy(group.losses, group.losses + 4, losses[part]);
        });
        if (!enough) return NO_MEMORY;
        for (int i = 0; i < 4; i++) {
            double total = 0.0;
            for (int64_t g = 0; g < GROUPS; g++) total += losses[g][i];
            a.losses[i] = (float)total;
        }
        finish(a, Group(a, plan, sums), sums, size);
        return DONE;
    } catch (const std::bad_alloc &) {
        return NO_MEMORY;
    }
}
