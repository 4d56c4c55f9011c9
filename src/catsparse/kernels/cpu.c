/* catsparse::gated_mlp and catsparse::sparse_linear on a CPU.
 *
 * gated_mlp reads the gate, and of up and down only what is kept:
 *
 *   g = act(w_gate x), kept iff |g| > threshold, y = sum over kept (g u - mean) w_down_t + bias
 *
 * With a preview of w_gate, act(preview x) decides in g's place; with one of w_up, too, that product
 * in g u's. With a product threshold, kept neurons must also have |g u| above it. Three passes, each
 * shared out to the threads in long runs that get shorter:
 *   1. gate dots of all neurons, or their previews', activation and comparison;
 *   2. up dots of the kept neurons, after a preview gate dots too; the second decision;
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

#include "cpu_preview.h"
#include "cpu_vectors.h"

enum { SILU = 0, GELU_TANH = 1, GELU = 2, RELU = 3 }; /* the order of ACTIVATIONS */

/* Neurons a thread takes at once: small enough to balance, large enough to stream. */
#define BLOCK 32
/* With one token the kept neurons are added up in this many segments, each read as one stream;
 * with more, sums of segments would cost more than the stream saves. */
#define SEGMENTS 16
/* Floats of output that a tile holds over several tokens: a quarter of a first-level cache. */
#define TILE 2048
#define LINE 64

typedef struct {
    const void *x, *w_gate, *w_up, *w_down;
    const float *threshold, *mean, *bias; /* mean and bias may be NULL */
    const float *product_threshold;       /* may be NULL */
    const uint8_t *preview;               /* may be NULL */
    const uint16_t *preview_scale;
    void *y;
    int64_t tokens, hidden, neurons, columns;
    int64_t gate_stride, up_stride, down_stride; /* elements from one row to the next */
    int64_t threshold_stride, product_stride;    /* 0: one threshold, 1: one a neuron */
    int32_t dtype;                               /* 0 float, 1 bfloat16, 2 float16 */
    int32_t act, threads;
    int32_t down_transposed; /* w_down is [neurons, columns]; else [columns, neurons] */
    int32_t preview_bits;
    int32_t preview_products; /* whether w_up's preview follows w_gate's */
} Problem;

/* How x lies for its dots with the preview: floats have more bits than two digits. */
static int in_digits(const Problem *p) { return HAS_DIGITS && p->dtype != 0; }

static float activate(float z, int32_t act) {
    switch (act) {
    case SILU: return z / (1.0f + expf(-z));
    case GELU_TANH: return 0.5f * z * (1.0f + tanhf(0.7978845608f * (z + 0.044715f * z * z * z)));
    case GELU: return 0.5f * z * (1.0f + erff(z * 0.7071067812f));
    default: return z < 0.0f ? 0.0f : z;
    }
}

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

/* Work space: factors is [neurons][tokens]: g or its preview, NAN where one of several tokens drops
 * the neuron, then g u - mean; 0 where dropped. */
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
        float g[BLOCK][MAX_TOKENS], u[BLOCK][MAX_TOKENS];                                          \
        for (int part = 0; p->preview && part <= p->preview_products; part++)                      \
            preview_dots(p->preview, p->preview_scale, p->preview_bits, in_digits(p),              \
                         part * p->neurons, first, last, p->neurons, x, x_stride, p->hidden,       \
                         tokens, part ? u : g);                                                    \
        if (!p->preview)                                                                           \
            NAME##_dots(p->w_gate, p->gate_stride, NULL, first, last, p->neurons, x, x_stride,     \
                        p->hidden, tokens, g);                                                     \
        for (int64_t i = first; i < last; i++) {                                                   \
            float threshold = p->threshold[i * p->threshold_stride];                               \
            float *factor = factors + i * tokens;                                                  \
            kept[i] = 0;                                                                           \
            for (int64_t t = 0; t < tokens; t++) {                                                 \
                float value = activate(g[i - first][t], p->act);                                   \
                if (p->preview_products) value *= u[i - first][t];                                 \
                int keep = fabsf(value) > threshold;                                               \
                kept[i] |= (uint8_t)keep;                                                          \
                factor[t] = keep ? value : NAN;                                                    \
            }                                                                                      \
            if (!kept[i]) memset(factor, 0, (size_t)tokens * sizeof *factor);                      \
        }                                                                                          \
    }                                                                                              \
    /* Pass 2, for the kept neurons list[first..last) of count. */                                 \
    static void NAME##_ups(const Problem *p, const float *x, int64_t x_stride, int64_t first,      \
                           int64_t last, int64_t count, const int32_t *list, float *factors,       \
                           uint8_t *kept) {                                                        \
        int64_t tokens = p->tokens;                                                                \
        float u[BLOCK][MAX_TOKENS], g[BLOCK][MAX_TOKENS];                                          \
        NAME##_dots(p->w_up, p->up_stride, list, first, last, count, x, x_stride, p->hidden,       \
                    tokens, u);                                                                    \
        if (p->preview)                                                                            \
            NAME##_dots(p->w_gate, p->gate_stride, list, first, last, count, x, x_stride,          \
                        p->hidden, tokens, g);                                                     \
        for (int64_t c = first; c < last; c++) {                                                   \
            int64_t i = list[c];                                                                   \
            float mean = p->mean ? p->mean[i] : 0.0f, *h = factors + i * tokens;                   \
            const float *limit = p->product_threshold;                                             \
            if (limit) limit += i * p->product_stride;                                             \
            kept[i] = 0;                                                                           \
            for (int64_t t = 0; t < tokens; t++) {                                                 \
                float gate = p->preview ? activate(g[c - first][t], p->act) : h[t];                \
                float value = gate * u[c - first][t];                                              \
                int keep = h[t] == h[t] && (!limit || fabsf(value) > *limit);                      \
                kept[i] |= (uint8_t)keep;                                                          \
                h[t] = keep ? value - mean : 0.0f;                                                 \
            }                                                                                      \
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
                float *, uint8_t *);
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

/* How many of the neurons are kept, and which, in order. No branch: it could not be foretold. */
static int64_t list_kept(const uint8_t *kept, int64_t neurons, int32_t *list) {
    int64_t count = 0;
    for (int64_t i = 0; i < neurons; i++) {
        list[count] = (int32_t)i;
        count += kept[i];
    }
    return count;
}

/* Not a power of two: sums of several tokens would fall on the same lines of the cache. */
static int64_t sums_stride(int64_t columns) { return round_up(columns, LANES) + LANES; }

static int64_t segments_of(int64_t tokens) { return tokens == 1 ? SEGMENTS : 1; }

/* Pass 3, by all threads of a team: rows list[0..count) of w_down, times their factors, into y.
 * sums is [segments][tokens][y_stride]. */
static void add_rows(const Problem *p, const float *factors, const int32_t *list, int64_t count,
                     float *sums) {
    const Kernel *kernel = &kernels[p->dtype];
    int64_t tokens = p->tokens, columns = p->columns, segments = segments_of(tokens);
    int64_t width = tokens == 1 ? columns : TILE / tokens / LINE * LINE;
    int64_t tiles = (columns + width - 1) / width, y_stride = sums_stride(columns);
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
}

/* 0, or 1 if there is no memory for the work space. */
int catsparse_gated_mlp(const Problem *p) {
    const Kernel *kernel = &kernels[p->dtype];
    int64_t tokens = p->tokens, neurons = p->neurons, columns = p->columns, count = 0;
    int64_t x_stride = round_up(p->hidden, p->preview ? CHUNK_INPUTS : LANES);
    int64_t h_stride = round_up(neurons, LANES);
    int64_t y_stride = sums_stride(columns), segments = segments_of(tokens);
    if (!p->down_transposed) segments = 0;
    size_t x_size = (size_t)(tokens * x_stride), h_size = (size_t)(tokens * h_stride);
    size_t laid_size = p->preview ? x_size : 0;
    size_t y_size = (size_t)(segments * tokens * y_stride);
    size_t bytes = (x_size + laid_size + 2 * h_size + y_size) * sizeof(float) + (size_t)neurons * 5;
    char *work = aligned_alloc(LINE, (size_t)round_up((int64_t)bytes, LINE));
    if (!work) return 1;
    float *x = (float *)work, *laid = x + x_size, *h = laid + laid_size;
    float *factors = h + h_size, *sums = factors + h_size;
    int32_t *list = (int32_t *)(sums + y_size);
    uint8_t *kept = (uint8_t *)(list + neurons);
    if (p->preview) memset(x, 0, x_size * sizeof *x); /* inputs that fill up the last chunk */
    kernel->widen(p, x, x_stride);
    for (int64_t t = 0; p->preview && t < tokens; t++)
        lay_out(x + t * x_stride, x_stride, p->preview_bits, in_digits(p), laid + t * x_stride);
#pragma omp parallel num_threads(p->threads)
    {
#pragma omp for schedule(guided, 1)
        for (int64_t first = 0; first < neurons; first += BLOCK)
            kernel->gates(p, p->preview ? laid : x, x_stride, first, least(first + BLOCK, neurons),
                          factors, kept);
#pragma omp single
        count = list_kept(kept, neurons, list);
#pragma omp for schedule(guided, 1)
        for (int64_t first = 0; first < count; first += BLOCK)
            kernel->ups(p, x, x_stride, first, least(first + BLOCK, count), count, list, factors,
                        kept);
        if (p->product_threshold) {
#pragma omp single
            count = list_kept(kept, neurons, list);
        }
        if (p->down_transposed) {
            add_rows(p, factors, list, count, sums);
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

/* catsparse::sparse_linear: y = sum over kept j of (x_j - mean_j) w_down[j] + bias, j kept iff
 * |x_j| > threshold. Of Problem it takes what these are, inputs as neurons, w_down [neurons,
 * columns]. 0, or 1 if there is no memory for the work space. */
int catsparse_sparse_linear(const Problem *p) {
    int64_t tokens = p->tokens, inputs = p->neurons, count = 0;
    int64_t x_stride = round_up(inputs, LANES);
    size_t x_size = (size_t)(tokens * x_stride), factors_size = (size_t)(tokens * inputs);
    size_t y_size = (size_t)(segments_of(tokens) * tokens * sums_stride(p->columns));
    size_t bytes = (x_size + factors_size + y_size) * sizeof(float) + (size_t)inputs * 5;
    char *work = aligned_alloc(LINE, (size_t)round_up((int64_t)bytes, LINE));
    if (!work) return 1;
    float *x = (float *)work, *sums = x + x_size, *factors = sums + y_size;
    int32_t *list = (int32_t *)(factors + factors_size);
    uint8_t *kept = (uint8_t *)(list + inputs);
    kernels[p->dtype].widen(p, x, x_stride);
    for (int64_t j = 0; j < inputs; j++) {
        float threshold = p->threshold[j * p->threshold_stride], mean = p->mean ? p->mean[j] : 0.0f;
        kept[j] = 0;
        for (int64_t t = 0; t < tokens; t++) {
            float value = x[t * x_stride + j];
            int keep = fabsf(value) > threshold;
            kept[j] |= (uint8_t)keep;
            factors[j * tokens + t] = keep ? value - mean : 0.0f;
        }
    }
    count = list_kept(kept, inputs, list);
#pragma omp parallel num_threads(p->threads)
    add_rows(p, factors, list, count, sums);
    free(work);
    return 0;
}
