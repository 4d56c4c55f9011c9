/* catsparse::gated_mlp on a CPU: reads the gate, and of up and down only what is kept.
 *
 *   g = act(w_gate x), kept iff |g| > threshold, y = sum over kept (g u - mean) w_down_t + bias
 *
 * Three passes, each shared out to the threads in long runs that get shorter:
 *   1. gate dots of all neurons, activation and comparison;
 *   2. up dots of the kept neurons;
 *   3. by segments of the kept neurons and tiles of output columns: rows of w_down_t, in order.
 * Where only w_down is there (no transposed copy), pass 3 reads all of it, row by row.
 * Every sum has one fixed order, whatever the number of threads: results repeat bit for bit.
 *
 * Weights are float, bfloat16 or float16; every sum and the decision are in float. Plain C with the
 * vector types of gcc and clang, built on first use for the machine it runs on (build.py); the
 * argument checks are cpu.py's.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

/* Lanes of a vector, and tokens whose sums fit in the registers beside those of ROWS rows. */
#if defined(__AVX512F__)
#define LANES 16
#define GROUP 4
#elif defined(__AVX__)
#define LANES 8
#define GROUP 2
#else
#define LANES 4
#define GROUP 4
#endif

enum { SILU = 0, GELU_TANH = 1, GELU = 2, RELU = 3 }; /* the order of ACTIVATIONS */

#define MAX_TOKENS 16
/* Neurons a thread takes at once: small enough to balance, large enough to stream. */
#define BLOCK 32
/* Rows read side by side: their sums hide each other's latency and share the loads of x. */
#define ROWS 4
/* With one token the kept neurons are added up in this many segments, each read as one stream;
 * with more, sums of segments would cost more than the stream saves. */
#define SEGMENTS 16
/* Floats of output that a tile holds over several tokens: a quarter of a first-level cache. */
#define TILE 2048
#define LINE 64

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef float fours __attribute__((vector_size(16)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

typedef struct {
    const void *x, *w_gate, *w_up, *w_down;
    const float *threshold, *mean, *bias; /* mean and bias may be NULL */
    void *y;
    int64_t tokens, hidden, neurons, columns;
    int64_t gate_stride, up_stride, down_stride; /* elements from one row to the next */
    int64_t threshold_stride;                    /* 0: one threshold, 1: one a neuron */
    int32_t dtype;                               /* 0 float, 1 bfloat16, 2 float16 */
    int32_t act, threads;
    int32_t down_transposed; /* w_down is [neurons, columns]; else [columns, neurons] */
} Problem;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
static inline float from_bits(uint32_t bits) { float value; memcpy(&value, &bits, 4); return value; }
static inline uint32_t to_bits(float value) { uint32_t bits; memcpy(&bits, &value, 4); return bits; }

/* The first n <= LANES values at p as floats, zeros after them. */
static inline floats load_f32(const float *p, int64_t n) {
    floats value = {0};
    memcpy(&value, p, n == LANES ? sizeof value : (size_t)n * 4);
    return value;
}
static inline halves load_halves(const uint16_t *p, int64_t n) {
    halves value = {0};
    memcpy(&value, p, n == LANES ? sizeof value : (size_t)n * 2);
    return value;
}
/* Intrinsics where gcc 12 takes a detour over narrower vectors or scalars. */
static inline words widen(halves value) {
#if defined(__AVX512F__)
    return (words)_mm512_cvtepu16_epi32((__m256i)value);
#elif defined(__AVX2__)
    return (words)_mm256_cvtepu16_epi32((__m128i)value);
#elif defined(__aarch64__)
    return (words)vmovl_u16((uint16x4_t)value);
#else
    return __builtin_convertvector(value, words);
#endif
}
static inline floats load_bf16(const uint16_t *p, int64_t n) {
    return (floats)(widen(load_halves(p, n)) << 16);
}
static inline floats load_f16(const uint16_t *p, int64_t n) {
    halves value = load_halves(p, n);
#if defined(__F16C__) && LANES == 16
    return (floats)_mm512_cvtph_ps((__m256i)value);
#elif defined(__F16C__)
    return (floats)_mm256_cvtph_ps((__m128i)value);
#elif defined(__aarch64__)
    return (floats)vcvt_f32_f16((float16x4_t)value);
#else
    /* Exponents differ by 112; the product restores subnormals. Infinity and NaN need the select. */
    words bits = widen(value), magnitude = (bits & 0x7fff) << 13;
    words finite = (words)((floats)magnitude * 0x1p112f), huge = (words)(magnitude >= 0x0f800000);
    words result = (finite & ~huge) | ((magnitude | 0x7f800000) & huge);
    return (floats)(result | (bits & 0x8000) << 16);
#endif
}
static inline float store_f32(float value) { return value; }
static inline uint16_t store_bf16(float value) {
    uint32_t bits = to_bits(value);
    if (value != value) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static inline uint16_t store_f16(float value) {
    uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    /* Below the smallest normal number the sum's own rounding is the wanted one. */
    if (magnitude < 0x38800000)
        return (uint16_t)(sign | (to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000));
    return (uint16_t)(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

static float activate(float z, int32_t act) {
    switch (act) {
    case SILU: return z / (1.0f + expf(-z));
    case GELU_TANH: return 0.5f * z * (1.0f + tanhf(0.7978845608f * (z + 0.044715f * z * z * z)));
    case GELU: return 0.5f * z * (1.0f + erff(z * 0.7071067812f));
    default: return z > 0.0f ? z : 0.0f;
    }
}

static inline float total(floats value) {
    fours part[LANES / 4];
    memcpy(part, &value, sizeof part);
    for (int half = LANES / 8; half > 0; half /= 2)
        for (int k = 0; k < half; k++) part[k] += part[k + half];
    return (part[0][0] + part[0][2]) + (part[0][1] + part[0][3]);
}

#define UNROLL _Pragma("GCC unroll 4")

/* Fetches a row wanted after this one, which no hardware can guess, into the second-level cache:
 * a tenth to a third faster than into the first. */
#define FETCH(POINTER) __builtin_prefetch(POINTER, 0, 2)

/* The dots of ROWS rows with COUNT tokens (x: [COUNT][x_stride], zeros after n), out[row][token].
 * `next` are the rows wanted after these. */
#define DEFINE_DOT(NAME, TYPE, LOAD, COUNT)                                                        \
    static void NAME(const TYPE *const *row, const TYPE *const *next, const float *x,              \
                     int64_t x_stride, int64_t n, float (*out)[MAX_TOKENS]) {                      \
        floats sum[ROWS][COUNT] = {{{0}}}, w[ROWS];                                                \
        for (int64_t j = 0; j < n; j += LANES) {                                                   \
            UNROLL for (int r = 0; r < ROWS; r++) {                                                \
                FETCH(next[r] + j);                                                                \
                w[r] = j + LANES <= n ? LOAD(row[r] + j, LANES) : LOAD(row[r] + j, n - j);         \
            }                                                                                      \
            UNROLL for (int t = 0; t < COUNT; t++) {                                               \
                floats value = load_f32(x + t * x_stride + j, LANES);                              \
                UNROLL for (int r = 0; r < ROWS; r++) sum[r][t] += w[r] * value;                   \
            }                                                                                      \
        }                                                                                          \
        UNROLL for (int r = 0; r < ROWS; r++)                                                      \
            UNROLL for (int t = 0; t < COUNT; t++) out[r][t] = total(sum[r][t]);                   \
    }

/* Work space: factors is [neurons][tokens]: g, NAN where one of several tokens drops the neuron,
 * then g u - mean; 0 where dropped. */
#define DEFINE_KERNEL(NAME, TYPE, LOAD, STORE)                                                     \
    DEFINE_DOT(NAME##_dot_one, TYPE, LOAD, 1)                                                      \
    DEFINE_DOT(NAME##_dot_group, TYPE, LOAD, GROUP)                                                \
    /* Dots of x with rows list[first..last) of w (first..last without a list) out of `total`. */  \
    static void NAME##_dots(const TYPE *w, int64_t w_stride, const int32_t *list, int64_t first,   \
                            int64_t last, int64_t total, const float *x, int64_t x_stride,         \
                            int64_t n, int64_t tokens, float (*out)[MAX_TOKENS]) {                 \
        for (int64_t c = first; c < last; c += ROWS, out += ROWS) {                                \
            const TYPE *row[ROWS], *next[ROWS];                                                    \
            float sums[ROWS][MAX_TOKENS], (*sum)[MAX_TOKENS] = c + ROWS <= last ? out : sums;      \
            for (int r = 0; r < ROWS; r++) {                                                       \
                int64_t here = least(c + r, last - 1), ahead = least(c + ROWS + r, total - 1);     \
                row[r] = w + (list ? list[here] : here) * w_stride;                                \
                next[r] = w + (list ? list[ahead] : ahead) * w_stride;                             \
            }                                                                                      \
            int64_t t = 0;                                                                         \
            for (; t + GROUP <= tokens; t += GROUP)                                                \
                NAME##_dot_group(row, next, x + t * x_stride, x_stride, n,                         \
                                 (float(*)[MAX_TOKENS])(sum[0] + t));                              \
            for (; t < tokens; t++)                                                                \
                NAME##_dot_one(row, next, x + t * x_stride, x_stride, n,                           \
                               (float(*)[MAX_TOKENS])(sum[0] + t));                                \
            if (sum == sums) memcpy(out, sums, (size_t)(last - c) * sizeof *out);                  \
        }                                                                                          \
    }                                                                                              \
    /* Pass 1. */                                                                                  \
    static void NAME##_gates(const Problem *p, const float *x, int64_t x_stride, int64_t first,    \
                             int64_t last, float *factors, uint8_t *kept) {                        \
        int64_t tokens = p->tokens;                                                                \
        float g[BLOCK][MAX_TOKENS];                                                                \
        NAME##_dots(p->w_gate, p->gate_stride, NULL, first, last, p->neurons, x, x_stride,         \
                    p->hidden, tokens, g);                                                         \
        for (int64_t i = first; i < last; i++) {                                                   \
            float threshold = p->threshold[i * p->threshold_stride];                               \
            float *factor = factors + i * tokens;                                                  \
            kept[i] = 0;                                                                           \
            for (int64_t t = 0; t < tokens; t++) {                                                 \
                float value = activate(g[i - first][t], p->act);                                   \
                int keep = fabsf(value) > threshold;                                               \
                kept[i] |= (uint8_t)keep;                                                          \
                factor[t] = keep ? value : NAN;                                                    \
            }                                                                                      \
            if (!kept[i]) memset(factor, 0, (size_t)tokens * sizeof *factor);                      \
        }                                                                                          \
    }                                                                                              \
    /* Pass 2, for the kept neurons list[first..last) of count. */                                 \
    static void NAME##_ups(const Problem *p, const float *x, int64_t x_stride, int64_t first,      \
                           int64_t last, int64_t count, const int32_t *list, float *factors) {     \
        int64_t tokens = p->tokens;                                                                \
        float u[BLOCK][MAX_TOKENS];                                                                \
        NAME##_dots(p->w_up, p->up_stride, list, first, last, count, x, x_stride, p->hidden,       \
                    tokens, u);                                                                    \
        for (int64_t c = first; c < last; c++) {                                                   \
            float mean = p->mean ? p->mean[list[c]] : 0.0f, *h = factors + list[c] * tokens;       \
            for (int64_t t = 0; t < tokens; t++)                                                   \
                h[t] = h[t] == h[t] ? h[t] * u[c - first][t] - mean : 0.0f;                        \
        }                                                                                          \
    }                                                                                              \
    /* Pass 3: columns first..first+width, kept neurons list[from..to) of count, into floats y. */ \
    static void NAME##_columns(const Problem *p, int64_t first, int64_t width,                     \
                               const float *factors, const int32_t *list, int64_t from,            \
                               int64_t to, int64_t count, float *y, int64_t y_stride) {            \
        static const float none[MAX_TOKENS] = {0};                                                 \
        int64_t tokens = p->tokens;                                                                \
        for (int64_t t = 0; t < tokens; t++)                                                       \
            memset(y + t * y_stride + first, 0, (size_t)round_up(width, LANES) * sizeof *y);       \
        const TYPE *base = (const TYPE *)p->w_down + first;                                        \
        for (int64_t c = from; c < to; c += ROWS) {                                                \
            const TYPE *row[ROWS], *next[ROWS];                                                    \
            const float *factor[ROWS];                                                             \
            for (int r = 0; r < ROWS; r++) {                                                       \
                int64_t here = list[least(c + r, to - 1)];                                         \
                row[r] = base + here * p->down_stride;                                             \
                next[r] = base + list[least(c + ROWS + r, count - 1)] * p->down_stride;            \
                factor[r] = c + r < to ? factors + here * tokens : none;                           \
            }                                                                                      \
            for (int64_t j = 0; j < width; j += LANES) {                                           \
                floats w[ROWS];                                                                    \
                UNROLL for (int r = 0; r < ROWS; r++) {                                            \
                    FETCH(next[r] + j);                                                            \
                    w[r] = j + LANES <= width ? LOAD(row[r] + j, LANES)                            \
                                              : LOAD(row[r] + j, width - j);                       \
                }                                                                                  \
                for (int64_t t = 0; t < tokens; t++) {                                             \
                    float *at = y + t * y_stride + first + j;                                      \
                    floats sum = load_f32(at, LANES);                                              \
                    UNROLL for (int r = 0; r < ROWS; r++) sum += w[r] * factor[r][t];              \
                    memcpy(at, &sum, sizeof sum);                                                  \
                }                                                                                  \
            }                                                                                      \
        }                                                                                          \
    }                                                                                              \
    /* The sums of all segments and the bias, rounded. */                                          \
    static void NAME##_finish(const Problem *p, int64_t first, int64_t last, const float *sums,    \
                              int64_t segments, int64_t y_stride) {                                \
        for (int64_t t = 0; t < p->tokens; t++)                                                    \
            for (int64_t j = first; j < last; j++) {                                               \
                float sum = p->bias ? p->bias[j] : 0.0f;                                           \
                for (int64_t s = 0; s < segments; s++)                                             \
                    sum += sums[(s * p->tokens + t) * y_stride + j];                               \
                ((TYPE *)p->y)[t * p->columns + j] = STORE(sum);                                   \
            }                                                                                      \
    }                                                                                              \
    /* Pass 3 without a transposed copy: rows first..last of w_down; h is [tokens][h_stride]. */   \
    static void NAME##_rows(const Problem *p, int64_t first, int64_t last, const float *h,         \
                            int64_t h_stride) {                                                    \
        float sum[BLOCK][MAX_TOKENS];                                                              \
        NAME##_dots(p->w_down, p->down_stride, NULL, first, last, p->columns, h, h_stride,         \
                    p->neurons, p->tokens, sum);                                                   \
        for (int64_t j = first; j < last; j++)                                                     \
            for (int64_t t = 0; t < p->tokens; t++)                                                \
                ((TYPE *)p->y)[t * p->columns + j] =                                               \
                    STORE(sum[j - first][t] + (p->bias ? p->bias[j] : 0.0f));                      \
    }                                                                                              \
    static void NAME##_widen(const Problem *p, float *x, int64_t x_stride) {                       \
        for (int64_t t = 0; t < p->tokens; t++)                                                    \
            for (int64_t j = 0; j < p->hidden; j += LANES) {                                       \
                floats value = LOAD((const TYPE *)p->x + t * p->hidden + j,                        \
                                    least(LANES, p->hidden - j));                                  \
                memcpy(x + t * x_stride + j, &value, sizeof value);                                \
            }                                                                                      \
    }

DEFINE_KERNEL(f32, float, load_f32, store_f32)
DEFINE_KERNEL(bf16, uint16_t, load_bf16, store_bf16)
DEFINE_KERNEL(f16, uint16_t, load_f16, store_f16)

typedef struct {
    void (*widen)(const Problem *, float *, int64_t);
    void (*gates)(const Problem *, const float *, int64_t, int64_t, int64_t, float *, uint8_t *);
    void (*ups)(const Problem *, const float *, int64_t, int64_t, int64_t, int64_t, const int32_t *,
                float *);
    void (*columns)(const Problem *, int64_t, int64_t, const float *, const int32_t *, int64_t,
                    int64_t, int64_t, float *, int64_t);
    void (*finish)(const Problem *, int64_t, int64_t, const float *, int64_t, int64_t);
    void (*rows)(const Problem *, int64_t, int64_t, const float *, int64_t);
} Kernel;
static const Kernel kernels[] = {
    {f32_widen, f32_gates, f32_ups, f32_columns, f32_finish, f32_rows},
    {bf16_widen, bf16_gates, bf16_ups, bf16_columns, bf16_finish, bf16_rows},
    {f16_widen, f16_gates, f16_ups, f16_columns, f16_finish, f16_rows},
};

/* 0, or 1 if there is no memory for the work space. */
int catsparse_gated_mlp(const Problem *p) {
    const Kernel *kernel = &kernels[p->dtype];
    int64_t tokens = p->tokens, neurons = p->neurons, columns = p->columns, count = 0;
    int64_t x_stride = round_up(p->hidden, LANES), h_stride = round_up(neurons, LANES);
    /* Not a power of two: sums of several tokens would fall on the same lines of the cache. */
    int64_t y_stride = round_up(columns, LANES) + LANES, segments = tokens == 1 ? SEGMENTS : 1;
    int64_t width = tokens == 1 ? columns : TILE / tokens / LINE * LINE;
    int64_t tiles = (columns + width - 1) / width;
    if (!p->down_transposed) segments = 0;
    size_t x_size = (size_t)(tokens * x_stride), h_size = (size_t)(tokens * h_stride);
    size_t y_size = (size_t)(segments * tokens * y_stride);
    size_t bytes = (x_size + 2 * h_size + y_size) * sizeof(float) + (size_t)neurons * 5;
    char *work = aligned_alloc(LINE, (size_t)round_up((int64_t)bytes, LINE));
    if (!work) return 1;
    float *x = (float *)work, *h = x + x_size, *factors = h + h_size, *sums = factors + h_size;
    int32_t *list = (int32_t *)(sums + y_size);
    uint8_t *kept = (uint8_t *)(list + neurons);
    kernel->widen(p, x, x_stride);
#pragma omp parallel num_threads(p->threads)
    {
#pragma omp for schedule(guided, 1)
        for (int64_t first = 0; first < neurons; first += BLOCK)
            kernel->gates(p, x, x_stride, first, least(first + BLOCK, neurons), factors, kept);
#pragma omp single
        for (int64_t i = 0; i < neurons; i++)
            if (kept[i]) list[count++] = (int32_t)i;
#pragma omp for schedule(guided, 1)
        for (int64_t first = 0; first < count; first += BLOCK)
            kernel->ups(p, x, x_stride, first, least(first + BLOCK, count), count, list, factors);
        if (p->down_transposed) {
#pragma omp for schedule(guided, 1)
            for (int64_t item = 0; item < segments * tiles; item++) {
                int64_t s = item / tiles, first = item % tiles * width;
                kernel->columns(p, first, least(width, columns - first), factors, list,
                                count * s / segments, count * (s + 1) / segments, count,
                                sums + s * tokens * y_stride, y_stride);
            }
#pragma omp for schedule(static)
            for (int64_t first = 0; first < columns; first += BLOCK)
                kernel->finish(p, first, least(first + BLOCK, columns), sums, segments, y_stride);
        } else {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < h_stride; i++)
                for (int64_t t = 0; t < tokens; t++)
                    h[t * h_stride + i] = i < neurons ? factors[i * tokens + t] : 0.0f;
#pragma omp for schedule(guided, 1)
            for (int64_t first = 0; first < columns; first += BLOCK)
                kernel->rows(p, first, least(first + BLOCK, columns), h, h_stride);
        }
    }
    free(work);
    return 0;
}
