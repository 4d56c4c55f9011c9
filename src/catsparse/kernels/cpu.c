/* catsparse::gated_mlp, catsparse::packed_linear and catsparse::sparse_linear on a CPU.
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
 * x and y are float, bfloat16 or float16, weights the same or int8, fp8 or int4 with their scales;
 * every sum and the decision are in float. An int4 w_gate is a preview of itself and exact, so x is
 * laid out as for one. Plain C with the vector types of gcc and clang, built on first use for the
 * machine it runs on (build.py); the argument checks are cpu.py's.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "cpu_weights.h"

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
    const void *x;
    Matrix gate, up, down;
    const float *threshold, *mean, *bias; /* mean and bias may be NULL */
    const float *product_threshold;       /* may be NULL */
    const uint8_t *preview;               /* may be NULL */
    const uint16_t *preview_scale;
    void *y;
    int64_t tokens, hidden, neurons, columns;
    int64_t threshold_stride, product_stride;    /* 0: one threshold, 1: one a neuron */
    int32_t dtype;                               /* of x and y: F32, BF16 or F16 */
    int32_t weights;                             /* their format */
    int32_t act, threads;
    int32_t down_transposed; /* down is [neurons, columns]; else [columns, neurons], of floats */
    int32_t preview_bits;
    int32_t preview_products; /* whether w_up's preview follows w_gate's */
} Problem;

/* How x lies for its dots with the preview: floats have more bits than two digits. */
static int in_digits(const Problem *p) { return HAS_DIGITS && p->dtype != F32; }
static int lies_laid_out(const Problem *p) { return p->preview || p->weights == INT4; }
static const Format *format_of(const Problem *p) {
    return &formats[p->weights + (p->weights == INT4 && in_digits(p))];
}

static float activate(float z, int32_t act) {
    switch (act) {
    case SILU: return z / (1.0f + expf(-z));
    case GELU_TANH: return 0.5f * z * (1.0f + tanhf(0.7978845608f * (z + 0.044715f * z * z * z)));
    case GELU: return 0.5f * z * (1.0f + erff(z * 0.7071067812f));
    default: return z < 0.0f ? 0.0f : z;
    }
}

/* Work space: factors is [neurons][tokens]: g or its preview, NAN where one of several tokens drops
 * the neuron, then g u - mean, times w_down's scale; 0 where dropped. x is as the weights' dots want
 * it, laid as the preview's do. */

/* Pass 1. */
static void gates(const Problem *p, const float *x, const float *laid, int64_t x_stride,
                  int64_t first, int64_t last, float *factors, uint8_t *kept) {
    int64_t tokens = p->tokens;
    float g[BLOCK][MAX_TOKENS], u[BLOCK][MAX_TOKENS];
    for (int part = 0; p->preview && part <= p->preview_products; part++)
        preview_dots(p->preview, p->preview_scale, p->preview_bits, in_digits(p),
                     part * p->neurons, NULL, first, last, p->neurons, laid, x_stride, p->hidden,
                     tokens, part ? u : g);
    if (!p->preview)
        format_of(p)->dots(&p->gate, NULL, first, last, p->neurons, x, x_stride, p->hidden, tokens,
                           g);
    for (int64_t i = first; i < last; i++) {
        float threshold = p->threshold[i * p->threshold_stride];
        float *factor = factors + i * tokens;
        kept[i] = 0;
        for (int64_t t = 0; t < tokens; t++) {
            float value = activate(g[i - first][t], p->act);
            if (p->preview_products) value *= u[i - first][t];
            int keep = fabsf(value) > threshold;
            kept[i] |= (uint8_t)keep;
            factor[t] = keep ? value : NAN;
        }
        if (!kept[i]) memset(factor, 0, (size_t)tokens * sizeof *factor);
    }
}

/* Pass 2, for the kept neurons list[first..last) of count. */
static void ups(const Problem *p, const float *x, int64_t x_stride, int64_t first, int64_t last,
                int64_t count, const int32_t *list, float *factors, uint8_t *kept) {
    const Format *format = format_of(p);
    const float *scale = p->weights == INT4 ? NULL : p->down.scale;
    int64_t tokens = p->tokens;
    float u[BLOCK][MAX_TOKENS], g[BLOCK][MAX_TOKENS];
    format->dots(&p->up, list, first, last, count, x, x_stride, p->hidden, tokens, u);
    if (p->preview)
        format->dots(&p->gate, list, first, last, count, x, x_stride, p->hidden, tokens, g);
    for (int64_t c = first; c < last; c++) {
        int64_t i = list[c];
        float mean = p->mean ? p->mean[i] : 0.0f, *h = factors + i * tokens;
        const float *limit = p->product_threshold;
        if (limit) limit += i * p->product_stride;
        kept[i] = 0;
        for (int64_t t = 0; t < tokens; t++) {
            float gate = p->preview ? activate(g[c - first][t], p->act) : h[t];
            float value = gate * u[c - first][t];
            int keep = h[t] == h[t] && (!limit || fabsf(value) > *limit);
            kept[i] |= (uint8_t)keep;
            h[t] = !keep ? 0.0f : scale ? (value - mean) * scale[i] : value - mean;
        }
    }
}

/* Rows first..last of a w_down that is not transposed, times h [tokens][h_stride], into sums. */
static void whole_rows(const Problem *p, int64_t first, int64_t last, const float *h,
                       int64_t h_stride, float *sums, int64_t y_stride) {
    float sum[BLOCK][MAX_TOKENS];
    format_of(p)->dots(&p->down, NULL, first, last, p->columns, h, h_stride, p->neurons, p->tokens,
                       sum);
    for (int64_t j = first; j < last; j++)
        for (int64_t t = 0; t < p->tokens; t++) sums[t * y_stride + j] = sum[j - first][t];
}

#define DEFINE_DTYPE(NAME, TYPE, LOAD, STORE)                                                      \
    static void NAME##_widen(const Problem *p, float *x, int64_t x_stride) {                       \
        for (int64_t t = 0; t < p->tokens; t++)                                                    \
            for (int64_t j = 0; j < p->hidden; j += LANES) {                                       \
                floats value = LOAD((const TYPE *)p->x + t * p->hidden + j,                        \
                                    least(LANES, p->hidden - j));                                  \
                memcpy(x + t * x_stride + j, &value, sizeof value);                                \
            }                                                                                      \
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
    }
DEFINE_DTYPE(f32, float, load_f32, store_f32)
DEFINE_DTYPE(bf16, uint16_t, load_bf16, store_bf16)
DEFINE_DTYPE(f16, uint16_t, load_f16, store_f16)

typedef struct {
    void (*widen)(const Problem *, float *, int64_t);
    void (*finish)(const Problem *, int64_t, int64_t, const float *, int64_t, int64_t);
} Dtype;
static const Dtype dtypes[] = {
    {f32_widen, f32_finish}, {bf16_widen, bf16_finish}, {f16_widen, f16_finish}};

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

/* The end of pass 3, by all threads of a team: sums [segments][tokens][y_stride] and bias into y. */
static void finish(const Problem *p, const float *sums, int64_t segments) {
#pragma omp for schedule(static)
    for (int64_t first = 0; first < p->columns; first += BLOCK)
        dtypes[p->dtype].finish(p, first, least(first + BLOCK, p->columns), sums, segments,
                                sums_stride(p->columns));
}

/* Pass 3, by all threads of a team: rows list[0..count) of w_down, times their factors, into y. */
static void add_rows(const Problem *p, const float *factors, const int32_t *list, int64_t count,
                     float *sums) {
    int64_t tokens = p->tokens, columns = p->columns, segments = segments_of(tokens);
    int64_t width = tokens == 1 ? columns : TILE / tokens / LINE * LINE;
    int64_t tiles = (columns + width - 1) / width, y_stride = sums_stride(columns);
#pragma omp for schedule(guided, 1)
    for (int64_t item = 0; item < segments * tiles; item++) {
        int64_t s = item / tiles, first = item % tiles * width;
        int64_t here = least(width, columns - first);
        float *sum = sums + s * tokens * y_stride;
        for (int64_t t = 0; t < tokens; t++)
            memset(sum + t * y_stride + first, 0, (size_t)round_up(here, LANES) * sizeof *sum);
        format_of(p)->columns(&p->down, first, here, factors, list, count * s / segments,
                              count * (s + 1) / segments, count, tokens, sum, y_stride);
    }
    finish(p, sums, segments);
}

/* 0, or 1 if there is no memory for the work space. */
int catsparse_gated_mlp(const Problem *p) {
    int64_t tokens = p->tokens, neurons = p->neurons, columns = p->columns, count = 0;
    int laid_out = lies_laid_out(p);
    int64_t x_stride = round_up(p->hidden, laid_out ? CHUNK_INPUTS : LANES);
    int64_t h_stride = round_up(neurons, LANES);
    int64_t segments = p->down_transposed ? segments_of(tokens) : 1;
    size_t x_size = (size_t)(tokens * x_stride), h_size = (size_t)(tokens * h_stride);
    size_t laid_size = laid_out ? x_size : 0;
    size_t y_size = (size_t)(segments * tokens * sums_stride(columns));
    size_t bytes = (x_size + laid_size + 2 * h_size + y_size) * sizeof(float) + (size_t)neurons * 5;
    char *work = aligned_alloc(LINE, (size_t)round_up((int64_t)bytes, LINE));
    if (!work) return 1;
    float *x = (float *)work, *laid = x + x_size, *h = laid + laid_size;
    float *factors = h + h_size, *sums = factors + h_size;
    int32_t *list = (int32_t *)(sums + y_size);
    uint8_t *kept = (uint8_t *)(list + neurons);
    if (laid_out) memset(x, 0, x_size * sizeof *x); /* inputs that fill up the last chunk */
    dtypes[p->dtype].widen(p, x, x_stride);
    for (int64_t t = 0; laid_out && t < tokens; t++)
        lay_out(x + t * x_stride, x_stride, p->preview ? p->preview_bits : 4, in_digits(p),
                laid + t * x_stride);
    if (p->weights == INT4) x = laid;
#pragma omp parallel num_threads(p->threads)
    {
#pragma omp for schedule(guided, 1)
        for (int64_t first = 0; first < neurons; first += BLOCK)
            gates(p, x, laid, x_stride, first, least(first + BLOCK, neurons), factors, kept);
#pragma omp single
        count = list_kept(kept, neurons, list);
#pragma omp for schedule(guided, 1)
        for (int64_t first = 0; first < count; first += BLOCK)
            ups(p, x, x_stride, first, least(first + BLOCK, count), count, list, factors, kept);
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
                whole_rows(p, first, least(first + BLOCK, columns), h, h_stride, sums,
                           sums_stride(columns));
            finish(p, sums, 1);
        }
    }
    free(work);
    return 0;
}

/* catsparse::packed_linear: y = w_gate x, of all rows. Of Problem it takes what this needs, rows as
 * neurons and columns. 0, or 1 if there is no memory for the work space. */
int catsparse_packed_linear(const Problem *p) {
    int64_t tokens = p->tokens, rows = p->neurons;
    int laid_out = lies_laid_out(p);
    int64_t x_stride = round_up(p->hidden, laid_out ? CHUNK_INPUTS : LANES);
    size_t x_size = (size_t)(tokens * x_stride), laid_size = laid_out ? x_size : 0;
    size_t y_size = (size_t)(tokens * sums_stride(rows));
    size_t bytes = (x_size + laid_size + y_size) * sizeof(float);
    char *work = aligned_alloc(LINE, (size_t)round_up((int64_t)bytes, LINE));
    if (!work) return 1;
    float *x = (float *)work, *laid = x + x_size, *sums = laid + laid_size;
    if (laid_out) memset(x, 0, x_size * sizeof *x);
    dtypes[p->dtype].widen(p, x, x_stride);
    for (int64_t t = 0; laid_out && t < tokens; t++)
        lay_out(x + t * x_stride, x_stride, 4, in_digits(p), laid + t * x_stride);
    if (laid_out) x = laid;
#pragma omp parallel num_threads(p->threads)
    {
#pragma omp for schedule(guided, 1)
        for (int64_t first = 0; first < rows; first += BLOCK) {
            float sum[BLOCK][MAX_TOKENS];
            int64_t last = least(first + BLOCK, rows);
            format_of(p)->dots(&p->gate, NULL, first, last, rows, x, x_stride, p->hidden, tokens,
                               sum);
            for (int64_t i = first; i < last; i++)
                for (int64_t t = 0; t < tokens; t++)
                    sums[t * sums_stride(rows) + i] = sum[i - first][t];
        }
        finish(p, sums, 1);
    }
    free(work);
    return 0;
}

/* catsparse::sparse_linear: y = sum over kept j of (x_j - mean_j) w_down[j] + bias, j kept iff
 * |x_j| > threshold. Of Problem it takes what these are, inputs as neurons, down [neurons,
 * columns]. 0, or 1 if there is no memory for the work space. */
int catsparse_sparse_linear(const Problem *p) {
    int64_t tokens = p->tokens, inputs = p->neurons, count = 0;
    int64_t x_stride = round_up(inputs, LANES);
    size_t x_size = (size_t)(tokens * x_stride), factors_size = (size_t)(tokens * inputs);
    size_t y_size = (size_t)(segments_of(tokens) * tokens * sums_stride(p->columns));
    size_t bytes = (x_size + factors_size + y_size) * sizeof(float) + (size_t)inputs * 5;
    const float *scale = p->weights == INT4 ? NULL : p->down.scale;
    char *work = aligned_alloc(LINE, (size_t)round_up((int64_t)bytes, LINE));
    if (!work) return 1;
    float *x = (float *)work, *sums = x + x_size, *factors = sums + y_size;
    int32_t *list = (int32_t *)(factors + factors_size);
    uint8_t *kept = (uint8_t *)(list + inputs);
    dtypes[p->dtype].widen(p, x, x_stride);
    for (int64_t j = 0; j < inputs; j++) {
        float threshold = p->threshold[j * p->threshold_stride], mean = p->mean ? p->mean[j] : 0.0f;
        kept[j] = 0;
        for (int64_t t = 0; t < tokens; t++) {
            float value = x[t * x_stride + j];
            int keep = fabsf(value) > threshold;
            kept[j] |= (uint8_t)keep;
            factors[j * tokens + t] = !keep ? 0.0f : scale ? (value - mean) * scale[j] : value - mean;
        }
    }
    count = list_kept(kept, inputs, list);
#pragma omp parallel num_threads(p->threads)
    add_rows(p, factors, list, count, sums);
    free(work);
    return 0;
}
