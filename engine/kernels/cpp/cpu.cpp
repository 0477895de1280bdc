// A decoder layer on a CPU, compiled where it runs by engine/kernels/cpu.py.
//
// Weights are read as they are stored, in bfloat16, fp16, 8 or 4 bits; all else is float32. What is
// computed for a token is the same to the last bit whatever else is in the step: each of its sums
// has one order, which no number of tokens or threads changes.
//
// Vectors are GCC's, as wide as the CPU's registers. The files are one translation unit, whose
// functions the compiler sees together.

#include "layer.h"
#include "recurrent.h"

extern "C" {

int panel_width() { return PANEL; }
int most_sharing() { return SHARING; }

// x [tokens, in] by a linear layer to out [tokens, out].
void linear(const Linear *linear, int64_t tokens, const float *x, float *out, int threads) {
#pragma omp parallel num_threads(threads)
    multiply(x, tokens, *linear, {out, nullptr, linear->out});
}

// RMSNorm of x [tokens, width].
void rms_norm(const float *weight, float eps, int64_t tokens, int64_t width, const float *x,
              float *out) {
    for (int64_t t = 0; t < tokens; t++)
        normalize(x + t * width, weight, eps, width, out + t * width);
}

// What adapters add to a product [tokens, stride] of x [tokens, in]; `said` is [tokens, ranks].
void adapt(const Updates *updates, const int64_t *adapters, int64_t tokens, const float *x,
           float *out, int64_t stride, float *said, int threads) {
    const Adapting adapting(updates, adapters, tokens, said);
#pragma omp parallel num_threads(threads)
    {
        adapting.down(0, x);
        adapting.up(0, out, stride);
    }
}

// The floats that a step's scratch has for each token.
int64_t scratch_floats(const Layer *layer) {
    const int64_t heads = 2 * layer->queries + 2 * layer->kv_heads;
    int64_t ranks = 0;
    for (int n = 0; layer->updates && n < 4; n++)
        ranks = std::max(ranks, layer->updates[n].ranks);
    return layer->width + heads * layer->head_width + 3 * layer->inner + ranks;
}

// x [tokens, width] through a layer to out; its keys and values are written to `rows` rows a head.
void decoder_layer(const Layer *of, const Step *with, float *keys, float *values, int64_t rows,
                   const float *x, float *out) {
    const std::vector<int64_t> runs = runs_of(*with);
#pragma omp parallel num_threads(with->threads)
    compute_layer(*of, *with, {keys, values, rows}, runs, x, out);
}

// A step of a whole model: hidden [tokens, width], which are its embeddings and changed, through
// all layers to the logits [count, vocabulary] of the `wanted` tokens. `normed` is [count, width].
void decoder_step(const Model *of, const Step *with, const Cache *caches, float *hidden,
                  const int64_t *wanted, int64_t count, float *normed, float *logits) {
    const Model &model = *of;
    const std::vector<int64_t> runs = runs_of(*with);
#pragma omp parallel num_threads(with->threads)
    {
        for (int64_t n = 0; n < model.num_layers; n++)
            compute_layer(*model.layers[n], *with, caches[n], runs, hidden, hidden);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < count; row++)
            normalize(hidden + wanted[row] * model.width, model.norm, model.eps, model.width,
                      normed + row * model.width);
        multiply(normed, count, model.head, {logits, nullptr, model.head.out});
    }
}

// What a layer of the gated delta rule does between its products, for tokens in packed order.
//
// qkv [tokens, channels], z [tokens, values], a and b [tokens, heads] to out [tokens, values]. The
// pool's states are conv [slots, channels, TAPS] and recurrent [slots, heads, key_width,
// value_width]; slots that are read are never written.
void gated_delta(const DeltaLayer *of, const DeltaStep *with, const float *qkv, const float *z,
                 const float *a, const float *b, float *conv, float *recurrent, float *out) {
    const DeltaLayer &layer = *of;
    const DeltaStep &step = *with;
    const int64_t heads = layer.heads, channels = layer.channels(), row = channels + 2 * heads;
    const int64_t keys = layer.key_width, values = layer.value_width;
    const int64_t blocks = (values + COLUMNS - 1) / COLUMNS;
    const auto inputs_of = [&](int64_t chain) {
        const int64_t slot = step.sources[chain];
        return slot < 0 ? nullptr : conv + slot * channels * TAPS;
    };
#pragma omp parallel num_threads(step.threads)
    {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < step.tokens; t++) {
            const int64_t chain = step.chain_of[t], first = step.firsts[chain];
            float *mixed = step.scratch + t * row, *gates = mixed + channels;
            convolve(layer, qkv, first, t - first, inputs_of(chain), mixed);
            for (int64_t h = 0; h < layer.key_heads; h++) {
                to_length(mixed + h * keys, keys, 1 / std::sqrt((float)keys));
                to_length(mixed + layer.keys() + h * keys, keys, 1);
            }
            for (int64_t h = 0; h < heads; h++) {
                const float x = a[t * heads + h] + layer.dt_bias[h];
                const float soft = x > 20 ? x : std::log1p(std::exp(x));
                gates[2 * h] = std::exp(-layer.rates[h] * soft);
                gates[2 * h + 1] = 1 / (1 + std::exp(-b[t * heads + h]));
            }
        }
#pragma omp for schedule(static)
        for (int64_t chain = 0; chain < step.chains; chain++)
            for (int64_t s = step.segments[chain]; s < step.segments[chain + 1]; s++)
                keep_inputs(layer, qkv, step.firsts[chain], step.ends[s], inputs_of(chain),
                            conv + step.targets[s] * channels * TAPS);
#pragma omp for schedule(dynamic) collapse(3)
        for (int64_t chain = 0; chain < step.chains; chain++)
            for (int64_t h = 0; h < heads; h++)
                for (int64_t block = 0; block < blocks; block++) {
                    const int64_t column = block * COLUMNS;
                    if (column + COLUMNS <= values)
                        follow_chain<true>(layer, step, chain, h, column, recurrent, out);
                    else
                        follow_chain<false>(layer, step, chain, h, column, recurrent, out);
                }
#pragma omp for schedule(static)
        for (int64_t t = 0; t < step.tokens; t++)
            for (int64_t h = 0; h < heads; h++)
                gated_norm(layer, z + (t * heads + h) * values, out + (t * heads + h) * values);
    }
}
}
