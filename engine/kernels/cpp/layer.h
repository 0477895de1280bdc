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
    Softmax states[RUN * SHARING];
    for (int64_t t = first; t < end; t++)
        std::fill_n(said + (t * layer.queries + head) * width, group * width, 0.0f);
    const int64_t before =
        layer.window ? std::max<int64_t>(0, step.positions[first] + 1 - layer.window) : 0;
    for (int64_t key = before - before % KEYS; key <= step.positions[end - 1]; key += KEYS)
        for (int64_t t = first; t < end; t++) {
            const int64_t seen = step.positions[t] + 1;
            const int64_t from = std::max(key, layer.window ? seen - layer.window : 0);
            const int64_t count = std::min(key + KEYS, seen) - from;
            if (count <= 0) continue;
            for (int64_t h = 0; h < group; h++)
                attend(qkv + (t * heads + head + h) * width, keys + from * width,
                       values + from * width, count, width, layer.scale,
                       t == first && h == 0, states[(t - first) * group + h],
                       said + (t * layer.queries + head + h) * width);
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

}  // namespace
