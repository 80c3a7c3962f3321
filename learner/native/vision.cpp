// Image encoder and reconstruction: some images go through all levels while their maps are in cache, forward and
// backward. Contract and reference: learner/nn/vision.py; letters: vision.h.
#include "vision.h"

#include "planes.h"

namespace {

constexpr int64_t PART_GROUPS = 2;  // groups of LANES images that share buffers and sums
constexpr int64_t PART_IMAGES = PART_GROUPS * LANES;

struct Shape {
    int64_t height, width, inputs, outputs;  // of a level's convolution; outputs of all parities
    int64_t weights(int64_t side) const { return outputs * inputs * side * side; }
    int64_t row() const { return width * outputs; }
    int64_t size() const { return height * row(); }
};

// What the groups of a part have in common.
struct Share {
    const int64_t part, first, count, pad;  // images
    Scratch scratch;
    std::vector<Shape> shapes;
    std::vector<Planes> inputs;  // of each level's convolution
    std::vector<Planes> by_y;    // gradients of its results
    std::vector<Registers> sums;  // gradients of weight, bias and scale

    Share(int64_t part, int64_t images, int64_t side)
        : part(part), first(part * PART_IMAGES), count(std::min(PART_IMAGES, images - first)), pad(side / 2) {}

    template <class F> void each_group(F &&f) const {
        for (int64_t at = 0; at < count; at += LANES) f(at / LANES, first + at, std::min<int64_t>(LANES, count - at));
    }

    // Sums of level n: weights, then `others`.
    void take_sums(int64_t n, int64_t side, int64_t others) {
        const int64_t size = shapes[n].weights(side) + others;
        sums.push_back({scratch.take<Images>(size)});
        std::memset(sums.back().data, 0, (size_t)size * sizeof(Images));
    }

    // All lanes of level n's sums; the end of what was written.
    float *write_sums(int64_t n, int64_t side, int64_t others, float *out) const {
        const int64_t weights = shapes[n].weights(side);
        add_filter_lanes(sums[n].data, shapes[n].outputs, shapes[n].inputs, side, out);
        add_lanes(sums[n].data + weights, others, out + weights);
        return out + weights + others;
    }
};

struct Encoding : Share {
    const Encode &a;
    std::vector<Filter> filters, back;
    Images *two, *grad;  // two rows of results; gradient of a level's input

    Encoding(const Encode &a, int64_t part, bool backward) : Share(part, a.images, a.side), a(a) {
        int64_t height = a.rows, width = a.columns, channels = a.channels, widest = 0;
        for (int64_t n = 0; n < a.levels; n++) {
            const int64_t O = a.outputs[n];
            shapes.push_back({height, width, channels, O});
            inputs.emplace_back(height, width, channels, pad, scratch);
            if (backward) {
                // The first level's input has no gradient: two rows at a time will do.
                by_y.emplace_back(n ? height : 2, width, O, n ? pad : 0, scratch);
                take_sums(n, a.side, 2 * O);
                back.push_back(pack_filter(a.weight[n], nullptr, O, channels, a.side, true, scratch));
            } else {
                filters.push_back(pack_filter(a.weight[n], a.bias[n], O, channels, a.side, false, scratch));
            }
            widest = std::max(widest, shapes[n].size() / 4);
            height /= 2, width /= 2, channels = O;
        }
        two = scratch.take<Images>(2 * widest), grad = scratch.take<Images>(widest);
    }

    int64_t kept() const {  // of a group
        int64_t total = 0;
        for (const Shape &s : shapes) total += s.size() / 4;
        return total;
    }

    void read_images(int64_t from, int64_t lanes) const {
        const int64_t row = a.width * a.channels, image = a.height * row;
        for (int64_t y = 0; y < a.height; y++) {
            Images *to = inputs[0].at(y, 0);
            to_lanes(a.image + from * image + y * row, lanes, image, row, to);
            for (int64_t i = 0; i < row; i++) to[i] = (Images)((Vec)to[i] * (1.0f / 255.0f) - 0.5f);
        }
    }

    // Norm and SiLU of level n's pooled maps, into the next level's input or the pixels of `last`.
    void activate(int64_t n, const Images *pooled, Images *last) const {
        const int64_t height = shapes[n].height / 2, width = shapes[n].width / 2, O = shapes[n].outputs;
        for (int64_t y = 0; y < height; y++)
            for (int64_t x = 0; x < width; x++, pooled += O)
                norm_silu(pooled, a.scale[n], last ? last + (y * width + x) * O : inputs[n + 1].at(y, x), O);
    }

    static void pool(const Shape &s, const Images *two, Images *most, Bytes *from) {
        const int64_t O = s.outputs, row = s.row();
        for (int64_t x = 0; x < s.width / 2; x++, two += 2 * O)
            for (int64_t o = 0; o < O; o++) {
                const Vec a00 = (Vec)two[o], a01 = (Vec)two[O + o], a10 = (Vec)two[row + o], a11 = (Vec)two[row + O + o];
                const VecInt left_low = larger(a10, a00), right_low = larger(a11, a01);
                const Vec left = left_low ? a10 : a00, right = right_low ? a11 : a01;
                const VecInt on_right = larger(right, left);
                *most++ = (Images)(on_right ? right : left);
                *from++ = __builtin_convertvector(-2 * (on_right ? right_low : left_low) - on_right, Bytes);
            }
    }

    void forward() const {
        const Shape &end = shapes.back();
        each_group([&](int64_t group, int64_t from, int64_t lanes) {
            Images *pooled = (Images *)a.pooled[part] + group * kept();
            Bytes *winner = (Bytes *)a.winner[part] + group * kept();
            read_images(from, lanes);
            for (int64_t n = 0; n < a.levels; n++) {
                const Shape &s = shapes[n];
                for (int64_t y = 0; y < s.height; y += 2) {
                    filter_row(filters[n], inputs[n], y, two);
                    filter_row(filters[n], inputs[n], y + 1, two + s.row());
                    pool(s, two, pooled + y * s.row() / 4, winner + y * s.row() / 4);
                }
                activate(n, pooled, n + 1 < a.levels ? nullptr : grad);
                pooled += s.size() / 4, winner += s.size() / 4;
            }
            from_lanes(grad, lanes, end.size() / 4, end.size() / 4, a.features + from * end.size() / 4);
        });
    }

    // `rows` rows of the gradient of level n's results, from row y on: each goes to the largest of four.
    void unpool(int64_t n, int64_t y, int64_t rows, const Bytes *winner) const {
        const Shape &s = shapes[n];
        const Images *from = grad + y * s.row() / 4;
        winner += y * s.row() / 4;
        const int64_t half = s.width / 2;
        for (int64_t pixel = 0; pixel < rows * s.width / 4; pixel++) {
            const int64_t row = 2 * (pixel / half), column = 2 * (pixel % half);
            Images *upper = by_y[n].at(row, column), *lower = by_y[n].at(row + 1, column);
            for (int64_t o = 0; o < s.outputs; o++) {
                const VecInt at = __builtin_convertvector(*winner++, VecInt);
                const Vec value = (Vec)*from++;
                upper[o] = (Images)(at == 0 ? value : Vec{});
                upper[s.outputs + o] = (Images)(at == 1 ? value : Vec{});
                lower[o] = (Images)(at == 2 ? value : Vec{});
                lower[s.outputs + o] = (Images)(at == 3 ? value : Vec{});
            }
        }
    }

    // Adds to the sums of level n, from the gradient of its features in `grad`, which becomes that of its input.
    void level_back(int64_t n, const Images *pooled, const Bytes *winner) const {
        const Shape &s = shapes[n];
        const int64_t O = s.outputs;
        Images *by_bias = sums[n].data + s.weights(a.side);
        for (int64_t i = 0; i < s.size() / 4; i += O)
            norm_silu_back(pooled + i, a.scale[n], grad + i, grad + i, by_bias + O, by_bias, O);
        for (int64_t y = 0; y < s.height; y += by_y[n].height) {
            unpool(n, y, by_y[n].height, winner);
            filter_grad(by_y[n], inputs[n], y, a.side, sums[n].data);
        }
        if (n)
            for (int64_t y = 0; y < s.height; y++) filter_row(back[n], by_y[n], y, grad + y * s.width * s.inputs);
    }

    void backward(const EncodeGrads &g) const {
        const int64_t size = shapes.back().size() / 4;
        each_group([&](int64_t group, int64_t from, int64_t lanes) {
            const Images *pooled = (Images *)a.pooled[part] + group * kept();
            const Bytes *winner = (Bytes *)a.winner[part] + group * kept();
            read_images(from, lanes);
            for (int64_t n = 0; n + 1 < a.levels; pooled += shapes[n].size() / 4, winner += shapes[n].size() / 4, n++)
                activate(n, pooled, nullptr);
            to_lanes(g.by_features + from * size, lanes, size, size, grad);
            for (int64_t n = a.levels - 1; n >= 0; n--) {
                level_back(n, pooled, winner);
                if (n) pooled -= shapes[n - 1].size() / 4, winner -= shapes[n - 1].size() / 4;
            }
        });
        int64_t total = 0;
        for (const Shape &s : shapes) total += s.weights(a.side) + 2 * s.outputs;
        float *out = g.sums + part * total;
        for (int64_t n = 0; n < a.levels; n++) out = write_sums(n, a.side, 2 * shapes[n].outputs, out);
    }
};

// Images that grow from small maps.
struct Growing : Share {
    const Reconstruct &a;
    std::vector<Filter> filters, back;
    Images *grad, *errors, *target;  // gradient of a level's input; of each key; two rows of the images

    Growing(const Reconstruct &a, int64_t part, bool backward) : Share(part, a.images, a.side), a(a) {
        int64_t height = a.grid_height, width = a.grid_width, channels = a.inputs, widest = 0;
        for (int64_t n = 0; n < a.levels; n++) {
            const int64_t O = 4 * a.outputs[n];
            shapes.push_back({height, width, channels, O});
            inputs.emplace_back(height, width, channels, pad, scratch);
            if (backward) {
                by_y.emplace_back(height, width, O, pad, scratch);
                take_sums(n, a.side, others(n));
                back.push_back(pack_filter(a.weight[n], nullptr, O, channels, a.side, true, scratch));
            } else {
                filters.push_back(pack_filter(a.weight[n], a.bias[n], O, channels, a.side, false, scratch));
            }
            widest = std::max(widest, height * width * channels);
            height *= 2, width *= 2, channels = a.outputs[n];
        }
        grad = scratch.take<Images>(widest), errors = scratch.take<Images>(a.keys);
        target = scratch.take<Images>(2 * a.width * channels);
    }

    bool last(int64_t n) const { return n + 1 == a.levels; }
    int64_t others(int64_t n) const { return a.outputs[n] * (last(n) ? 4 : 5); }  // biases and scales

    // A level's results of a group; the last one's are its slope.
    std::vector<Registers> results(int64_t group) const {
        int64_t kept = 0;
        for (const Shape &s : shapes) kept += s.size();
        kept -= shapes.back().size();
        Images *at = (Images *)a.raw[part] + group * kept;
        std::vector<Registers> out;
        for (const Shape &s : shapes) out.push_back({at}), at += s.size();
        out.back().data = (Images *)a.slope[part] + group * shapes.back().size();
        return out;
    }

    void read_maps(int64_t from, int64_t lanes) const {
        const int64_t row = a.grid_width * a.inputs, maps = a.grid_height * row;
        for (int64_t y = 0; y < a.grid_height; y++)
            to_lanes(a.maps + from * maps + y * row, lanes, maps, row, inputs[0].at(y, 0));
    }

    // Norm and SiLU of level n's four parities, into their places in the next level's input.
    void activate(int64_t n, const Images *raw) const {
        const Shape &s = shapes[n];
        for (int64_t y = 0; y < s.height; y++)
            for (int64_t x = 0; x < s.width; x++)
                for (int64_t place = 0; place < 4; place++, raw += a.outputs[n])
                    norm_silu(raw, a.scale[n], inputs[n + 1].at(2 * y + place / 2, 2 * x + place % 2), a.outputs[n]);
    }

    void forward() const {
        each_group([&](int64_t group, int64_t from, int64_t lanes) {
            const std::vector<Registers> out = results(group);
            std::memset(errors, 0, (size_t)a.keys * sizeof(Images));
            read_maps(from, lanes);
            for (int64_t n = 0; n < a.levels; n++) {
                for (int64_t y = 0; y < shapes[n].height; y++) {
                    Images *row = out[n].data + y * shapes[n].row();
                    filter_row(filters[n], inputs[n], y, row);
                    if (last(n)) compare(y, row, from, lanes);
                }
                if (!last(n)) activate(n, out[n].data);
            }
            from_lanes(errors, lanes, a.keys, a.keys, a.errors + from * a.keys);
        });
    }

    // Squared errors of the last level's row y, which becomes the slope of half of them.
    void compare(int64_t y, Images *at, int64_t from, int64_t lanes) const {
        const int64_t C = a.outputs[a.levels - 1], row = a.width * C, image = a.height * row;
        for (int64_t line = 2 * y; line < std::min(2 * y + 2, a.height); line++)
            to_lanes(a.image + from * image + line * row, lanes, image, row, target + line % 2 * row);
        Scratch own;
        Images *row_errors = own.take<Images>(a.keys);
        std::memset(row_errors, 0, (size_t)a.keys * sizeof(Images));
        for (int64_t x = 0; x < shapes.back().width; x++)
            for (int64_t place = 0; place < 4; place++, at += C) {
                const int64_t column = 2 * x + place % 2;
                if (2 * y + place / 2 >= a.height || column >= a.width) {
                    std::memset(at, 0, (size_t)C * sizeof(Images));
                    continue;
                }
                const Images *truth = target + place / 2 * row + column * C;
                for (int64_t key = 0, c = 0; key < a.keys; key++)
                    for (const int64_t end = c + a.channels[key]; c < end; c++) {
                        const Vec pixel = sigmoid((Vec)at[c]), error = pixel - (Vec)truth[c] * (1.0f / 255.0f);
                        row_errors[key] += (Images)(error * error);
                        at[c] = (Images)(error * pixel * (1.0f - pixel));
                    }
            }
        for (int64_t key = 0; key < a.keys; key++) errors[key] += row_errors[key];
    }

    // Gradient of the last level's results.
    void slopes_back(const ReconstructGrads &g, const Images *slope, int64_t from, int64_t lanes) const {
        const Planes &out = by_y.back();
        Images *by_bias = sums.back().data + shapes.back().weights(a.side);
        to_lanes(g.by_errors + from * a.keys, lanes, a.keys, a.keys, errors);
        for (int64_t y = 0; y < out.height; y++)
            for (int64_t x = 0; x < out.width; x++)
                for (int64_t place = 0, i = 0; place < 4; place++)
                    for (int64_t key = 0; key < a.keys; key++)
                        for (int64_t c = 0; c < a.channels[key]; c++, i++) {
                            out.at(y, x)[i] = 2.0f * errors[key] * *slope++;
                            by_bias[i] += out.at(y, x)[i];
                        }
    }

    // Gradient of level n's results from that of what they became, in `grad` [2h, 2w, O].
    void norm_back(int64_t n, const Images *raw) const {
        const Shape &s = shapes[n];
        const int64_t O = a.outputs[n];
        Images *by_bias = sums[n].data + s.weights(a.side), *by_scale = by_bias + 4 * O;
        for (int64_t y = 0; y < s.height; y++)
            for (int64_t x = 0; x < s.width; x++)
                for (int64_t place = 0; place < 4; place++, raw += O)
                    norm_silu_back(raw, a.scale[n], grad + ((2 * y + place / 2) * 2 * s.width + 2 * x + place % 2) * O,
                                   by_y[n].at(y, x) + place * O, by_scale, by_bias + place * O, O);
    }

    void backward(const ReconstructGrads &g) const {
        const int64_t size = a.grid_height * a.grid_width * a.inputs;
        each_group([&](int64_t group, int64_t from, int64_t lanes) {
            const std::vector<Registers> out = results(group);
            read_maps(from, lanes);
            for (int64_t n = 0; n + 1 < a.levels; n++) activate(n, out[n].data);
            for (int64_t n = a.levels - 1; n >= 0; n--) {
                if (last(n))
                    slopes_back(g, out[n].data, from, lanes);
                else
                    norm_back(n, out[n].data);
                filter_grad(by_y[n], inputs[n], 0, a.side, sums[n].data);
                const int64_t row = shapes[n].width * shapes[n].inputs;
                for (int64_t y = 0; y < shapes[n].height; y++) filter_row(back[n], by_y[n], y, grad + y * row);
            }
            from_lanes(grad, lanes, size, size, g.by_maps + from * size);
        });
        int64_t total = 0;
        for (int64_t n = 0; n < a.levels; n++) total += shapes[n].weights(a.side) + others(n);
        float *out = g.sums + part * total;
        for (int64_t n = 0; n < a.levels; n++) out = write_sums(n, a.side, others(n), out);
    }
};

int64_t part_count(int64_t images) { return (images + PART_IMAGES - 1) / PART_IMAGES; }

}  // namespace

REGION vision_lanes() { return LANES; }
REGION vision_part_images() { return PART_IMAGES; }

REGION encode_forward(const Encode *a) {
    if (a->bytes != sizeof(Encode)) return WRONG_MIRROR;
    const auto run = [&](int64_t part) { Encoding(*a, part, false).forward(); };
    return each_part(part_count(a->images), a->threads, run) ? DONE : NO_MEMORY;
}

REGION encode_backward(const Encode *a, const EncodeGrads *g) {
    if (a->bytes != sizeof(Encode) || g->bytes != sizeof(EncodeGrads)) return WRONG_MIRROR;
    const auto run = [&](int64_t part) { Encoding(*a, part, true).backward(*g); };
    return each_part(part_count(a->images), a->threads, run) ? DONE : NO_MEMORY;
}

REGION reconstruct_forward(const Reconstruct *a) {
    if (a->bytes != sizeof(Reconstruct)) return WRONG_MIRROR;
    const auto run = [&](int64_t part) { Growing(*a, part, false).forward(); };
    return each_part(part_count(a->images), a->threads, run) ? DONE : NO_MEMORY;
}

REGION reconstruct_backward(const Reconstruct *a, const ReconstructGrads *g) {
    if (a->bytes != sizeof(Reconstruct) || g->bytes != sizeof(ReconstructGrads)) return WRONG_MIRROR;
    const auto run = [&](int64_t part) { Growing(*a, part, true).backward(*g); };
    return each_part(part_count(a->images), a->threads, run) ? DONE : NO_MEMORY;
}
