// Posterior rollout forward and backward through time; contract and reference: learner/nn/bptt.py. Each part owns
// some sequences for all time steps. Letters as there: B batch, T time, D deter, S variables, C classes, Z = C*S,
// U hidden units, G blocks, d = D / G.
#include "rollout.h"

#include "gemm.h"
#include "layers.h"

namespace {

constexpr int64_t GROUPED_FLOATS = 4 << 20;  // what all groups' sums of weight gradients may take

struct Weights {  // packed for the forward pass
    Packed deter_in, stoch_in, shared, read_in, logits;
    const float *stoch_rows;  // [Z, U]
    const Packed *own, *gates;  // [G]
};

const Packed *pack_blocks(const float *from, int64_t blocks, int64_t k, int64_t n, bool turned, Scratch &scratch) {
    Packed *packed = scratch.take<Packed>(blocks);
    for (int64_t g = 0; g < blocks; g++) {
        const float *block = from + g * k * n;
        packed[g] = turned ? pack_linear(block, k, n, scratch) : pack_plain(block, k, n, scratch);
    }
    return packed;
}

Weights pack_forward(const Rollout &a, Scratch &scratch) {
    const int64_t D = a.deter, U = a.hidden, Z = a.stoch * a.classes, G = a.blocks, d = D / G;
    const float *rows = transpose(a.stoch_in, U, Z, Z, scratch);
    return {pack_linear(a.deter_in, U, D, scratch),
            pack_linear(a.stoch_in, U, Z, scratch),
            pack_plain(a.shared, 2 * U, D, scratch),
            pack_linear(a.read_in, U, D, scratch),
            pack_linear(a.logits, Z, U, scratch),
            rows,
            pack_blocks(a.own, G, d, d, false, scratch),
            pack_blocks(a.gates, G, d, 3 * d, false, scratch)};
}

// Rows `first` on, `rows` of them, through all time steps.
void forward_part(const Rollout &a, const Weights &w, int64_t first, int64_t rows) {
    const int64_t B = a.batch, D = a.deter, U = a.hidden, S = a.stoch, C = a.classes, Z = S * C, G = a.blocks;
    const int64_t d = D / G;
    Scratch scratch;
    float *before = scratch.take(rows * D), *masked = scratch.take(rows * Z), *inputs = scratch.take(rows * 2 * U);
    float *active = scratch.take(rows * std::max(D, U)), *logits = scratch.take(rows * Z), *mixed = scratch.take(rows * Z);
    int32_t *index = scratch.take<int32_t>(rows * S);
    for (int64_t t = 0; t < a.time; t++) {
        const int64_t at = t * B + first;
        const float *keep = a.keep + at;
        const float *deter = t ? a.out_deter + (at - B) * D : a.deter_start + first * D;
        float *embedded = a.embedded + at * 2 * U, *hidden = a.pre_hidden + at * D, *gates = a.pre_gates + at * 3 * D;
        float *out = a.out_deter + at * D, *read = a.read + at * U;
        for (int64_t r = 0; r < rows; r++)
            each(D, [&](int64_t i, auto lanes) {
                store(before + r * D + i, load(deter + r * D + i, lanes) * keep[r], lanes);
            });
        gemm(rows, before, D, w.deter_in, embedded, 2 * U, a.deter_bias);
        if (t) {
            for (int64_t r = 0; r < rows; r++)
                gather_rows(index + r * S, w.stoch_rows, U, a.stoch_bias, keep[r], embedded + (2 * r + 1) * U, S, U);
        } else {
            for (int64_t r = 0; r < rows; r++)
                for (int64_t z = 0; z < Z; z++) masked[r * Z + z] = a.stoch_start[(first + r) * Z + z] * keep[r];
            gemm(rows, masked, Z, w.stoch_in, embedded + U, 2 * U, a.stoch_bias);
        }
        for (int64_t r = 0; r < 2 * rows; r++)
            norm_silu(embedded + r * U, a.in_scale + r % 2 * U, inputs + r * U, U);
        std::memcpy(hidden, a.drive + at * D, (size_t)(rows * D) * sizeof(float));
        gemm_add(rows, inputs, 2 * U, w.shared, hidden, D);
        for (int64_t g = 0; g < G; g++) gemm_add(rows, before + g * d, D, w.own[g], hidden + g * d, D);
        for (int64_t r = 0; r < rows; r++) norm_silu(hidden + r * D, a.scale, active + r * D, D);
        for (int64_t g = 0; g < G; g++) {
            gemm(rows, active + g * d, D, w.gates[g], gates + g * 3 * d, 3 * D, a.gates_bias + g * 3 * d);
            for (int64_t r = 0; r < rows; r++)
                gru(gates + r * 3 * D + g * 3 * d, before + r * D + g * d, out + r * D + g * d, d);
        }
        std::memcpy(read, a.projected + at * U, (size_t)(rows * U) * sizeof(float));
        gemm_add(rows, out, D, w.read_in, read, U);
        for (int64_t r = 0; r < rows; r++) norm_silu(read + r * U, a.read_scale, active + r * U, U);
        gemm(rows, active, U, w.logits, logits, Z, a.logits_bias);
        for (int64_t r = 0; r < rows; r++) {
            float *soft = a.soft + (at + r) * Z;
            softmax_classes(logits + r * Z, soft, C, S);
            float *probs = a.probs ? a.probs + (at + r) * Z : mixed;
            sample_classes(soft, a.uniform + (at + r) * S, (float)a.unimix, probs, index + r * S, C, S);
            one_hot(index + r * S, a.sample + (at + r) * Z, C, S);
        }
    }
}

struct Turned {  // packed for the backward pass: every product by the transposed weight
    Packed deter_in, stoch_in, shared, read_in, logits;
    const Packed *own, *gates;  // [G]
};

Turned pack_backward(const Rollout &a, Scratch &scratch) {
    const int64_t D = a.deter, U = a.hidden, Z = a.stoch * a.classes, G = a.blocks, d = D / G;
    return {pack_plain(a.deter_in, U, D, scratch),
            pack_plain(a.stoch_in, U, Z, scratch),
            pack_linear(a.shared, 2 * U, D, scratch),
            pack_plain(a.read_in, U, D, scratch),
            pack_plain(a.logits, Z, U, scratch),
            pack_blocks(a.own, G, d, d, true, scratch),
            pack_blocks(a.gates, G, d, 3 * d, true, scratch)};
}

// Gradient of logits [Z] from that of the probabilities.
void softmax_back(const float *grad, const float *soft, float *out, int64_t classes, int64_t variables) {
    each(variables, [&](int64_t s, auto lanes) {
        Vec total = {};
        for (int64_t z = s; z < classes * variables; z += variables) total += load(grad + z, lanes) * load(soft + z, lanes);
        for (int64_t z = s; z < classes * variables; z += variables)
            store(out + z, load(soft + z, lanes) * (load(grad + z, lanes) - total), lanes);
    });
}

// Carries the gradient of some sequences' states from the last step to the first.
void backward_part(const Rollout &a, const RolloutGrads &g, const Turned &w, int64_t first, int64_t rows) {
    const int64_t B = a.batch, D = a.deter, U = a.hidden, S = a.stoch, C = a.classes, Z = S * C, G = a.blocks;
    const int64_t d = D / G;
    Scratch scratch;
    float *by_deter = scratch.take(rows * D), *by_probs = scratch.take(rows * Z), *kept = scratch.take(rows * D);
    float *hidden_x = scratch.take(rows * D), *read_x = scratch.take(rows * U), *inputs_x = scratch.take(rows * 2 * U);
    const float pass = 1.0f - (float)a.unimix;
    std::memset(by_deter, 0, (size_t)(rows * D) * sizeof(float));
    std::memset(by_probs, 0, (size_t)(rows * Z) * sizeof(float));
    for (int64_t t = a.time - 1; t >= 0; t--) {
        const int64_t at = t * B + first;
        float *before = g.before + at * D, *stoch = g.before_stoch + at * Z, *logits = g.logits + at * Z;
        float *gates = g.gates + at * 3 * D, *hidden = g.pre_hidden + at * D, *embedded = g.embedded + at * 2 * U;
        for (int64_t r = 0; r < rows; r++) {
            const float keep = a.keep[at + r];
            const float *deter = t ? a.out_deter + (at + r - B) * D : a.deter_start + (first + r) * D;
            const float *sample = t ? a.sample + (at + r - B) * Z : a.stoch_start + (first + r) * Z;
            each(D, [&](int64_t i, auto lanes) {
                store(before + r * D + i, load(deter + i, lanes) * keep, lanes);
                float *by = by_deter + r * D + i;
                store(by, load(by, lanes) + load(g.by_deter + (at + r) * D + i, lanes), lanes);
            });
            each(Z, [&](int64_t i, auto lanes) {
                store(stoch + r * Z + i, load(sample + i, lanes) * keep, lanes);
                const int64_t z = (at + r) * Z + i;
                const Vec outer = load(g.by_probs + z, lanes) + load(g.by_stoch + z, lanes);
                store(by_probs + r * Z + i, (load(by_probs + r * Z + i, lanes) + outer) * pass, lanes);
            });
            softmax_back(by_probs + r * Z, a.soft + (at + r) * Z, logits + r * Z, C, S);
        }
        gemm(rows, logits, Z, w.logits, read_x, U);
        for (int64_t r = 0; r < rows; r++)
            norm_silu_back(a.read + (at + r) * U, a.read_scale, read_x + r * U, g.read + (at + r) * U,
                           g.read_active + (at + r) * U, g.read_scale_rows + (at + r) * U, U);
        gemm_add(rows, g.read + at * U, U, w.read_in, by_deter, D);
        for (int64_t b = 0; b < G; b++) {
            for (int64_t r = 0; r < rows; r++) {
                const int64_t i = r * D + b * d;
                gru_back(a.pre_gates + (at + r) * 3 * D + b * 3 * d, before + i, by_deter + i,
                         gates + r * 3 * D + b * 3 * d, kept + i, d);
            }
            gemm(rows, gates + b * 3 * d, 3 * D, w.gates[b], hidden_x + b * d, D);
        }
        for (int64_t r = 0; r < rows; r++)
            norm_silu_back(a.pre_hidden + (at + r) * D, a.scale, hidden_x + r * D, hidden + r * D,
                           g.hidden_active + (at + r) * D, g.scale_rows + (at + r) * D, D);
        gemm(rows, hidden, D, w.shared, inputs_x, 2 * U);
        for (int64_t r = 0; r < 2 * rows; r++)
            norm_silu_back(a.embedded + (2 * at + r) * U, a.in_scale + r % 2 * U, inputs_x + r * U, embedded + r * U,
                           g.inputs_active + (2 * at + r) * U, g.in_scale_rows + (2 * at + r) * U, U);
        if (!t) break;
        for (int64_t b = 0; b < G; b++) gemm_add(rows, hidden + b * d, D, w.own[b], kept + b * d, D);
        gemm_add(rows, embedded, 2 * U, w.deter_in, kept, D);
        gemm(rows, embedded + U, 2 * U, w.stoch_in, by_probs, Z);
        for (int64_t r = 0; r < rows; r++) {
            const float keep = a.keep[at + r];
            each(D, [&](int64_t i, auto lanes) { store(by_deter + r * D + i, load(kept + r * D + i, lanes) * keep, lanes); });
            each(Z, [&](int64_t i, auto lanes) { store(by_probs + r * Z + i, load(by_probs + r * Z + i, lanes) * keep, lanes); });
        }
    }
}

struct Product {  // c [m, n] += a^T b over all rows
    const float *a;
    int64_t a_step, m;
    const float *b;
    int64_t b_step, n;
    float *c;
};

struct Column {  // out [n] += sum of the rows of `from`
    const float *from;
    int64_t step, n;
    float *out;
};

// Every weight gradient as a product or a sum over rows.
struct WeightGrads {
    std::vector<Product> products;
    std::vector<Column> columns;

    WeightGrads(const Rollout &a, const RolloutGrads &g) {
        const int64_t D = a.deter, U = a.hidden, Z = a.stoch * a.classes, G = a.blocks, d = D / G;
        products = {
            {g.embedded, 2 * U, U, g.before, D, D, g.deter_in},
            {g.embedded + U, 2 * U, U, g.before_stoch, Z, Z, g.stoch_in},
            {g.inputs_active, 2 * U, 2 * U, g.pre_hidden, D, D, g.shared},
            {g.read, U, U, a.out_deter, D, D, g.read_in},
            {g.logits, Z, Z, g.read_active, U, U, g.logits_weight},
        };
        for (int64_t b = 0; b < G; b++) {
            products.push_back({g.before + b * d, D, d, g.pre_hidden + b * d, D, d, g.own + b * d * d});
            products.push_back({g.hidden_active + b * d, D, d, g.gates + b * 3 * d, 3 * D, 3 * d,
                                g.gates_weight + b * d * 3 * d});
        }
        columns = {
            {g.embedded, 2 * U, U, g.deter_bias},        {g.embedded + U, 2 * U, U, g.stoch_bias},
            {g.in_scale_rows, 2 * U, 2 * U, g.in_scale}, {g.scale_rows, D, D, g.scale},
            {g.gates, 3 * D, 3 * D, g.gates_bias},       {g.read_scale_rows, U, U, g.read_scale},
            {g.logits, Z, Z, g.logits_bias},
        };
    }
    int64_t size() const {
        int64_t total = 0;
        for (const Product &p : products) total += p.m * p.n;
        for (const Column &c : columns) total += c.n;
        return total;
    }
};

void sum_rows(const Column &column, int64_t first, int64_t rows, int64_t at, int64_t count, float *out) {
    for (int64_t p = first; p < first + rows; p++) {
        const float *row = column.from + p * column.step + at;
        each(count, [&](int64_t i, auto lanes) { store(out + i, load(out + i, lanes) + load(row + i, lanes), lanes); });
    }
}

// Small weights: some groups of rows, each read once from end to end into sums of its own; groups are added in order.
bool by_groups(const WeightGrads &grads, int64_t rows, int64_t groups, int64_t threads) {
    const int64_t size = grads.size();
    Scratch scratch;
    float *sums = scratch.take(groups * size);
    const bool enough = each_part(groups, threads, [&](int64_t group) {
        const int64_t first = group * rows / groups, count = (group + 1) * rows / groups - first;
        float *at = sums + group * size;
        std::memset(at, 0, (size_t)size * sizeof(float));
        int64_t widest = 0;
        for (const Product &p : grads.products) widest = std::max(widest, p.n);
        Scratch own;
        float *space = own.take(cross_space(count, widest));
        for (const Product &p : grads.products) {
            cross(count, p.a + first * p.a_step, p.a_step, p.m, p.b + first * p.b_step, p.b_step, p.n, at, p.n, space);
            at += p.m * p.n;
        }
        for (const Column &c : grads.columns) {
            sum_rows(c, first, count, 0, c.n, at);
            at += c.n;
        }
    });
    const auto add = [&](const float *from, float *out, int64_t n) {
        each(n, [&](int64_t i, auto lanes) {
            Vec total = {};
            for (int64_t group = 0; group < groups; group++) total += load(from + group * size + i, lanes);
            store(out + i, total, lanes);
        });
    };
    const float *at = sums;
    for (const Product &p : grads.products) {
        add(at, p.c, p.m * p.n);
        at += p.m * p.n;
    }
    for (const Column &c : grads.columns) {
        add(at, c.out, c.n);
        at += c.n;
    }
    return enough;
}

// Large weights: one task per panel of columns, which goes through all rows.
bool by_panels(const WeightGrads &grads, int64_t rows, int64_t threads) {
    std::vector<std::pair<int64_t, int64_t>> tasks;  // product or, counted from -1 down, column; first column
    for (size_t p = 0; p < grads.products.size(); p++)
        for (int64_t j = 0; j < grads.products[p].n; j += PANEL) tasks.emplace_back((int64_t)p, j);
    for (size_t c = 0; c < grads.columns.size(); c++)
        for (int64_t j = 0; j < grads.columns[c].n; j += PANEL) tasks.emplace_back(-1 - (int64_t)c, j);
    return each_part((int64_t)tasks.size(), threads, [&](int64_t task) {
        const auto [which, j] = tasks[task];
        if (which < 0) {
            const Column &c = grads.columns[-1 - which];
            return sum_rows(c, 0, rows, j, std::min<int64_t>(PANEL, c.n - j), c.out + j);
        }
        const Product &p = grads.products[which];
        const int64_t width = std::min<int64_t>(PANEL, p.n - j);
        Scratch space;
        cross(rows, p.a, p.a_step, p.m, p.b + j, p.b_step, width, p.c + j, p.n, space.take(cross_space(rows, width)));
    });
}

}  // namespace

REGION rollout_forward(const Rollout *args) {
    const Rollout &a = *args;
    if (a.bytes != sizeof a) return WRONG_MIRROR;
    try {
        Scratch scratch;
        const Weights weights = pack_forward(a, scratch);
        const int64_t parts = std::min(a.threads, a.batch);
        return each_part(parts, parts, [&](int64_t part) {
            const int64_t first = part * a.batch / parts;
            forward_part(a, weights, first, (part + 1) * a.batch / parts - first);
        }) ? DONE : NO_MEMORY;
    } catch (const std::bad_alloc &) {
        return NO_MEMORY;
    }
}

REGION rollout_backward(const Rollout *args, const RolloutGrads *grads) {
    const Rollout &a = *args;
    const RolloutGrads &g = *grads;
    if (a.bytes != sizeof a || g.bytes != sizeof g) return WRONG_MIRROR;
    const int64_t rows = a.time * a.batch;
    try {
        Scratch scratch;
        const Turned weights = pack_backward(a, scratch);
        const int64_t parts = std::min(a.threads, a.batch);
        const bool enough = each_part(parts, parts, [&](int64_t part) {
            const int64_t first = part * a.batch / parts;
            backward_part(a, g, weights, first, (part + 1) * a.batch / parts - first);
        });
        if (!enough) return NO_MEMORY;
        const WeightGrads out(a, g);
        // By shape alone, so that no bit depends on the number of threads.
        const int64_t groups = std::min<int64_t>(8, std::min(GROUPED_FLOATS / out.size(), rows / 32));
        return (groups > 1 ? by_groups(out, rows, groups, a.threads) : by_panels(out, rows, a.threads)) ? DONE : NO_MEMORY;
    } catch (const std::bad_alloc &) {
        return NO_MEMORY;
    }
}
