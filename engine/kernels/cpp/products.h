// Linear layers: tiles of sums that stay in the registers while weights pass by.
#pragma once

#include "weights.h"

// A linear layer: its matrix [out, in] as [panels, in, PANEL], the last panel filled up; factors
// [panels, in / block, PANEL] for each `block` numbers of a row, and what is added to a row's
// product, [panels, PANEL]; either may be null.
struct Linear {
    const char *weight;
    const float *scale;
    const float *bias;
    int64_t in, out, panels, block;
    int64_t kind;  // 0 bfloat16, 1 fp16, 2 int8, 3 NF4
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

// The factors of a panel's rows for a block of their numbers.
template <int TOKENS, int PANELS>
inline void scale_by(const float *factors, int64_t distance, Sums<TOKENS, PANELS> &sums) {
    for (int p = 0; p < PANELS; p++)
        for (int half = 0; half < 2; half++)
            for (int m = 0; m < TOKENS; m++)
                sums[m][p][half] *= load(factors + p * distance + half * LANES);
}

// TOKENS rows of x by PANELS panels. Of the panel that comes next, part `part` of `parts` is asked
// for meanwhile, since as many tiles have the same panel.
template <class Kind, int TOKENS, int PANELS>
inline void tile(const float *x, const Linear &linear, int64_t panel, Target to, int part,
                 int parts) {
    const int64_t bytes = linear.in * Kind::BYTES, blocks = linear.in / linear.block;
    const char *weight = linear.weight + panel * bytes;
    const char *ahead = weight + PANELS * bytes + bytes / parts * part;
    const float *factors = linear.scale + panel * blocks * PANEL;
    Sums<TOKENS, PANELS> totals = {};
    if constexpr (Kind::HAS_BLOCKS) {
        for (int64_t block = 0; block < blocks; block++) {
            Sums<TOKENS, PANELS> sums = {};
            accumulate<Kind, TOKENS, PANELS>(x, linear, weight, block * linear.block,
                                             (block + 1) * linear.block, ahead, parts, sums);
            scale_by<TOKENS, PANELS>(factors + block * PANEL, blocks * PANEL, sums);
            for (int m = 0; m < TOKENS; m++)
                for (int p = 0; p < PANELS; p++)
                    for (int half = 0; half < 2; half++) totals[m][p][half] += sums[m][p][half];
        }
    } else {
        accumulate<Kind, TOKENS, PANELS>(x, linear, weight, 0, linear.in, ahead, parts, totals);
        if (linear.scale) scale_by<TOKENS, PANELS>(factors, PANEL, totals);
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
    for (; panel + PANELS <= last; panel += PANELS)
        tile<Kind, TOKENS, PANELS>(x, linear, panel, to, 0, 1);
    for (; panel < last; panel++) tile<Kind, TOKENS, 1>(x, linear, panel, to, 0, 1);
}

template <class Kind, int TOKENS>
inline void tile_of(int64_t tokens, const float *x, const Linear &linear, int64_t panel, Target to,
                    int part, int parts) {
    if (tokens == TOKENS)
        tile<Kind, TOKENS, 1>(x, linear, panel, to, part, parts);
    else if constexpr (TOKENS > 1)
        tile_of<Kind, TOKENS - 1>(tokens, x, linear, panel, to, part, parts);
}

template <class Kind>
void panels(const float *x, int64_t tokens, const Linear &linear, int64_t first, int64_t last,
            Target to) {
    if (tokens == 1) return narrow<Kind, 1, 4>(x, linear, first, last, to);
    if (tokens == 2) return narrow<Kind, 2, 2>(x, linear, first, last, to);
    for (int64_t block = 0; block < tokens; block += BLOCK) {
        const int64_t end = std::min(tokens, block + BLOCK);
        const int parts = (end - block + TILE - 1) / TILE;
        for (int64_t panel = first; panel < last; panel++) {
            int64_t token = block;
            for (int part = 0; part < parts; part++) {  // all about as high
                const int64_t count = (end - token) / (parts - part);
                tile_of<Kind, TILE>(count, x + token * linear.in, linear, panel, to.from(token),
                                    part, parts);
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
}

}  // namespace
