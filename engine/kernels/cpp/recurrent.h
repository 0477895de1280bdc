// Layers of the gated delta rule (arXiv 2412.06464): what lies between their products.
//
// Sums run over a head's keys in order, and a token's over its own inputs alone, so that its result
// does not depend on how a text is cut, on what else is computed, or on the number of threads.
#pragma once

#include "norms.h"
#include "products.h"

namespace {

constexpr int TAPS = 4;      // of the convolution
constexpr int COLUMNS = 64;  // of a state that a thread computes at a time
constexpr int VECTORS = COLUMNS / LANES;

struct DeltaLayer {
    const float *taps;     // [TAPS][channels]
    const float *rates;    // exp(A_log), of each head
    const float *dt_bias;  // of each head
    const float *norm;     // [value_width]
    int64_t key_heads, heads, key_width, value_width;
    float eps;

    int64_t keys() const { return key_heads * key_width; }
    int64_t values() const { return heads * value_width; }
    int64_t channels() const { return 2 * keys() + values(); }
    int64_t inputs() const { return channels() + values(); }
    int64_t mixed() const { return channels() + 2 * heads; }
};

// A decoder layer of such a mixer and a gated MLP, each behind a norm.
struct DeltaBlock {
    const float *input_norm, *post_norm;
    Linear inputs, gates, o, gate_up, down;
    int64_t width, inner;
    float input_eps, post_eps;
};

// What the products of a step's tokens made, a row each.
struct DeltaInputs {
    const float *inputs;  // [tokens, channels + values] queries, keys and values; and z
    const float *gates;   // [tokens, 2 heads] b and a
};

// The pool's states: [slots, channels, TAPS] and [slots, heads, key_width, value_width].
struct DeltaStates {
    float *conv, *recurrent;
};

// A text's new tokens are a chain of segments, each of which ends where a state is to be written.
struct DeltaStep {
    int64_t tokens, chains;
    const int64_t *firsts;    // [chains] the first token of each
    const int64_t *sources;   // [chains] the slot of its state so far, or -1
    const int64_t *segments;  // [chains + 1] the first of its segments
    const int64_t *ends;      // [segments] behind their last tokens
    const int64_t *targets;   // [segments] the slots for the states there
    const int64_t *chain_of;  // [tokens]
    float *scratch;           // [tokens][channels + 2 heads], and what a DeltaBlock needs besides
    int64_t threads;
};

inline Floats silu(Floats x) {
    const Floats e = exp_of(x < 0 ? x : -x);
    return x * (x < 0 ? e : all(1)) / (1 + e);
}

// The input of a channel and its neighbours, so many tokens before a chain's token `at`.
inline Floats input_before(const DeltaLayer &layer, const float *inputs, int64_t first, int64_t at,
                           int64_t before, const float *state, int64_t channel) {
    if (at >= before) return load(inputs + (first + at - before) * layer.inputs() + channel);
    Floats x{};
    if (state)
        for (int n = 0; n < LANES; n++) x[n] = state[(channel + n) * TAPS + TAPS + at - before];
    return x;
}

// The causal convolution of a token, and SiLU of it.
void convolve(const DeltaLayer &layer, const float *inputs, int64_t first, int64_t at,
              const float *state, float *out) {
    const int64_t channels = layer.channels();
    for (int64_t c = 0; c < channels; c += LANES) {
        Floats sum{};
        for (int tap = 0; tap < TAPS; tap++)
            sum = fused(load(layer.taps + tap * channels + c),
                        input_before(layer, inputs, first, at, TAPS - 1 - tap, state, c), sum);
        store(out + c, silu(sum));
    }
}

// A vector to the length `scale`.
void to_length(float *x, int64_t width, float scale) {
    Floats squares{};
    int64_t n = 0;
    for (; n + LANES <= width; n += LANES) squares = fused(load(x + n), load(x + n), squares);
    float sum = sum_of(squares);
    for (; n < width; n++) sum += x[n] * x[n];
    const float factor = scale / std::sqrt(sum + 1e-6f);
    for (n = 0; n < width; n++) x[n] *= factor;
}

// The last inputs of a segment, for the convolution of what comes after.
void keep_inputs(const DeltaLayer &layer, const float *inputs, int64_t first, int64_t end,
                 const float *state, float *to) {
    const int64_t channels = layer.channels();
    for (int64_t c = 0; c < channels; c += LANES)
        for (int tap = 0; tap < TAPS; tap++) {
            const Floats x =
                input_before(layer, inputs, first, end - 1 - first, TAPS - 1 - tap, state, c);
            for (int n = 0; n < LANES; n++) to[(c + n) * TAPS + tap] = x[n];
        }
}

// Some columns of a head's state: COLUMNS of them if all are there, else fewer.
template <bool ALL>
struct Columns {
    int64_t keys, stride;  // rows of the state, and how far apart they lie
    int64_t width;         // columns

    Floats get(const float *from, int v) const {
        if (ALL || (v + 1) * LANES <= width) return load(from + v * LANES);
        Floats x{};
        for (int n = 0; v * LANES + n < width; n++) x[n] = from[v * LANES + n];
        return x;
    }
    void put(float *to, int v, Floats x) const {
        if (ALL || (v + 1) * LANES <= width) return store(to + v * LANES, x);
        for (int n = 0; v * LANES + n < width; n++) to[v * LANES + n] = x[n];
    }
};

// A segment's tokens for some columns of a head, the first of each; rows are `step` apart.
struct Segment {
    int64_t tokens, step;
    const float *q, *k, *v, *gates;  // the gates: decay and beta
};

// What the state says to the first key.
template <bool ALL>
void ask(const Columns<ALL> &of, const float *k, const float *state, Floats *said) {
    for (int n = 0; n < VECTORS; n++) said[n] = Floats{};
    for (int64_t i = 0; state && i < of.keys; i++)
        for (int n = 0; n < VECTORS; n++)
            said[n] = fused(all(k[i]), of.get(state + i * of.stride, n), said[n]);
}

// A token: the state is decayed, what it `said` to the key moved towards the value, and the query
// asks it. While it is written, what it says to the `next` key is summed, if there is one.
template <bool ALL, bool NEXT>
void follow(const Columns<ALL> &of, const float *q, const float *k, const float *next, float decay,
            const Floats *change, const float *from, float *to, Floats *out, Floats *said) {
    for (int n = 0; n < VECTORS; n++) out[n] = said[n] = Floats{};
    for (int64_t i = 0; i < of.keys; i++) {
        const Floats key = all(k[i]), query = all(q[i]), coming = NEXT ? all(next[i]) : Floats{};
        for (int n = 0; n < VECTORS; n++) {
            const Floats before = from ? of.get(from + i * of.stride, n) * decay : Floats{};
            const Floats x = fused(key, change[n], before);
            of.put(to + i * of.stride, n, x);
            out[n] = fused(query, x, out[n]);
            if (NEXT) said[n] = fused(coming, x, said[n]);
        }
    }
}

// The rule for a segment, from a state, or none, to another.
template <bool ALL>
void follow_rule(const Columns<ALL> &of, const Segment &s, const float *from, float *to, float *out,
                 int64_t out_step) {
    Floats said[VECTORS], change[VECTORS], sums[VECTORS];
    ask(of, s.k, from, said);
    for (int64_t t = 0; t < s.tokens; t++) {
        const float decay = s.gates[t * s.step], beta = s.gates[t * s.step + 1];
        const float *q = s.q + t * s.step, *k = s.k + t * s.step;
        for (int n = 0; n < VECTORS; n++)
            change[n] = (of.get(s.v + t * s.step, n) - decay * said[n]) * beta;
        if (t + 1 < s.tokens)
            follow<ALL, true>(of, q, k, k + s.step, decay, change, from, to, sums, said);
        else
            follow<ALL, false>(of, q, k, k, decay, change, from, to, sums, said);
        for (int n = 0; n < VECTORS; n++) of.put(out + t * out_step, n, sums[n]);
        from = to;
    }
}

// RMSNorm of a head's values, times SiLU of its gate, in place.
void gated_norm(const DeltaLayer &layer, const float *gate, float *x) {
    const int64_t width = layer.value_width;
    normalize(x, layer.norm, layer.eps, width, x);
    const Columns<false> of{1, width, width};
    for (int v = 0; v * LANES < width; v++)
        of.put(x, v, of.get(x, v) * silu(of.get(gate, v)));
}

// A chain of segments for some columns of a head.
template <bool ALL>
void follow_chain(const DeltaLayer &layer, const DeltaStep &step, int64_t chain, int64_t head,
                  int64_t column, float *recurrent, float *out) {
    const int64_t keys = layer.key_width, values = layer.value_width, heads = layer.heads;
    const int64_t channels = layer.channels(), row = layer.mixed(), matrix = keys * values;
    const int64_t key_at = head / (heads / layer.key_heads) * keys, value_at = head * values + column;
    const Columns<ALL> part{keys, values, std::min<int64_t>(COLUMNS, values - column)};
    const int64_t source = step.sources[chain];
    const float *from = source < 0 ? nullptr : recurrent + (source * heads + head) * matrix + column;
    int64_t begin = step.firsts[chain];
    for (int64_t s = step.segments[chain]; s < step.segments[chain + 1]; s++) {
        float *to = recurrent + (step.targets[s] * heads + head) * matrix + column;
        const float *mixed = step.scratch + begin * row;
        const Segment segment{step.ends[s] - begin,
                              row,
                              mixed + key_at,
                              mixed + layer.keys() + key_at,
                              mixed + 2 * layer.keys() + value_at,
                              mixed + channels + 2 * head};
        follow_rule(part, segment, from, to, out + begin * layer.values() + value_at,
                    layer.values());
        from = to;
        begin = step.ends[s];
    }
}

// A token's convolved inputs, its keys and queries of their lengths, and its gates: decay and beta.
void mix_token(const DeltaLayer &layer, const DeltaStep &step, const DeltaInputs &in,
               const float *conv, int64_t t) {
    const int64_t heads = layer.heads, keys = layer.key_width, chain = step.chain_of[t];
    const int64_t first = step.firsts[chain], slot = step.sources[chain];
    const float *b = in.gates + 2 * t * heads, *a = b + heads;
    const float *state = slot < 0 ? nullptr : conv + slot * layer.channels() * TAPS;
    float *mixed = step.scratch + t * layer.mixed(), *gates = mixed + layer.channels();
    convolve(layer, in.inputs, first, t - first, state, mixed);
    for (int64_t h = 0; h < layer.key_heads; h++) {
        to_length(mixed + h * keys, keys, 1 / std::sqrt((float)keys));
        to_length(mixed + layer.keys() + h * keys, keys, 1);
    }
    for (int64_t h = 0; h < heads; h++) {
        const float x = a[h] + layer.dt_bias[h];
        const float soft = x > 20 ? x : std::log1p(std::exp(x));
        gates[2 * h] = std::exp(-layer.rates[h] * soft);
        gates[2 * h + 1] = 1 / (1 + std::exp(-b[h]));
    }
}

// What a layer of the rule does between its products, by all threads of a parallel region, to out
// [tokens, values]. Slots that are read are never written.
void mix(const DeltaLayer &layer, const DeltaStep &step, const DeltaInputs &in,
         const DeltaStates &states, float *out) {
    const int64_t heads = layer.heads, channels = layer.channels(), values = layer.value_width;
    const int64_t blocks = (values + COLUMNS - 1) / COLUMNS;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < step.tokens; t++) mix_token(layer, step, in, states.conv, t);
#pragma omp for schedule(static)
    for (int64_t chain = 0; chain < step.chains; chain++) {
        const int64_t slot = step.sources[chain];
        const float *before = slot < 0 ? nullptr : states.conv + slot * channels * TAPS;
        for (int64_t s = step.segments[chain]; s < step.segments[chain + 1]; s++)
            keep_inputs(layer, in.inputs, step.firsts[chain], step.ends[s], before,
                        states.conv + step.targets[s] * channels * TAPS);
    }
#pragma omp for schedule(dynamic) collapse(3)
    for (int64_t chain = 0; chain < step.chains; chain++)
        for (int64_t h = 0; h < heads; h++)
            for (int64_t block = 0; block < blocks; block++) {
                const int64_t column = block * COLUMNS;
                if (column + COLUMNS <= values)
                    follow_chain<true>(layer, step, chain, h, column, states.recurrent, out);
                else
                    follow_chain<false>(layer, step, chain, h, column, states.recurrent, out);
            }
#pragma omp for schedule(static)
    for (int64_t t = 0; t < step.tokens; t++)
        for (int64_t h = 0; h < heads; h++)
            gated_norm(layer, in.inputs + t * layer.inputs() + channels + h * values,
                       out + (t * heads + h) * values);
}

}  // namespace
