// Scratch memory of one part of the work, and the loop over parts.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

enum { DONE = 0, NO_MEMORY = 1, WRONG_MIRROR = 2 };  // what a region returns
#define REGION extern "C" __attribute__((visibility("default"))) int

class Scratch {
public:
    Scratch() = default;
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;
    ~Scratch() {
        for (void *block : blocks) std::free(block);
    }
    template <class T = float> T *take(int64_t count) {
        const size_t bytes = ((size_t)count * sizeof(T) + 127) / 64 * 64;
        blocks.reserve(blocks.size() + 1);
        void *block = std::aligned_alloc(64, bytes);
        if (!block) throw std::bad_alloc();
        blocks.push_back(block);
        return static_cast<T *>(block);
    }

private:
    std::vector<void *> blocks;
};

// Calls f(part) for each part, on up to `threads` threads; false when memory ran out. The result of a part must
// not depend on any other part: then neither thread count nor schedule changes a bit.
template <class F> bool each_part(int64_t parts, int64_t threads, F &&f) {
    std::atomic<bool> enough{true};
#pragma omp parallel for schedule(dynamic, 1) num_threads((int)threads)
    for (int64_t part = 0; part < parts; part++) {
        try {
            f(part);
        } catch (const std::bad_alloc &) {
            enough = false;
        }
    }
    return enough;
}
