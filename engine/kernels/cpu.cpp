// A decoder layer on a CPU, compiled where it runs by engine/kernels/cpu.py.
//
// Weights are read as they are stored, in bfloat16, fp16, 8 or 4 bits; all else is float32. What is
// computed for a token is the same to the last bit whatever else is in the step: each of its sums
// has one order, which no number of tokens or threads changes.
//
// Vectors are GCC's, as wide as the CPU's registers.

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
// A matrix is stored in panels of so many of its rows, which are columns of the product.
constexpr int PANEL = 2 * LANES;
// So many tokens stay in the cache while all panels pass by.
constexpr int64_t BLOCK = 96;
// Tokens of one sequence that read keys together, and how many keys they read at once.
constexpr int64_t RUN = 16;
constexpr int64_t KEYS = 64;
// The most query heads that may share a key head.
constexpr int64_t SHARING = 64;
// In place of an infinity in the cache, as engine/attention/forward_batch.py has it.
constexpr float HUGE_KEY = 60000.0f;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));
typedef float Four __attribute__((vector_size(16)));
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

// ---- Products -------------------------------------------------------------------------------

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

// ---- What lies between them -----------------------------------------------------------------

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

// A query's softmax over the keys so far, as FlashAttention has it (arXiv 2205.14135).
struct Softmax {
    float most = -INFINITY;
    float sum = 0;
};

// Ask memory for what is to be read soon.
inline void ask_for(const float *from, int64_t floats) {
    for (int64_t n = 0; n < floats; n += 16) __builtin_prefetch(from + n);
}

// A query's products with `count` keys, filled up to a multiple of 4. The values of these keys are
// asked for if this is the first query that reads them.
void score(const float *query, const float *keys, const float *values, int64_t count,
           int64_t width, bool is_first, float *scores) {
    for (int64_t i = 0; i < count; i += 4) {
        const float *four[4];
        for (int n = 0; n < 4; n++) four[n] = keys + std::min(i + n, count - 1) * width;
        if (is_first) ask_for(values + i * width, 4 * width);
        Floats sums[4] = {};
        for (int64_t n = 0; n < width; n += LANES)
            for (int m = 0; m < 4; m++)
                sums[m] = fused(load(query + n), load(four[m] + n), sums[m]);
        *(LooseFour *)(scores + i) = sums_of(sums[0], sums[1], sums[2], sums[3]);
    }
}

// Values by their weights, VECTORS of each row, added to `before` times what `out` has.
template <int VECTORS>
void mix(const float *values, const float *weights, int64_t count, int64_t width, float before,
         float *out) {
    Floats said[VECTORS];
    for (int n = 0; n < VECTORS; n++) said[n] = load(out + n * LANES) * before;
    for (int64_t i = 0; i < count; i++)
#pragma GCC unroll 8
        for (int n = 0; n < VECTORS; n++)
            said[n] = fused(load(values + i * width + n * LANES), all(weights[i]), said[n]);
    for (int n = 0; n < VECTORS; n++) store(out + n * LANES, said[n]);
}

// Go on with a query's attention over `count` more rows; `out` is what they say, not yet divided.
void attend(const float *query, const float *keys, const float *values, int64_t count,
            int64_t width, float scale, bool is_first, Softmax &softmax, float *out) {
    alignas(64) float weights[KEYS];
    score(query, keys, values, count, width, is_first, weights);
    for (int64_t i = count; i % LANES; i++) weights[i] = weights[count - 1];
    Floats highest = load(weights);
    for (int64_t i = LANES; i < count; i += LANES) {
        const Floats scores = load(weights + i);
        highest = scores > highest ? scores : highest;
    }
    float most = softmax.most;
    for (int n = 0; n < LANES; n++) most = std::max(most, highest[n] * scale);
    Floats total{};
    for (int64_t i = 0; i < count; i += LANES) {
        const Floats weight = exp_of(load(weights + i) * scale - most);
        store(weights + i, weight);
        if (i + LANES <= count) total += weight;
    }
    const float before = softmax.most == -INFINITY ? 0 : std::exp(softmax.most - most);
    float sum = sum_of(total);
    for (int64_t i = count - count % LANES; i < count; i++) sum += weights[i];
    softmax.sum = softmax.sum * before + sum;
    softmax.most = most;
    int64_t n = 0;
    for (; n + 8 * LANES <= width; n += 8 * LANES)
        mix<8>(values + n, weights, count, width, before, out + n);
    for (; n + 4 * LANES <= width; n += 4 * LANES)
        mix<4>(values + n, weights, count, width, before, out + n);
    for (; n < width; n += LANES) mix<1>(values + n, weights, count, width, before, out + n);
}

}  // namespace

// A decoder layer; heads are as wide as a multiple of LANES, and so is the MLP.
struct Layer {
    const float *input_norm, *post_norm;
    const float *head_norm;  // [query and kv heads, head width], or null
    Linear qkv, o, gate_up, down;
    int64_t width, inner, queries, kv_heads, head_width;
    int64_t window;  // the most keys that a query sees, or 0
    float input_eps, post_eps, head_eps, scale;
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

// SiLU (arXiv 1702.03118) of the gate, times the other half: [2, inner] to [inner].
void gate(const float *gate_up, int64_t inner, float *out) {
    for (int64_t n = 0; n < inner; n += LANES) {
        const Floats x = load(gate_up + n), e = exp_of(x < 0 ? x : -x);
        store(out + n, x * (x < 0 ? e : all(1)) / (1 + e) * load(gate_up + inner + n));
    }
}

}  // namespace

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

// The floats that a step's scratch has for each token.
int64_t scratch_floats(const Layer *layer) {
    const int64_t heads = 2 * layer->queries + 2 * layer->kv_heads;
    return layer->width + heads * layer->head_width + 3 * layer->inner;
}

// x [tokens, width] through a layer to out; its keys and values are written to `rows` rows a head.
void decoder_layer(const Layer *of, const Step *with, float *keys, float *values, int64_t rows,
                   const float *x, float *out) {
    const Layer &layer = *of;
    const Step &step = *with;
    const Cache cache{keys, values, rows};
    const int64_t tokens = step.tokens, width = layer.width, inner = layer.inner;
    const int64_t heads = layer.queries + 2 * layer.kv_heads, head_width = layer.head_width;
    const int64_t sharing = layer.queries / layer.kv_heads;
    float *normed = step.scratch;
    float *qkv = normed + tokens * width;
    float *said = qkv + tokens * heads * head_width;
    float *gate_up = said + tokens * layer.queries * head_width;
    float *gated = gate_up + tokens * 2 * inner;
    const std::vector<int64_t> runs = runs_of(step);
    const int64_t num_runs = runs.size();
    // Heads that share keys read them together, unless a thread would have none.
    const int64_t group = num_runs * layer.kv_heads < step.threads ? 1 : sharing;
#pragma omp parallel num_threads(step.threads)
    {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++)
            normalize(x + t * width, layer.input_norm, layer.input_eps, width, normed + t * width);
        multiply(normed, tokens, layer.qkv, {qkv, nullptr, heads * head_width});
#pragma omp barrier
#pragma omp for schedule(static) collapse(2)
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t h = 0; h < heads; h++)
                place_head(layer, step, cache, t, h, qkv + (t * heads + h) * head_width);
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t run = 0; run < num_runs; run++)
            for (int64_t h = 0; h < layer.queries; h += group)
                attend_run(layer, step, cache, runs[run],
                           run + 1 < num_runs ? runs[run + 1] : tokens, h, h + group, qkv, said);
        multiply(said, tokens, layer.o, {out, x, width});
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++)
            normalize(out + t * width, layer.post_norm, layer.post_eps, width, normed + t * width);
        multiply(normed, tokens, layer.gate_up, {gate_up, nullptr, 2 * inner});
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++)
            gate(gate_up + t * 2 * inner, inner, gated + t * inner);
        multiply(gated, tokens, layer.down, {out, out, width});
    }
}
}
