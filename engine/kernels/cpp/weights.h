// How weights are stored, and how they are read as floats.
#pragma once

#include "vectors.h"

namespace {

// A matrix is stored in panels of so many of its rows, which are columns of the product.
constexpr int PANEL = 2 * LANES;

// How a panel's numbers of one column of the matrix are stored, in BYTES, and read as floats; and
// whether a row has several factors.
struct Bfloat16 {
    static constexpr int BYTES = 2 * PANEL;
    static constexpr bool HAS_BLOCKS = false;
    // Row n and row LANES + n are the halves of a word, so that each takes one operation.
    static inline void read(const char *from, Floats &low, Floats &high) {
        const Words both = *(const LooseWords *)from;
        low = (Floats)(both << 16);
        high = (Floats)(both & 0xffff0000u);
    }
};

template <class Lane>
struct InOrder {
    static constexpr int BYTES = Lane::SIZE * PANEL;
    static constexpr bool HAS_BLOCKS = false;
    static inline void read(const char *from, Floats &low, Floats &high) {
        low = Lane::floats(from);
        high = Lane::floats(from + LANES * Lane::SIZE);
    }
};

struct Half {
    static constexpr int SIZE = 2;
    static inline Floats floats(const char *from) {
#if defined(__AVX512F__)
        return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#elif defined(__F16C__)
        return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
#else
        typedef uint16_t Shorts __attribute__((vector_size(2 * LANES), aligned(1), may_alias));
        const Words half = __builtin_convertvector(*(const Shorts *)from, Words);
        // Its exponent is 112 smaller than float's.
        const Floats size = (Floats)((half & 0x7fff) << 13) * 0x1p112f;
        return (Floats)((Words)size | (half & 0x8000) << 16);
#endif
    }
};

struct Int8 {
    static constexpr int SIZE = 1;
    static inline Floats floats(const char *from) {
#if defined(__AVX512F__)
        const __m128i bytes = _mm_loadu_si128((const __m128i *)from);
        return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
#elif defined(__AVX2__)
        const __m128i bytes = _mm_loadl_epi64((const __m128i *)from);
        return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
#else
        return __builtin_convertvector(*(const LooseBytes *)from, Floats);
#endif
    }
};

// The same with several factors a row.
struct Int8Blocks : InOrder<Int8> {
    static constexpr bool HAS_BLOCKS = true;
};

// Whole numbers from 0 to 15: row n has the lower half of byte n, row LANES + n the upper.
struct Whole4 {
    static constexpr int BYTES = PANEL / 2;
    static constexpr bool HAS_BLOCKS = true;
    static inline void read(const char *from, Floats &low, Floats &high) {
#if defined(__AVX512F__)
        const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
        low = (Floats)_mm512_cvtepi32_ps(_mm512_and_si512(both, _mm512_set1_epi32(15)));
        high = (Floats)_mm512_cvtepi32_ps(_mm512_srli_epi32(both, 4));
#elif defined(__AVX2__)
        const __m256i both = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
        low = (Floats)_mm256_cvtepi32_ps(_mm256_and_si256(both, _mm256_set1_epi32(15)));
        high = (Floats)_mm256_cvtepi32_ps(_mm256_srli_epi32(both, 4));
#else
        for (int n = 0; n < LANES; n++) {
            low[n] = from[n] & 15;
            high[n] = (uint8_t)from[n] >> 4;
        }
#endif
    }
};

// NF4's values (appendix E of arXiv 2305.14314, QLoRA).
alignas(64) constexpr float NF4[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

// Row n has the lower half of byte n, row LANES + n the upper.
struct FourBits {
    static constexpr int BYTES = PANEL / 2;
    static constexpr bool HAS_BLOCKS = true;
    static inline void read(const char *from, Floats &low, Floats &high) {
#if defined(__AVX512F__)
        const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
        const __m512 table = _mm512_load_ps(NF4);  // chosen from by the lower half alone
        low = (Floats)_mm512_permutexvar_ps(both, table);
        high = (Floats)_mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), table);
#elif defined(__AVX2__)
        const __m256i both = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
        low = chosen(both, _mm256_slli_epi32(both, 28));
        high = chosen(_mm256_srli_epi32(both, 4), _mm256_slli_epi32(both, 24));
#else
        for (int n = 0; n < LANES; n++) {
            low[n] = NF4[from[n] & 15];
            high[n] = NF4[(uint8_t)from[n] >> 4];
        }
#endif
    }
#if defined(__AVX2__) && !defined(__AVX512F__)
    // By three bits from each half of the table, and by the sign of `half` from either.
    static inline Floats chosen(__m256i index, __m256i half) {
        const __m256 below = _mm256_permutevar8x32_ps(_mm256_load_ps(NF4), index);
        const __m256 above = _mm256_permutevar8x32_ps(_mm256_load_ps(NF4 + 8), index);
        return (Floats)_mm256_blendv_ps(below, above, _mm256_castsi256_ps(half));
    }
#endif
};

}  // namespace
