// A decoder layer: what it is made of, and attention for a step of it.
#pragma once

#include "attention.h"
#include "lora.h"
#include "norms.h"
#include "products.h"

// A decoder layer; heads are as wide as a multiple of LANES, and so is the MLP.
struct Layer {
    const float *input_norm, *post_norm;
    const float *head_norm;  // [query and kv heads, head width], or null
    Linear qkv, o, gate_up, down;
    int64_t width, inner, queries, kv_heads, head_width;
    int64_t window;  // the most keys that a query sees, or 0
    float input_eps, post_eps, head_eps, scale;
    const Updates *updates;  // adapters' of the four products, in their order, or null
};

// A layer's part of the cache, [kv heads, rows, head width] each.
struct Cache {
    float *keys, *values;
    int64_t rows;
};

// A model whose layers are all such, with one norm behind them and a linear head.
struct Model {
    const Layer *const *layers;
    int64_t num_layers, width;
    const float *norm;
    float eps;
    Linear head;
};

// The packed tokens of a step: those of one sequence stand in order.
struct Step {
    int64_t tokens;
    const int64_t *rows;       // where each is cached
    const int64_t *positions;  // its sequence's first token lies so many rows before it
    const float *cos, *sin;    // [tokens, head width]
    float *scratch;            // see scratch_floats
    int64_t threads;
    const int64_t *adapters;   // each token's, 0 for none; or null
};

namespace {

// Where runs begin: at most RUN tokens that follow each other in one sequence.
std::vector<int64_t> runs_of(const Step &step) {
    std::vector<int64_t> begins;
    for (int64_t t = 0; t < step.tokens; t++) {
        const bool follows = t && step.rows[t] == step.rows[t - 1] + 1 &&
                             step.positions[t] == step.positions[t - 1] + 1;
        if (!follows || t == begins.back() + RUN) begins.push_back(t);
    }
    return begins;
}

// Attention of some heads' queries, [tokens, heads, width] of `qkv`, for a run of tokens.
void attend_run(const Layer &layer, const Step &step, const Cache &cache, int64_t first,
                int64_t end, int64_t head, int64_t last_head, const float *qkv, float *said) {
    const int64_t width = layer.head_width, heads = layer.queries + 2 * layer.kv_heads;
    const int64_t kv_head = head / (layer.queries / layer.kv_heads);
    const int64_t begin = kv_head * cache.rows + step.rows[first] - step.positions[first];
    const float *keys = cache.keys + begin * width, *values = cache.values + begin * width;
    const int64_t group = last_head - head;
    const bool are_many = (end - first) * group >= TILE && width % (2 * LANES) == 0;
    Softmax states[RUN * SHARING];
    std::vector<float> turned(are_many ? width * KEYS : 0);
    std::vector<Query> queries;
    for (int64_t t = first; t < end; t++)
        std::fill_n(said + (t * layer.queries + head) * width, group * width, 0.0f);
    const int64_t last = step.positions[end - 1] + 1;
    const int64_t before =
        layer.window ? std::max<int64_t>(0, step.positions[first] + 1 - layer.window) : 0;
    for (int64_t key = before - before % KEYS; key < last; key += KEYS) {
        const float *block_keys = keys + key * width, *block_values = values + key * width;
        queries.clear();
        for (int64_t t = first; t < end; t++) {
            const int64_t seen = step.positions[t] + 1;
            const int64_t from = std::max(key, layer.window ? seen - layer.window : 0) - key;
            const int64_t until = std::min(KEYS, seen - key);
            if (from >= until) continue;
            for (int64_t h = 0; h < group; h++) {
                const float *query = qkv + (t * heads + head + h) * width;
                float *out = said + (t * layer.queries + head + h) * width;
                Softmax &state = states[(t - first) * group + h];
                if (are_many)
                    queries.push_back({query, out, &state, from, until});
                else
                    attend(query, block_keys + from * width, block_values + from * width,
                           until - from, width, layer.scale, t == first && h == 0, state, out);
            }
        }
        if (!are_many) continue;
        turn(block_keys, block_values, std::min(KEYS, last - key), width, turned.data());
        const int64_t number = queries.size();
        for (int64_t n = 0; n < number; n += TILE)
            attend_tile(&queries[n], std::min<int64_t>(TILE, number - n), turned.data(),
                        block_values, width, layer.scale);
    }
    for (int64_t t = first; t < end; t++)
        for (int64_t h = 0; h < group; h++) {
            float *out = said + (t * layer.queries + head + h) * width;
            const float sum = states[(t - first) * group + h].sum;
            for (int64_t n = 0; n < width; n++) out[n] /= sum;
        }
}

// A head of a token after its product: norm, rotary embedding, and into the cache.
void place_head(const Layer &layer, const Step &step, const Cache &cache, int64_t token, int64_t h,
                float *head) {
    const int64_t width = layer.head_width, turning = layer.queries + layer.kv_heads;
    if (h < turning) {
        if (layer.head_norm)
            normalize(head, layer.head_norm + h * width, layer.head_eps, width, head);
        rotate(head, step.cos + token * width, step.sin + token * width, width);
    }
    if (h < layer.queries) return;
    const int64_t row = (h - layer.queries) % layer.kv_heads * cache.rows + step.rows[token];
    keep(head, width, (h < turning ? cache.keys : cache.values) + row * width);
}

// This thread's share of x [tokens, width] through a layer to out, which may be x; all threads of a
// team go through it, and have done so when the first comes back.
void compute_layer(const Layer &layer, const Step &step, const Cache &cache,
                   const std::vector<int64_t> &runs, const float *x, float *out) {
    const int64_t tokens = step.tokens, width = layer.width, inner = layer.inner;
    const int64_t heads = layer.queries + 2 * layer.kv_heads, head_width = layer.head_width;
    const int64_t sharing = layer.queries / layer.kv_heads, num_runs = runs.size();
    float *normed = step.scratch;
    float *qkv = normed + tokens * width;
    float *said = qkv + tokens * heads * head_width;
    float *gate_up = said + tokens * layer.queries * head_width;
    float *gated = gate_up + tokens * 2 * inner;
    const Adapting adapting(layer.updates, step.adapters, tokens, gated + tokens * inner);
    // Heads that share keys read them together, unless a thread would have none.
    const int64_t group = num_runs * layer.kv_heads < step.threads ? 1 : sharing;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; t++)
        normalize(x + t * width, layer.input_norm, layer.input_eps, width, normed + t * width);
    adapting.down(0, normed);
    multiply(normed, tokens, layer.qkv, {qkv, nullptr, heads * head_width});
    adapting.up(0, qkv, heads * head_width);
#pragma omp barrier
#pragma omp for schedule(static) collapse(2)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < heads; h++)
            place_head(layer, step, cache, t, h, qkv + (t * heads + h) * head_width);
#pragma omp for schedule(dynamic) collapse(2)
    for (int64_t run = 0; run < num_runs; run++)
        for (int64_t h = 0; h < layer.queries; h += group)
            attend_run(layer, step, cache, runs[run], run + 1 < num_runs ? runs[run + 1] : tokens,
                       h, h + group, qkv, said);
    adapting.down(1, said);
    multiply(said, tokens, layer.o, {out, x, width});
    adapting.up(1, out, width);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; t++)
        normalize(out + t * width, layer.post_norm, layer.post_eps, width, normed + t * width);
    adapting.down(2, normed);
    multiply(normed, tokens, layer.gate_up, {gate_up, nullptr, 2 * inner});
    adapting.up(2, gate_up, 2 * inner);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; t++)
        gate(gate_up + t * 2 * inner, inner, gated + t * inner);
    adapting.down(3, gated);
    multiply(gated, tokens, layer.down, {out, out, width});
    adapting.up(3, out, width);
#pragma omp barrier
}

}  // namespace
