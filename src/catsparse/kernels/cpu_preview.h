/* Dots with a preview: W_gate or W_up in 4 or 8 bits, groups of 64 inputs to a scale (preview.py).
 *
 * A weight is scale * (n - 2^(bits - 1)). 8 bits: byte j of a group is input j. 4 bits: the low
 * half of byte j is input j, the high half input j + 32. A row is read in chunks of one vector;
 * field k of each word or byte of it, 4 or 8 bits, meets vector k of the chunk's inputs, which are
 * laid out in that order beforehand: no byte moves from its lane. Runs of 64 bytes have changed
 * places within whole blocks of four: run i of row r lies at i XOR r mod 4.
 */
#ifndef CATSPARSE_CPU_PREVIEW_H
#define CATSPARSE_CPU_PREVIEW_H

#include <math.h>

#include "cpu_vectors.h"

#define PREVIEW_GROUP 64
#define SCALE_GROUPS 8 /* rows of scales are padded to whole pieces of so many */
/* Inputs of the widest chunk: what x is padded to. */
#define CHUNK_INPUTS 128
#define CHUNK (4 * LANES) /* bytes */
#define RUN 64            /* bytes */
#define RUNS_OF_BLOCK 4

/* Bytes of a row whose runs have changed places. */
static inline int64_t swapped_bytes(int64_t bytes) {
    return bytes / (RUN * RUNS_OF_BLOCK) * (RUN * RUNS_OF_BLOCK);
}

static inline words load_words(const uint8_t *p, int64_t bytes) {
    words value = {0};
    memcpy(&value, p, bytes == sizeof value ? sizeof value : (size_t)bytes);
    return value;
}

/* n - 2^(bits - 1) of field k. */
static inline floats field(words n, int bits, int k) {
#if LANES == 16
    const floats steps = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    if (bits == 4) /* a look-up takes its index from the low 4 bits, whatever is above them */
        return (floats)_mm512_permutexvar_ps((__m512i)(n >> 4 * k), (__m512)steps);
#endif
    /* Its bits go into the mantissa of a float in which their place is worth 1, so that few shifts
     * and no conversion are needed. */
    int fit = 23 / bits, place = k % fit * bits;
    uint32_t mask = ((1u << bits) - 1) << place, base = (uint32_t)(127 + 23 - place) << 23;
    if (k >= fit) n >>= fit * bits;
    return (floats)((n & mask) | base) - (from_bits(base) + (float)(1 << (bits - 1)));
}

/* What the sums of a chunk are worth, the scale of its first group being at p. */
static inline floats load_scale(const uint16_t *p, int bits) {
    const words none = {0};
#if LANES == 16
    if (bits == 4) { /* two groups a chunk; the last may be padding */
        const words shift = {16, 16, 16, 16, 16, 16, 16, 16};
        uint32_t two;
        memcpy(&two, p, sizeof two);
        return (floats)((none + two) << shift & 0xffff0000);
    }
#endif
    return (floats)(none + ((uint32_t)*p << 16));
}

/* As DEFINE_DOT of cpu.c: rows of so many bytes and their scales, x as lay_out() leaves it. Byte j
 * of row r lies at j ^ swap[r], as long as its runs have changed places. */
#define DOT_ARGUMENTS                                                                              \
    const uint8_t *const *row, const uint8_t *const *next, const uint16_t *const *scale,           \
        const int64_t *swap, const float *x, int64_t x_stride, int64_t bytes,                      \
        float (*out)[MAX_TOKENS]
#define LOAD_ROWS(N, J)                                                                            \
    UNROLL for (int r = 0; r < ROWS; r++) {                                                        \
        FETCH(next[r] + (J));                                                                      \
        const uint8_t *at = row[r] + ((J) < swapped ? (J) ^ swap[r] : (J));                        \
        N[r] = (J) + CHUNK <= bytes ? load_words(at, CHUNK) : load_words(at, bytes - (J));         \
    }
#define FINISH(COUNT)                                                                              \
    UNROLL for (int r = 0; r < ROWS; r++)                                                          \
        UNROLL for (int t = 0; t < COUNT; t++) out[r][t] = total(sum[r][t]);

#define DEFINE_PREVIEW_DOT(NAME, BITS, COUNT)                                                      \
    static void NAME(DOT_ARGUMENTS) {                                                              \
        floats sum[ROWS][COUNT] = {{{0}}};                                                         \
        int64_t swapped = swapped_bytes(bytes);                                                    \
        for (int64_t j = 0; j < bytes; j += CHUNK, x += 32 / BITS * LANES) {                       \
            words n[ROWS];                                                                         \
            floats part[ROWS][COUNT] = {{{0}}};                                                    \
            LOAD_ROWS(n, j)                                                                        \
            _Pragma("GCC unroll 8") for (int k = 0; k < 32 / BITS; k++) {                          \
                floats w[ROWS];                                                                    \
                UNROLL for (int r = 0; r < ROWS; r++) w[r] = field(n[r], BITS, k);                 \
                UNROLL for (int t = 0; t < COUNT; t++) {                                           \
                    floats value = load_f32(x + t * x_stride + k * LANES, LANES);                  \
                    UNROLL for (int r = 0; r < ROWS; r++) part[r][t] += w[r] * value;              \
                }                                                                                  \
            }                                                                                      \
            UNROLL for (int r = 0; r < ROWS; r++) {                                                \
                floats worth = load_scale(scale[r] + j / (PREVIEW_GROUP * BITS / 8), BITS);        \
                UNROLL for (int t = 0; t < COUNT; t++) sum[r][t] += part[r][t] * worth;            \
            }                                                                                      \
        }                                                                                          \
        FINISH(COUNT)                                                                              \
    }
DEFINE_PREVIEW_DOT(preview_4_dot_one, 4, 1)
DEFINE_PREVIEW_DOT(preview_4_dot_group, 4, GROUP)
DEFINE_PREVIEW_DOT(preview_8_dot_one, 8, 1)
DEFINE_PREVIEW_DOT(preview_8_dot_group, 8, GROUP)

/* Where the machine multiplies bytes and adds them in whole numbers, half-precision x is fixed
 * point: 15 bits and a sign times a power of two for each group of 64 inputs, in two digits of 8
 * bits. Sums over a group are exact. An infinity has a digit 1 of infinite worth, NaN makes NaN. */
#if defined(__AVX512VNNI__) && LANES == 16
#define HAS_DIGITS 1
#define NUMBER_BITS 14 /* the largest of a group has so many, less a half */

static inline float power_of_two(int n) { return from_bits((uint32_t)(n + 127) << 23); }

/* A group of x as numbers; returns what 1 is worth. */
static float to_numbers(const float *x, int32_t *numbers) {
    const uint32_t infinity = 0x7f800000;
    uint32_t most = 0; /* a magnitude's bits; NaN's are the largest */
    for (int j = 0; j < PREVIEW_GROUP; j++) {
        uint32_t size = to_bits(x[j]) & 0x7fffffff;
        most = most < size ? size : most;
    }
    if (most >= infinity) {
        for (int j = 0; j < PREVIEW_GROUP; j++)
            numbers[j] = (x[j] == INFINITY) - (x[j] == -INFINITY);
        return INFINITY;
    }
    int exponent = (int)(most >> 23) - 126;
    int small = from_bits(most) < 1e-30f;
    float per_unit = small ? 0.0f : power_of_two(NUMBER_BITS - exponent);
    for (int j = 0; j < PREVIEW_GROUP; j++) {
        float number = x[j] * per_unit;
        numbers[j] = (int32_t)(number + (number < 0.0f ? -0.5f : 0.5f));
    }
    return small ? 0.0f : power_of_two(exponent - NUMBER_BITS);
}

/* The inputs of a run, by field, as digits; of the lanes of dots what a sum is worth, and what
 * n - 2^(bits - 1) takes from that of n. No larger than the inputs as floats. */
#define DEFINE_DIGITS(BITS)                                                                        \
    typedef struct {                                                                               \
        int8_t high[8 / BITS][RUN], low[8 / BITS][RUN];                                            \
        float unit[LANES];                                                                         \
        int32_t offset[LANES];                                                                     \
    } digits_##BITS;                                                                               \
    static void lay_out_digits_##BITS(const float *x, int64_t n, void *out) {                      \
        enum { SIZE = PREVIEW_GROUP * BITS / 8 }; /* bytes of a group */                           \
        digits_##BITS *run = out;                                                                  \
        for (int64_t first = 0; first < n; first += RUN * 8 / BITS, run++)                         \
            for (int group = 0; group < RUN / SIZE; group++) {                                     \
                int32_t numbers[PREVIEW_GROUP];                                                    \
                float unit = to_numbers(x + first + group * PREVIEW_GROUP, numbers);               \
                for (int k = 0; k < 8 / BITS; k++)                                                 \
                    for (int j = 0; j < SIZE; j++) {                                               \
                        int32_t number = numbers[k * SIZE + j];                                    \
                        run->low[k][group * SIZE + j] = (int8_t)number;                            \
                        run->high[k][group * SIZE + j] = (int8_t)((number + 128) >> 8);            \
                    }                                                                              \
                for (int lane = 0; lane < SIZE / 4; lane++) {                                      \
                    int32_t sum = 0;                                                               \
                    for (int k = 0; k < 8 / BITS; k++)                                             \
                        for (int j = 0; j < 4; j++) sum += numbers[k * SIZE + lane * 4 + j];       \
                    run->unit[group * SIZE / 4 + lane] = unit;                                     \
                    run->offset[group * SIZE / 4 + lane] = -(sum * (1 << (BITS - 1)));             \
                }                                                                                  \
            }                                                                                      \
    }
DEFINE_DIGITS(4)
DEFINE_DIGITS(8)

static inline ints add_products(ints sum, words n, const int8_t *digits) {
    return (ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)n, _mm512_loadu_si512(digits));
}
static inline ints load_ints(const int32_t *p) { return (ints)_mm512_loadu_si512(p); }

#define DEFINE_DIGITS_DOT(NAME, BITS, COUNT)                                                       \
    static void NAME(DOT_ARGUMENTS) {                                                              \
        floats sum[ROWS][COUNT] = {{{0}}};                                                         \
        int64_t swapped = swapped_bytes(bytes);                                                    \
        const digits_##BITS *run = (const void *)x;                                                \
        for (int64_t j = 0; j < bytes; j += RUN, run++) {                                          \
            words n[ROWS];                                                                         \
            LOAD_ROWS(n, j)                                                                        \
            UNROLL for (int r = 0; r < ROWS; r++) {                                                \
                words fields[2] = {BITS == 4 ? n[r] & 0x0f0f0f0f : n[r], n[r] >> 4 & 0x0f0f0f0f};  \
                floats worth = load_scale(scale[r] + j / (PREVIEW_GROUP * BITS / 8), BITS);        \
                UNROLL for (int t = 0; t < COUNT; t++) {                                           \
                    const digits_##BITS *here = (const void *)((const float *)run + t * x_stride); \
                    ints high = {0}, low = load_ints(here->offset);                                \
                    UNROLL for (int k = 0; k < 8 / BITS; k++) {                                    \
                        high = add_products(high, fields[k], here->high[k]);                       \
                        low = add_products(low, fields[k], here->low[k]);                          \
                    }                                                                              \
                    floats number = (floats)_mm512_cvtepi32_ps((__m512i)((high << 8) + low));      \
                    sum[r][t] += number * (worth * load_f32(here->unit, LANES));                   \
                }                                                                                  \
            }                                                                                      \
        }                                                                                          \
        FINISH(COUNT)                                                                              \
    }
DEFINE_DIGITS_DOT(digits_4_dot_one, 4, 1)
DEFINE_DIGITS_DOT(digits_4_dot_group, 4, GROUP)
DEFINE_DIGITS_DOT(digits_8_dot_one, 8, 1)
DEFINE_DIGITS_DOT(digits_8_dot_group, 8, GROUP)
#else
#define HAS_DIGITS 0
#endif

/* [whether x is in digits][whether 8 bits][whether GROUP tokens] */
static void (*const preview_dot[][2][2])(DOT_ARGUMENTS) = {
    {{preview_4_dot_one, preview_4_dot_group}, {preview_8_dot_one, preview_8_dot_group}},
#if HAS_DIGITS
    {{digits_4_dot_one, digits_4_dot_group}, {digits_8_dot_one, digits_8_dot_group}},
#endif
};

/* One token's n inputs (whole widest chunks) in the order in which the dots read them. */
static void lay_out(const float *x, int64_t n, int32_t bits, int digits, float *out) {
#if HAS_DIGITS
    if (digits) {
        if (bits == 4) lay_out_digits_4(x, n, out);
        else lay_out_digits_8(x, n, out);
        return;
    }
#endif
    for (int64_t chunk = 0; chunk < n * bits / 8; chunk += CHUNK)
        for (int k = 0; k < 32 / bits; k++)
            for (int64_t word = chunk; word < chunk + CHUNK; word += 4) {
                int64_t byte = word + k * bits / 8;
                *out++ = x[bits == 4 ? byte + (byte & ~31) + k % 2 * 32 : byte];
            }
}

/* Dots of x ([tokens][x_stride], laid out) with rows base + list[first..last) of a preview (without
 * a list base + first..last), n inputs each, out of `rows`. */
static void preview_dots(const uint8_t *preview, const uint16_t *scales, int32_t bits, int digits,
                         int64_t base, const int32_t *list, int64_t first, int64_t last,
                         int64_t rows, const float *x, int64_t x_stride, int64_t n, int64_t tokens,
                         float (*out)[MAX_TOKENS]) {
    int64_t groups = round_up(n, PREVIEW_GROUP) / PREVIEW_GROUP;
    int64_t bytes = groups * PREVIEW_GROUP * bits / 8;
    int64_t scale_stride = round_up(groups, SCALE_GROUPS);
    for (int64_t i = first; i < last; i += ROWS, out += ROWS) {
        const uint8_t *row[ROWS], *next[ROWS];
        const uint16_t *scale[ROWS];
        int64_t swap[ROWS];
        float sums[ROWS][MAX_TOKENS], (*sum)[MAX_TOKENS] = i + ROWS <= last ? out : sums;
        for (int r = 0; r < ROWS; r++) {
            int64_t here = least(i + r, last - 1), ahead = least(i + ROWS + r, rows - 1);
            here = base + (list ? list[here] : here), ahead = base + (list ? list[ahead] : ahead);
            row[r] = preview + here * bytes;
            swap[r] = here % RUNS_OF_BLOCK * RUN;
            next[r] = preview + ahead * bytes;
            scale[r] = scales + here * scale_stride;
        }
        for (int64_t t = 0; t < tokens;) {
            int group = t + GROUP <= tokens;
            preview_dot[digits][bits == 8][group](row, next, scale, swap, x + t * x_stride,
                                                  x_stride, bytes,
                                                  (float(*)[MAX_TOKENS])(sum[0] + t));
            t += group ? GROUP : 1;
        }
        if (sum == sums) memcpy(out, sums, (size_t)(last - i) * sizeof *out);
    }
}

#endif
