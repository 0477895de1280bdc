// What adapters (LoRA, arXiv 2106.09685) add to the products of their tokens.
#pragma once

#include "vectors.h"

// What an adapter adds to `out` columns of a product, from `first` on: x by `down` [rank, in], and
// that by `up` [rank, out]. It has the adapter's scale in it.
struct Update {
    const float *down, *up;
    int64_t rank, first, out;
};

// All updates of a product. Those of adapter n, which is not 0, are parts[begins[n]] up to
// parts[begins[n + 1]]; of one adapter they have `ranks` rows of `down` at most.
struct Updates {
    const Update *parts;
    const int64_t *begins;
    int64_t in, ranks;
};

namespace {

// Tokens of one adapter that read its numbers together, and the columns that they read at once.
constexpr int TOGETHER = 4;
constexpr int64_t UP_COLUMNS = 4 * LANES;
// Rows of `down` whose sums are added up together.
constexpr int64_t DOWN_ROWS = 4;

struct Together {
    int64_t adapter;
    int count;
    int64_t tokens[TOGETHER];
};

// A step's tokens that have an adapter. What is computed of one does not depend on its company.
std::vector<Together> together_of(const int64_t *adapters, int64_t tokens) {
    std::vector<Together> groups;
    std::vector<int64_t> last;  // group of each adapter, or -1
    for (int64_t t = 0; adapters && t < tokens; t++) {
        const int64_t adapter = adapters[t];
        if (!adapter) continue;
        if (adapter >= (int64_t)last.size()) last.resize(adapter + 1, -1);
        int64_t &group = last[adapter];
        if (group < 0 || groups[group].count == TOGETHER) {
            group = groups.size();
            groups.push_back({adapter, 0, {}});
        }
        groups[group].tokens[groups[group].count++] = t;
    }
    return groups;
}

// DOWN_ROWS rows of `down`, from `row` on, by TOKENS rows of x.
template <int TOKENS>
void down_rows(const Update &update, int64_t in, int64_t row, const float *const *x,
               float *const *said) {
    const float *rows[DOWN_ROWS];
    for (int64_t r = 0; r < DOWN_ROWS; r++)
        rows[r] = update.down + std::min(row + r, update.rank - 1) * in;
    Floats sums[TOKENS][DOWN_ROWS] = {};
    int64_t k = 0;
    for (; k + LANES <= in; k += LANES)
#pragma GCC unroll 4
        for (int r = 0; r < DOWN_ROWS; r++) {
            const Floats weights = load(rows[r] + k);
#pragma GCC unroll 4
            for (int m = 0; m < TOKENS; m++)
                sums[m][r] = fused(weights, load(x[m] + k), sums[m][r]);
        }
    for (int m = 0; m < TOKENS; m++) {
        Four four = sums_of(sums[m][0], sums[m][1], sums[m][2], sums[m][3]);
        for (int64_t r = 0; r < DOWN_ROWS && row + r < update.rank; r++) {
            float sum = four[r];
            for (int64_t n = k; n < in; n++) sum += rows[r][n] * x[m][n];
            said[m][row + r] = sum;
        }
    }
}

// Some vectors of columns, from `column` of the update's on, by what `down` said of TOKENS tokens.
template <int TOKENS, int VECTORS>
void up_columns(const Update &update, int64_t column, const float *const *said,
                float *const *out) {
    Floats sums[TOKENS][VECTORS] = {};
    for (int64_t j = 0; j < update.rank; j++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            const Floats weights = load(update.up + j * update.out + column + v * LANES);
#pragma GCC unroll 4
            for (int m = 0; m < TOKENS; m++)
                sums[m][v] = fused(weights, all(said[m][j]), sums[m][v]);
        }
    for (int m = 0; m < TOKENS; m++)
        for (int v = 0; v < VECTORS; v++) {
            float *to = out[m] + column + v * LANES;
            store(to, load(to) + sums[m][v]);
        }
}

// The same up to `last`, fewer at a time where they fill no vectors.
template <int TOKENS>
void up_to(const Update &update, int64_t column, int64_t last, const float *const *said,
           float *const *out) {
    for (; column + UP_COLUMNS <= last; column += UP_COLUMNS)
        up_columns<TOKENS, 4>(update, column, said, out);
    for (; column + LANES <= last; column += LANES)
        up_columns<TOKENS, 1>(update, column, said, out);
    for (; column < last; column++)
        for (int m = 0; m < TOKENS; m++) {
            float sum = 0;
            for (int64_t j = 0; j < update.rank; j++)
                sum += update.up[j * update.out + column] * said[m][j];
            out[m][column] += sum;
        }
}

// What the adapters of a step's tokens add to the products of a layer, which all threads compute.
struct Adapting {
    const Updates *products;  // or null
    std::vector<Together> groups;
    float *said;  // [tokens, the most ranks of a product]

    Adapting(const Updates *products, const int64_t *adapters, int64_t tokens, float *said)
        : products(products), said(said) {
        if (products) groups = together_of(adapters, tokens);
    }

    // What `down` says of x [tokens, in] for a product. Nobody waits for the others.
    void down(int product, const float *x) const {
        if (groups.empty()) return;
        const Updates &updates = products[product];
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        int64_t number = 0;
        for (const Together &group : groups) {
            int64_t place = 0;
            for (int64_t p = updates.begins[group.adapter]; p < updates.begins[group.adapter + 1];
                 place += updates.parts[p++].rank)
                for (int64_t row = 0; row < updates.parts[p].rank; row += DOWN_ROWS)
                    if (number++ % threads == thread)
                        down_block(updates, updates.parts[p], group, place, row, x);
        }
    }

    // Added to the product in out [tokens, stride], once all threads have computed their part.
    // Nobody waits for the others afterwards.
    void up(int product, float *out, int64_t stride) const {
        if (groups.empty()) return;
        const Updates &updates = products[product];
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
#pragma omp barrier
        for (const Together &group : groups) {
            int64_t place = 0;
            for (int64_t p = updates.begins[group.adapter]; p < updates.begins[group.adapter + 1];
                 place += updates.parts[p++].rank) {
                const Update &update = updates.parts[p];
                const int64_t blocks = (update.out + UP_COLUMNS - 1) / UP_COLUMNS;
                const int64_t first = blocks * thread / threads * UP_COLUMNS;
                const int64_t last = blocks * (thread + 1) / threads * UP_COLUMNS;
                up_range(updates, update, group, place, first, std::min(last, update.out), out,
                         stride);
            }
        }
    }

   private:
    void down_block(const Updates &updates, const Update &update, const Together &group,
                    int64_t place, int64_t row, const float *x) const {
        const float *from[TOGETHER];
        float *to[TOGETHER];
        for (int m = 0; m < group.count; m++) {
            from[m] = x + group.tokens[m] * updates.in;
            to[m] = said + group.tokens[m] * updates.ranks + place;
        }
        if (group.count == 1) down_rows<1>(update, updates.in, row, from, to);
        if (group.count == 2) down_rows<2>(update, updates.in, row, from, to);
        if (group.count == 3) down_rows<3>(update, updates.in, row, from, to);
        if (group.count == 4) down_rows<4>(update, updates.in, row, from, to);
    }

    void up_range(const Updates &updates, const Update &update, const Together &group,
                  int64_t place, int64_t first, int64_t last, float *out, int64_t stride) const {
        const float *from[TOGETHER];
        float *to[TOGETHER];
        for (int m = 0; m < group.count; m++) {
            from[m] = said + group.tokens[m] * updates.ranks + place;
            to[m] = out + group.tokens[m] * stride + update.first;
        }
        if (group.count == 1) up_to<1>(update, first, last, from, to);
        if (group.count == 2) up_to<2>(update, first, last, from, to);
        if (group.count == 3) up_to<3>(update, first, last, from, to);
        if (group.count == 4) up_to<4>(update, first, last, from, to);
    }
};

}  // namespace
