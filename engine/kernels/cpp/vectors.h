// Vectors as wide as a register of the CPU, and what is computed with them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <vector>
#if defined(__F16C__)
#include <immintrin.h>
#endif

extern "C" int omp_get_thread_num();
extern "C" int omp_get_num_threads();

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr int TILE = 12;  // tokens whose sums fill the registers
#else
constexpr int LANES = 8;
constexpr int TILE = 6;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));
typedef float Four __attribute__((vector_size(16)));
typedef int32_t FourInts __attribute__((vector_size(16)));
// The same anywhere in memory.
typedef Four LooseFour __attribute__((aligned(4), may_alias));
typedef Floats LooseFloats __attribute__((aligned(4), may_alias));
typedef Words LooseWords __attribute__((aligned(1), may_alias));
typedef Bytes LooseBytes __attribute__((aligned(1), may_alias));

inline Floats load(const float *from) { return *(const LooseFloats *)from; }
inline void store(float *to, Floats values) { *(LooseFloats *)to = values; }
// Less nothing, which leaves a zero its sign and so costs nothing.
inline Floats all(float value) { return value - Floats{}; }

// a b + c, rounded once where the processor can. It is never left to the compiler, who might do it
// for one number of tokens and not for another.
inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_FEATURE_FMA)
    for (int n = 0; n < LANES; n++) c[n] = __builtin_fmaf(a[n], b[n], c[n]);
    return c;
#else
    return a * b + c;
#endif
}

// Neighbours of a and of b added, within each four lanes: a01 a23 b01 b23.
inline Floats add_pairs(Floats a, Floats b) {
#if defined(__AVX512F__)
#define EVEN 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30
#define ODD 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31
#else
#define EVEN 0, 2, 8, 10, 4, 6, 12, 14
#define ODD 1, 3, 9, 11, 5, 7, 13, 15
#endif
    return __builtin_shuffle(a, b, Ints{EVEN}) + __builtin_shuffle(a, b, Ints{ODD});
}

// The sums of the lanes of four vectors.
inline Four sums_of(Floats a, Floats b, Floats c, Floats d) {
    const Floats parts = add_pairs(add_pairs(a, b), add_pairs(c, d));
    const LooseFour *of = (const LooseFour *)&parts;
    Four sums = of[0] + of[1];
    if (LANES == 16) sums += of[LANES / 4 - 2] + of[LANES / 4 - 1];
    return sums;
}

inline float sum_of(Floats v) { return sums_of(v, v, v, v)[0]; }

// exp(x) for x <= 0, right to two units in the last place: Cephes' expf.
inline Floats exp_of(Floats x) {
    x = x < -87.0f ? all(-87.0f) : x;
    const Ints whole = __builtin_convertvector(x * 1.44269504f - 0.5f, Ints);
    const Floats n = __builtin_convertvector(whole, Floats);
    const Floats r = fused(n, all(2.12194440e-4f), fused(n, all(-0.693359375f), x));
    Floats p = all(1.9875691500e-4f);
    for (float term : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                       5.0000001201e-1f})
        p = fused(p, r, all(term));
    return (fused(p, r * r, r) + 1.0f) * (Floats)((whole + 127) << 23);
}

}  // namespace
