// Linear layers: tiles of sums that stay in the registers while weights pass by.
#pragma once

#include "weights.h"

// A linear layer: its matrix [out, in] as [panels, in, PANEL], the last panel filled up; factors
// [panels, in / block, PANEL] for each `block` numbers of a row, and what is added to a row's
// product, [panels, PANEL]; either may be null.
struct Linear {
    const char *weight;
    const char *scale;
    const float *bias;
    const char *offset;    // as the factors, what is added to each number of a block; or null
    const int32_t *order;  // which number of x belongs to each column; null: the same
    int64_t in, out, panels, block;
    int64_t kind;  // 0 bfloat16, 1 fp16, 2 int8, 3 NF4, 4 whole numbers of 4 bits, 5 int8 in blocks
    int64_t half;  // whether factors and offsets are fp16 and not float32
};

namespace {

// So many tokens stay in the cache while all panels pass by.
constexpr int64_t BLOCK = 96;

// Where a product goes: out[token * stride + column], added to what `base` has there, if not null.
struct Target {
    float *out;
    const float *base;
    int64_t stride;
    Target from(int64_t token) const {
        return {out + token * stride, base ? base + token * stride : nullptr, stride};
    }
};

inline void put(const Linear &linear, int64_t column, Floats sum, float *to, const float *base) {
    if (linear.bias) sum += load(linear.bias + column);
    if (column + LANES <= linear.out) {
        store(to + column, base ? load(base + column) + sum : sum);
    } else {
        for (int64_t n = 0; column + n < linear.out; n++)
            to[column + n] = base ? base[column + n] + sum[n] : sum[n];
    }
}

template <int TOKENS, int PANELS>
using Sums = Floats[TOKENS][PANELS][2];

// To the sums of TOKENS rows of x by PANELS panels, the products of numbers `first` to `last` of
// each. Memory is asked for what comes `ahead`, whose bytes are as many as 1 / `parts` of these.
template <class Kind, int TOKENS, int PANELS>
inline void accumulate(const float *x, const Linear &linear, const char *weight, int64_t first,
                       int64_t last, const char *ahead, int parts, Sums<TOKENS, PANELS> &sums) {
    const int64_t bytes = linear.in * Kind::BYTES;
    for (int64_t k = first; k < last; k++) {
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; p++) {
            __builtin_prefetch(ahead + p * bytes + k * Kind::BYTES / parts, 0, PANELS > 1 ? 2 : 3);
            Floats low, high;
            Kind::read(weight + p * bytes + k * Kind::BYTES, low, high);
#pragma GCC unroll 12
            for (int m = 0; m < TOKENS; m++) {
                const Floats number = all(x[m * linear.in + k]);
                sums[m][p][0] = fused(low, number, sums[m][p][0]);
                sums[m][p][1] = fused(high, number, sums[m][p][1]);
            }
        }
    }
}

inline Floats factors_at(const char *factors, int64_t at, bool half) {
    return half ? Half::floats(factors + 2 * at) : load((const float *)factors + at);
}

// The factors of a panel's rows for a block of their numbers, from `at` on.
template <int TOKENS, int PANELS>
inline void scale_by(const Linear &linear, int64_t at, int64_t distance,
                     Sums<TOKENS, PANELS> &sums) {
    for (int p = 0; p < PANELS; p++)
        for (int half = 0; half < 2; half++) {
            const Floats factors =
                factors_at(linear.scale, at + p * distance + half * LANES, linear.half);
            for (int m = 0; m < TOKENS; m++) sums[m][p][half] *= factors;
        }
}

// What the offsets of a block add: each times the sum of x's numbers there.
template <int TOKENS, int PANELS>
inline void shift_by(const Linear &linear, int64_t at, int64_t distance, const float *block_sums,
                     int64_t blocks, Sums<TOKENS, PANELS> &totals) {
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; p++)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            const Floats offsets =
                factors_at(linear.offset, at + p * distance + half * LANES, linear.half);
#pragma GCC unroll 12
            for (int m = 0; m < TOKENS; m++)
                totals[m][p][half] =
                    fused(offsets, all(block_sums[m * blocks]), totals[m][p][half]);
        }
}

// The sum of a block of x, by one order.
inline float sum_of_block(const float *x, int64_t count) {
    Floats sums{};
    int64_t n = 0;
    for (; n + LANES <= count; n += LANES) sums += load(x + n);
    float sum = sum_of(sums);
    for (; n < count; n++) sum += x[n];
    return sum;
}

// The sums of x's blocks, [tokens, in / block], for what offsets add; this thread's own.
inline const float *sums_of_blocks(const float *x, int64_t tokens, const Linear &linear) {
    static thread_local std::vector<float> sums;
    if (!linear.offset) return nullptr;
    sums.resize(tokens * (linear.in / linear.block));
    for (size_t n = 0; n < sums.size(); n++)
        sums[n] = sum_of_block(x + n * linear.block, linear.block);
    return sums.data();
}

// x's numbers in the order of the columns; this thread's own.
inline const float *ordered(const float *x, int64_t tokens, const Linear &linear) {
    static thread_local std::vector<float> numbers;
    if (!linear.order) return x;
    numbers.resize(tokens * linear.in);
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t k = 0; k < linear.in; k++)
            numbers[t * linear.in + k] = x[t * linear.in + linear.order[k]];
    return numbers.data();
}

// TOKENS rows of x by PANELS panels. Of the panel that comes next, part `part` of `parts` is asked
// for meanwhile, since as many tiles have the same panel.
template <class Kind, int TOKENS, int PANELS>
inline void tile(const float *x, const Linear &linear, int64_t panel, Target to, int part,
                 int parts, const float *block_sums) {
    const int64_t bytes = linear.in * Kind::BYTES, blocks = linear.in / linear.block;
    const char *weight = linear.weight + panel * bytes;
    const char *ahead = weight + PANELS * bytes + bytes / parts * part;
    const int64_t factors = panel * blocks * PANEL;
    Sums<TOKENS, PANELS> totals = {};
    if constexpr (Kind::HAS_BLOCKS) {
        for (int64_t block = 0; block < blocks; block++) {
            Sums<TOKENS, PANELS> sums = {};
            accumulate<Kind, TOKENS, PANELS>(x, linear, weight, block * linear.block,
                                             (block + 1) * linear.block, ahead, parts, sums);
            const int64_t at = factors + block * PANEL, distance = blocks * PANEL;
            scale_by<TOKENS, PANELS>(linear, at, distance, sums);
            for (int m = 0; m < TOKENS; m++)
                for (int p = 0; p < PANELS; p++)
                    for (int half = 0; half < 2; half++) totals[m][p][half] += sums[m][p][half];
            if (linear.offset)
                shift_by<TOKENS, PANELS>(linear, at, distance, block_sums + block, blocks, totals);
        }
    } else {
        accumulate<Kind, TOKENS, PANELS>(x, linear, weight, 0, linear.in, ahead, parts, totals);
        if (linear.scale) scale_by<TOKENS, PANELS>(linear, factors, PANEL, totals);
    }
    for (int m = 0; m < TOKENS; m++) {
        const Target row = to.from(m);
        for (int p = 0; p < PANELS; p++)
            for (int half = 0; half < 2; half++)
                put(linear, (panel + p) * PANEL + half * LANES, totals[m][p][half], row.out,
                    row.base);
    }
}

// A few tokens by some panels, PANELS at once: a single token's sums are too few to wait for.
template <class Kind, int TOKENS, int PANELS>
void narrow(const float *x, const Linear &linear, int64_t panel, int64_t last, Target to) {
    x = ordered(x, TOKENS, linear);
    const float *sums = sums_of_blocks(x, TOKENS, linear);
    for (; panel + PANELS <= last; panel += PANELS)
        tile<Kind, TOKENS, PANELS>(x, linear, panel, to, 0, 1, sums);
    for (; panel < last; panel++) tile<Kind, TOKENS, 1>(x, linear, panel, to, 0, 1, sums);
}

template <class Kind, int TOKENS>
inline void tile_of(int64_t tokens, const float *x, const Linear &linear, int64_t panel, Target to,
                    int part, int parts, const float *sums) {
    if (tokens == TOKENS)
        tile<Kind, TOKENS, 1>(x, linear, panel, to, part, parts, sums);
    else if constexpr (TOKENS > 1)
        tile_of<Kind, TOKENS - 1>(tokens, x, linear, panel, to, part, parts, sums);
}

template <class Kind>
void panels(const float *x, int64_t tokens, const Linear &linear, int64_t first, int64_t last,
            Target to) {
    if (tokens == 1) return narrow<Kind, 1, 4>(x, linear, first, last, to);
    if (tokens == 2) return narrow<Kind, 2, 2>(x, linear, first, last, to);
    for (int64_t block = 0; block < tokens; block += BLOCK) {
        const int64_t end = std::min(tokens, block + BLOCK);
        const int parts = (end - block + TILE - 1) / TILE;
        const float *numbers = ordered(x + block * linear.in, end - block, linear);
        const float *sums = sums_of_blocks(numbers, end - block, linear);
        const int64_t blocks = linear.offset ? linear.in / linear.block : 0;
        for (int64_t panel = first; panel < last; panel++) {
            int64_t token = block;
            for (int part = 0; part < parts; part++) {  // all about as high
                const int64_t count = (end - token) / (parts - part);
                tile_of<Kind, TILE>(count, numbers + (token - block) * linear.in, linear, panel,
                                    to.from(token), part, parts, sums + (token - block) * blocks);
                token += count;
            }
        }
    }
}

// This thread's share of x [tokens, in] by a linear layer.
void multiply(const float *x, int64_t tokens, const Linear &linear, Target to) {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const int64_t first = linear.panels * thread / threads;
    const int64_t last = linear.panels * (thread + 1) / threads;
    if (linear.kind == 0) panels<Bfloat16>(x, tokens, linear, first, last, to);
    if (linear.kind == 1) panels<InOrder<Half>>(x, tokens, linear, first, last, to);
    if (linear.kind == 2) panels<InOrder<Int8>>(x, tokens, linear, first, last, to);
    if (linear.kind == 3) panels<FourBits>(x, tokens, linear, first, last, to);
    if (linear.kind == 4) panels<Whole4>(x, tokens, linear, first, last, to);
    if (linear.kind == 5) panels<Int8Blocks>(x, tokens, linear, first, last, to);
}

}  // namespace
