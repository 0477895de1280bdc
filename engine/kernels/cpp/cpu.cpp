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

// What a layer of the gated delta rule does between its products, for tokens in packed order:
// inputs [tokens, channels + values] and gates [tokens, 2 heads] to out [tokens, values].
void gated_delta(const DeltaLayer *layer, const DeltaStep *step, const float *inputs,
                 const float *gates, float *conv, float *recurrent, float *out) {
#pragma omp parallel num_threads(step->threads)
    mix(*layer, *step, {inputs, gates}, {conv, recurrent}, out);
}

// The floats that a step's scratch has for each token.
int64_t delta_floats(const DeltaLayer *layer, const DeltaBlock *block) {
    const int64_t products = layer->inputs() + 2 * layer->heads + layer->values();
    return layer->mixed() + block->width + products + 3 * block->inner;
}

// x [tokens, width] through a decoder layer of the rule to out.
void delta_layer(const DeltaLayer *of, const DeltaBlock *with, const DeltaStep *in, float *conv,
                 float *recurrent, const float *x, float *out) {
    const DeltaLayer &layer = *of;
    const DeltaBlock &block = *with;
    const DeltaStep &step = *in;
    const int64_t tokens = step.tokens, width = block.width, inner = block.inner;
    float *normed = step.scratch + tokens * layer.mixed();
    float *inputs = normed + tokens * width;
    float *gates = inputs + tokens * layer.inputs();
    float *said = gates + tokens * 2 * layer.heads;
    float *gate_up = said + tokens * layer.values();
    float *gated = gate_up + tokens * 2 * inner;
#pragma omp parallel num_threads(step.threads)
    {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++)
            normalize(x + t * width, block.input_norm, block.input_eps, width, normed + t * width);
        multiply(normed, tokens, block.inputs, {inputs, nullptr, layer.inputs()});
        multiply(normed, tokens, block.gates, {gates, nullptr, 2 * layer.heads});
#pragma omp barrier
        mix(layer, step, {inputs, gates}, {conv, recurrent}, said);
        multiply(said, tokens, block.o, {out, x, width});
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++)
            normalize(out + t * width, block.post_norm, block.post_eps, width, normed + t * width);
        multiply(normed, tokens, block.gate_up, {gate_up, nullptr, 2 * inner});
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++)
            gate(gate_up + t * 2 * inner, inner, gated + t * inner);
        multiply(gated, tokens, block.down, {out, out, width});
    }
}
}
