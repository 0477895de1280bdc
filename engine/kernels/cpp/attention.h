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

// The same for a row that is as wide as may be.
void mix_row(const float *values, const float *weights, int64_t count, int64_t width, float before,
             float *out) {
    int64_t n = 0;
    for (; n + 8 * LANES <= width; n += 8 * LANES)
        mix<8>(values + n, weights, count, width, before, out + n);
    for (; n + 4 * LANES <= width; n += 4 * LANES)
        mix<4>(values + n, weights, count, width, before, out + n);
    for (; n < width; n += LANES) mix<1>(values + n, weights, count, width, before, out + n);
}

// From a query's scores to the weights of `count` more rows, for which there is room up to a
// multiple of LANES; returns what the weights before them are to be multiplied by.
float weigh(float *weights, int64_t count, float scale, Softmax &softmax) {
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
    return before;
}

// Go on with a query's attention over `count` more rows; `out` is what they say, not yet divided.
void attend(const float *query, const float *keys, const float *values, int64_t count,
            int64_t width, float scale, bool is_first, Softmax &softmax, float *out) {
    alignas(64) float weights[KEYS];
    score(query, keys, values, count, width, is_first, weights);
    const float before = weigh(weights, count, scale, softmax);
    mix_row(values, weights, count, width, before, out);
}

// What follows is the same for TILE queries at once, each of whose sums has the same order.

// A query, and which of a block's keys it sees.
struct Query {
    const float *numbers;
    float *out;
    Softmax *softmax;
    int64_t from, end;
};

// Keys [count, width] turned to [width, KEYS], filled up with the last one. Their values are asked
// for meanwhile.
void turn(const float *keys, const float *values, int64_t count, int64_t width, float *turned) {
    for (int64_t i = 0; i < KEYS; i += 4) {
        const float *rows[4];
        for (int m = 0; m < 4; m++) rows[m] = keys + std::min(i + m, count - 1) * width;
        if (i < count) ask_for(values + i * width, std::min<int64_t>(4, count - i) * width);
        for (int64_t k = 0; k < width; k += 4) {
            Four four[4], pairs[4];
            for (int m = 0; m < 4; m++) four[m] = *(const LooseFour *)(rows[m] + k);
            for (int m = 0; m < 2; m++) {
                pairs[2 * m] = __builtin_shuffle(four[2 * m], four[2 * m + 1], FourInts{0, 4, 1, 5});
                pairs[2 * m + 1] =
                    __builtin_shuffle(four[2 * m], four[2 * m + 1], FourInts{2, 6, 3, 7});
            }
            for (int m = 0; m < 2; m++) {
                float *to = turned + (k + 2 * m) * KEYS + i;
                *(LooseFour *)to = __builtin_shuffle(pairs[m], pairs[m + 2], FourInts{0, 1, 4, 5});
                *(LooseFour *)(to + KEYS) =
                    __builtin_shuffle(pairs[m], pairs[m + 2], FourInts{2, 3, 6, 7});
            }
        }
    }
}

// Two vectors for each of TILE queries.
struct Pairs {
    Floats of[TILE][2];
};

// Products of TILE queries with two vectors of keys, of the numbers that `score` has in lanes FIRST
// to FIRST + COUNT, added up as sums_of does it.
template <int FIRST, int COUNT>
inline Pairs lane_sums(const Query *const *queries, const float *turned, int64_t width) {
    if constexpr (COUNT > 1) {
        const Pairs low = lane_sums<FIRST, COUNT / 2>(queries, turned, width);
        Pairs sums = lane_sums<FIRST + COUNT / 2, COUNT / 2>(queries, turned, width);
        for (int m = 0; m < TILE; m++)
            for (int n = 0; n < 2; n++) sums.of[m][n] = low.of[m][n] + sums.of[m][n];
        return sums;
    } else {
        Pairs sums = {};
        for (int64_t k = FIRST; k < width; k += LANES) {
            const Floats low = load(turned + k * KEYS), high = load(turned + k * KEYS + LANES);
#pragma GCC unroll 12
            for (int m = 0; m < TILE; m++) {
                const Floats number = all(queries[m]->numbers[k]);
                sums.of[m][0] = fused(number, low, sums.of[m][0]);
                sums.of[m][1] = fused(number, high, sums.of[m][1]);
            }
        }
        return sums;
    }
}

// Values of keys from `first` on by the weights of TILE queries, two vectors of each row from
// `column` on, added to `before` times what `out` has.
inline void mix_tile(const Query *const *queries, const float *values, const float *const *weights,
                     int64_t first, int64_t last, int64_t column, int64_t width,
                     const float *before) {
    Floats said[TILE][2];
#pragma GCC unroll 12
    for (int m = 0; m < TILE; m++)
        for (int n = 0; n < 2; n++)
            said[m][n] = load(queries[m]->out + column + n * LANES) * before[m];
    for (int64_t i = first; i < last; i++) {
        const float *row = values + i * width + column;
        const Floats low = load(row), high = load(row + LANES);
#pragma GCC unroll 12
        for (int m = 0; m < TILE; m++) {
            const Floats weight = all(weights[m][i]);
            said[m][0] = fused(low, weight, said[m][0]);
            said[m][1] = fused(high, weight, said[m][1]);
        }
    }
#pragma GCC unroll 12
    for (int m = 0; m < TILE; m++)
        for (int n = 0; n < 2; n++) store(queries[m]->out + column + n * LANES, said[m][n]);
}

// Go on with the attention of `count` queries, at most TILE, over a block of keys.
void attend_tile(const Query *all_queries, int count, const float *turned, const float *values,
                 int64_t width, float scale) {
    constexpr int64_t ROOM = KEYS + LANES;
    alignas(64) float scores[TILE * ROOM];
    const Query *queries[TILE];
    const float *weights[TILE];
    float before[TILE];
    // The last one fills up; what it says is written several times.
    for (int m = 0; m < TILE; m++) queries[m] = all_queries + std::min(m, count - 1);
    int64_t first = 0, last = KEYS;  // the keys that all see
    for (int m = 0; m < count; m++) {
        first = std::max(first, queries[m]->from);
        last = std::min(last, queries[m]->end);
    }
    for (int64_t i = 0; i < KEYS; i += 2 * LANES) {
        const Pairs sums = lane_sums<0, LANES>(queries, turned + i, width);
        for (int m = 0; m < TILE; m++)
            for (int n = 0; n < 2; n++) store(scores + m * ROOM + i + n * LANES, sums.of[m][n]);
    }
    for (int m = 0; m < TILE; m++) weights[m] = scores + std::min(m, count - 1) * ROOM;
    for (int m = 0; m < count; m++) {
        const Query &query = *queries[m];
        before[m] = weigh(scores + m * ROOM + query.from, query.end - query.from, scale,
                          *query.softmax);
        const int64_t until = first < last ? first : query.end;
        if (query.from == until) continue;
        mix_row(values + query.from * width, weights[m] + query.from, until - query.from, width,
                before[m], query.out);
        before[m] = 1;
    }
    if (first >= last) return;
    for (int m = count; m < TILE; m++) before[m] = before[count - 1];
    for (int64_t column = 0; column < width; column += 2 * LANES)
        mix_tile(queries, values, weights, first, last, column, width, before);
    for (int m = 0; m < count; m++)
        if (queries[m]->end > last)
            mix_row(values + last * width, weights[m] + last, queries[m]->end - last, width, 1,
                    queries[m]->out);
}

}  // namespace
