/* Rows of weights of every format: their dots with x, and sums of them. */
#ifndef CATSPARSE_CPU_WEIGHTS_H
#define CATSPARSE_CPU_WEIGHTS_H

#include "cpu_preview.h"
#include "cpu_vectors.h"

/* Formats (formats.py); those of floats are numbered as dtypes are. */
enum { F32 = 0, BF16 = 1, F16 = 2, INT8 = 3, FP8 = 4, INT4 = 5 };

/* A matrix of rows. */
typedef struct {
    const void *data, *scale; /* scale: a float a row, of int4 a row of bf16s, of floats NULL */
    int64_t stride;           /* elements, of int4 bytes, from one row to the next */
} Matrix;

static const float none[MAX_TOKENS] = {0};

/* The dots of ROWS rows with COUNT tokens (x: [COUNT][x_stride], zeros after n), out[row][token].
 * `next` are the rows wanted after these. */
#define DEFINE_DOT(NAME, TYPE, LOAD, COUNT)                                                        \
    __attribute__((noinline)) static void NAME(const TYPE *const *row, const TYPE *const *next, const float *x,              \
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

#define DEFINE_WEIGHTS(NAME, TYPE, LOAD)                                                           \
    DEFINE_DOT(NAME##_dot_one, TYPE, LOAD, 1)                                                      \
    DEFINE_DOT(NAME##_dot_group, TYPE, LOAD, GROUP)                                                \
    /* Dots of x with rows list[first..last) of m (first..last without a list) out of `total`. */  \
    static void NAME##_dots(const Matrix *m, const int32_t *list, int64_t first, int64_t last,     \
                            int64_t total, const float *x, int64_t x_stride, int64_t n,            \
                            int64_t tokens, float (*out)[MAX_TOKENS]) {                            \
        const TYPE *w = m->data;                                                                   \
        const float *scale = m->scale;                                                             \
        for (int64_t c = first; c < last; c += ROWS, out += ROWS) {                                \
            const TYPE *row[ROWS], *next[ROWS];                                                    \
            float sums[ROWS][MAX_TOKENS], (*sum)[MAX_TOKENS] = c + ROWS <= last ? out : sums;      \
            for (int r = 0; r < ROWS; r++) {                                                       \
                int64_t here = least(c + r, last - 1), ahead = least(c + ROWS + r, total - 1);     \
                row[r] = w + (list ? list[here] : here) * m->stride;                               \
                next[r] = w + (list ? list[ahead] : ahead) * m->stride;                            \
            }                                                                                      \
            int64_t t = 0;                                                                         \
            for (; t + GROUP <= tokens; t += GROUP)                                                \
                NAME##_dot_group(row, next, x + t * x_stride, x_stride, n,                         \
                                 (float(*)[MAX_TOKENS])(sum[0] + t));                              \
            for (; t < tokens; t++)                                                                \
                NAME##_dot_one(row, next, x + t * x_stride, x_stride, n,                           \
                               (float(*)[MAX_TOKENS])(sum[0] + t));                                \
            for (int r = 0; scale && r < ROWS && c + r < last; r++)                                \
                for (t = 0; t < tokens; t++) sum[r][t] *= scale[list ? list[c + r] : c + r];       \
            if (sum == sums) memcpy(out, sums, (size_t)(last - c) * sizeof *out);                  \
        }                                                                                          \
    }                                                                                              \
    /* Columns first..first+width of rows list[from..to) of count, times their factors             \
     * ([rows][tokens], with the rows' scales in them), added to floats y. */                      \
    static void NAME##_columns(const Matrix *m, int64_t first, int64_t width,                      \
                               const float *factors, const int32_t *list, int64_t from,            \
                               int64_t to, int64_t count, int64_t tokens, float *y,                \
                               int64_t y_stride) {                                                 \
        const TYPE *base = (const TYPE *)m->data + first;                                          \
        for (int64_t c = from; c < to; c += ROWS) {                                                \
            const TYPE *row[ROWS], *next[ROWS];                                                    \
            const float *factor[ROWS];                                                             \
            for (int r = 0; r < ROWS; r++) {                                                       \
                int64_t here = list[least(c + r, to - 1)];                                         \
                row[r] = base + here * m->stride;                                                  \
                next[r] = base + list[least(c + ROWS + r, count - 1)] * m->stride;                 \
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
    }

DEFINE_WEIGHTS(f32, float, load_f32)
DEFINE_WEIGHTS(bf16, uint16_t, load_bf16)
DEFINE_WEIGHTS(f16, uint16_t, load_f16)
DEFINE_WEIGHTS(int8, uint8_t, load_int8)
DEFINE_WEIGHTS(fp8, uint8_t, load_fp8)

/* int4: rows packed as a preview's; x laid out as for one, in digits or not. */
static void int4_dots(const Matrix *m, const int32_t *list, int64_t first, int64_t last,
                      int64_t total, const float *x, int64_t x_stride, int64_t n, int64_t tokens,
                      float (*out)[MAX_TOKENS]) {
    preview_dots(m->data, m->scale, 4, 0, 0, list, first, last, total, x, x_stride, n, tokens, out);
}
static void int4_digits_dots(const Matrix *m, const int32_t *list, int64_t first, int64_t last,
                             int64_t total, const float *x, int64_t x_stride, int64_t n,
                             int64_t tokens, float (*out)[MAX_TOKENS]) {
    preview_dots(m->data, m->scale, 4, HAS_DIGITS, 0, list, first, last, total, x, x_stride, n,
                 tokens, out);
}
static void int4_columns(const Matrix *m, int64_t first, int64_t width, const float *factors,
                         const int32_t *list, int64_t from, int64_t to, int64_t count,
                         int64_t tokens, float *y, int64_t y_stride) {
    int64_t swapped = swapped_bytes(m->stride);
    int64_t scale_stride = round_up(m->stride / (PREVIEW_GROUP / 2), SCALE_GROUPS);
    for (int64_t c = from; c < to; c += ROWS) {
        const uint8_t *row[ROWS], *next[ROWS];
        const uint16_t *scale[ROWS];
        const float *factor[ROWS];
        int64_t swap[ROWS];
        for (int r = 0; r < ROWS; r++) {
            int64_t here = list[least(c + r, to - 1)];
            row[r] = (const uint8_t *)m->data + here * m->stride;
            next[r] = (const uint8_t *)m->data + list[least(c + ROWS + r, count - 1)] * m->stride;
            scale[r] = (const uint16_t *)m->scale + here * scale_stride;
            swap[r] = here % RUNS_OF_BLOCK * RUN;
            factor[r] = c + r < to ? factors + here * tokens : none;
        }
        /* Whole groups: tiles of columns are, and so are int4's rows. */
        for (int64_t at = first; at < first + width; at += PREVIEW_GROUP) {
            int64_t j = at / 2;
            float worth[ROWS];
            const uint8_t *group[ROWS];
            UNROLL for (int r = 0; r < ROWS; r++) {
                FETCH(next[r] + j);
                group[r] = row[r] + (j < swapped ? j ^ swap[r] : j);
                worth[r] = from_bits((uint32_t)scale[r][at / PREVIEW_GROUP] << 16);
            }
            for (int64_t k = 0; k < PREVIEW_GROUP / 2; k += LANES) {
                floats low[ROWS], high[ROWS];
                UNROLL for (int r = 0; r < ROWS; r++) {
                    words n = widen_bytes(load_bytes(group[r] + k, LANES));
                    low[r] = number(n & 15, 8.0f) * worth[r];
                    high[r] = number(n >> 4, 8.0f) * worth[r];
                }
                for (int64_t t = 0; t < tokens; t++) {
                    float *to_low = y + t * y_stride + at + k, *to_high = to_low + PREVIEW_GROUP / 2;
                    floats a = load_f32(to_low, LANES), b = load_f32(to_high, LANES);
                    UNROLL for (int r = 0; r < ROWS; r++)
                        a += low[r] * factor[r][t], b += high[r] * factor[r][t];
                    memcpy(to_low, &a, sizeof a);
                    memcpy(to_high, &b, sizeof b);
                }
            }
        }
    }
}

typedef struct {
    void (*dots)(const Matrix *, const int32_t *, int64_t, int64_t, int64_t, const float *, int64_t,
                 int64_t, int64_t, float (*)[MAX_TOKENS]);
    void (*columns)(const Matrix *, int64_t, int64_t, const float *, const int32_t *, int64_t,
                    int64_t, int64_t, int64_t, float *, int64_t);
} Format;
/* The last one for x in digits. */
static const Format formats[] = {
    {f32_dots, f32_columns},   {bf16_dots, bf16_columns}, {f16_dots, f16_columns},
    {int8_dots, int8_columns}, {fp8_dots, fp8_columns},   {int4_dots, int4_columns},
    {int4_digits_dots, int4_columns},
};

#endif
