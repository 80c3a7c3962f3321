// Arguments of the image encoder and of the image reconstruction. learner/native/vision.py mirrors these
// structures field by field. N images, H, W their sides, C channels; O outputs and k side of a level's convolution.
// Images are dealt out in parts of `part_images`; arrays are contiguous float32 unless said.
#pragma once

#include <cstdint>

struct Encode {
    int64_t bytes;  // size of this structure, a check of the mirror
    int64_t images, height, width, channels, rows, columns, levels, side, threads;  // rows, columns: padded sides
    const int64_t *outputs;                                   // [levels]
    const uint8_t *image;                                     // [N, H, W, C]
    const float *const *weight, *const *bias, *const *scale;  // by level: [O, C, k, k], [O], [O]
    float *features;                                          // result [N, h, w, O]
    float *const *pooled;    // kept: by part; by group of lanes and level [h, w, O, lanes], before the norm
    uint8_t *const *winner;  // kept, alike: which of the four pooled pixels was the largest
};

struct EncodeGrads {
    int64_t bytes;
    const float *by_features;  // [N, h, w, O]
    float *sums;               // by part and level: gradients of weight, bias, scale
};

struct Reconstruct {
    int64_t bytes;
    int64_t images, height, width, keys, grid_height, grid_width, inputs, levels, side, threads;
    const int64_t *outputs;   // [levels], of one parity
    const int64_t *channels;  // [keys]; their sum is the last level's outputs
    const uint8_t *image;     // [N, H, W, C]
    const float *maps;        // [N, h, w, inputs]
    // By level, parities first: [4 O, C, k, k], [4 O]; scales [O] but of the last.
    const float *const *weight, *const *bias, *const *scale;
    float *errors;        // result [N, keys]
    float *const *raw;    // kept: by part; by group of lanes and level but the last [h, w, 4 O, lanes], before the norm
    float *const *slope;  // kept, alike: [h, w, 4 C, lanes], gradient of half the errors before the sigmoid
};

struct ReconstructGrads {
    int64_t bytes;
    const float *by_errors;  // [N, keys]
    float *by_maps;          // [N, h, w, inputs]
    float *sums;             // by part and level: gradients of weight, bias, scale
};
