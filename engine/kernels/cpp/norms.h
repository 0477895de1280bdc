// What lies between products and attention, of one vector each.
#pragma once

#include "vectors.h"

namespace {

// In place of an infinity in the cache, as engine/attention/forward_batch.py has it.
constexpr float HUGE_KEY = 60000.0f;

// RMSNorm (arXiv 1910.07467) of one vector.
void normalize(const float *x, const float *weight, float eps, int64_t width, float *out) {
    Floats squares{};
    int64_t n = 0;
    for (; n + LANES <= width; n += LANES) squares = fused(load(x + n), load(x + n), squares);
    float sum = sum_of(squares);
    for (; n < width; n++) sum += x[n] * x[n];
    const float factor = 1 / std::sqrt(sum / width + eps);
    for (n = 0; n < width; n++) out[n] = x[n] * factor * weight[n];
}

// Rotary embedding (arXiv 2104.09864) of one head, whose halves are turned together.
void rotate(float *head, const float *cos, const float *sin, int64_t width) {
    const int64_t half = width / 2;
    for (int64_t n = 0; n < half; n++) {
        const float a = head[n], b = head[half + n];
        head[n] = a * cos[n] - b * sin[n];
        head[half + n] = b * cos[n] + a * sin[n];
    }
}

// A head into the cache: another kernel may read it masked, where a weight of 0 must make it 0.
void keep(const float *head, int64_t width, float *row) {
    for (int64_t n = 0; n < width; n++) {
        const float x = head[n];
        const float bounded = x == INFINITY ? HUGE_KEY : x == -INFINITY ? -HUGE_KEY : x;
        row[n] = x == x ? bounded : 0;
    }
}

// SiLU (arXiv 1702.03118) of the gate, times the other half: [2, inner] to [inner].
void gate(const float *gate_up, int64_t inner, float *out) {
    for (int64_t n = 0; n < inner; n += LANES) {
        const Floats x = load(gate_up + n), e = exp_of(x < 0 ? x : -x);
        store(out + n, x * (x < 0 ? e : all(1)) / (1 + e) * load(gate_up + inner + n));
    }
}

}  // namespace
