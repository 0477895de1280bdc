// Attention over the rows of a cache.
#pragma once

#include "vectors.h"

namespace {

// Tokens of one sequence that read keys together, and how many keys they read at once.
constexpr int64_t RUN = 16;
constexpr int64_t KEYS = 64;
// The most query heads that may share a key head.
constexpr int64_t SHARING = 64;

// A query's softmax over the keys so far, as FlashAttention has it (arXiv 2205.14135).
struct Softmax {
    float most = -INFINITY;
    float sum = 0;
};

// Ask memory for what is to be read soon.
inline void ask_for(const float *from, int64_t floats) {
    for (int64_t n = 0; n < floats; n += 16) __builtin_prefetch(from + n);
}

// A query's products with `count` keys, filled up to a multiple of 4. The values of these keys are
// asked for if this is the first query that reads them.
void score(const float *query, const float *keys, const float *values, int64_t count,
           int64_t width, bool is_first, float *scores) {
    for (int64_t i = 0; i < count; i += 4) {
        const float *four[4];
        for (int n = 0; n < 4; n++) four[n] = keys + std::min(i + n, count - 1) * width;
        if (is_first) ask_for(values + i * width, 4 * width);
        Floats sums[4] = {};
        for (int64_t n = 0; n < width; n += LANES)
            for (int m = 0; m < 4; m++)
                sums[m] = fused(load(query + n), load(four[m] + n), sums[m]);
        *(LooseFour *)(scores + i) = sums_of(sums[0], sums[1], sums[2], sums[3]);
    }
}

// Values by their weights, VECTORS of each row, added to `before` times what `out` has.
template <int VECTORS>
void mix(const float *values, const float *weights, int64_t count, int64_t width, float before,
         float *out) {
    Floats said[VECTORS];
    for (int n = 0; n < VECTORS; n++) said[n] = load(out + n * LANES) * before;
    for (int64_t i = 0; i < count; i++)
#pragma GCC unroll 8
        for (int n = 0; n < VECTORS; n++)
            said[n] = fused(load(values + i * width + n * LANES), all(weights[i]), said[n]);
    for (int n = 0; n < VECTORS; n++) store(out + n * LANES, said[n]);
}

// Go on with a query's attention over `count` more rows; `out` is what they say, not yet divided.
void attend(const float *query, const float *keys, const float *values, int64_t count,
            int64_t width, float scale, bool is_first, Softmax &softmax, float *out) {
    alignas(64) float weights[KEYS];
    score(query, keys, values, count, width, is_first, weights);
    for (int64_t i = count; i % LANES; i++) weights[i] = weights[count - 1];
    Floats highest = load(weights);
    for (int64_t i = LANES; i < count; i += LANES) {
        const Floats scores = load(weights + i);
        highest = scores > highest ? scores : highest;
    }
    float most = softmax.most;
    for (int n = 0; n < LANES; n++) most = std::max(most, highest[n] * scale);
    Floats total{};
    for (int64_t i = 0; i < count; i += LANES) {
        const Floats weight = exp_of(load(weights + i) * scale - most);
        store(weights + i, weight);
        if (i + LANES <= count) total += weight;
    }
    const float before = softmax.most == -INFINITY ? 0 : std::exp(softmax.most - most);
    float sum = sum_of(total);
    for (int64_t i = count - count % LANES; i < count; i++) sum += weights[i];
    softmax.sum = softmax.sum * before + sum;
    softmax.most = most;
    int64_t n = 0;
    for (; n + 8 * LANES <= width; n += 8 * LANES)
        mix<8>(values + n, weights, count, width, before, out + n);
    for (; n + 4 * LANES <= width; n += 4 * LANES)
        mix<4>(values + n, weights, count, width, before, out + n);
    for (; n < width; n += LANES) mix<1>(values + n, weights, count, width, before, out + n);
}

}  // namespace
