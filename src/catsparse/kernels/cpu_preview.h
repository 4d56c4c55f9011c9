/* Dots with the gate preview: W_gate in 4 or 8 bits, groups of 64 inputs to a scale (preview.py).
 *
 * A weight is scale * (n - 2^(bits - 1)). 8 bits: byte j of a group is input j. 4 bits: the low
 * half of byte j is input j, the high half input j + 32. A row is read in chunks of one vector of
 * 32-bit words; field k of each word, 4 or 8 of its bits, meets vector k of the chunk's inputs,
 * which are laid out in that order beforehand: no byte moves from its lane.
 */
#ifndef CATSPARSE_CPU_PREVIEW_H
#define CATSPARSE_CPU_PREVIEW_H

#include "cpu_vectors.h"

#define PREVIEW_GROUP 64
#define SCALE_GROUPS 8 /* rows of scales are padded to whole pieces of so many */
/* Inputs of the widest chunk: what x is padded to. */
#define CHUNK_INPUTS 128
#define CHUNK (4 * LANES) /* bytes */

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

static inline floats multiply_add(floats sum, floats w, floats value) { return sum + w * value; }

/* Where the machine multiplies pairs of bfloat16 and adds them in float, bfloat16 x is left as it
 * is: weights but for their scale are exact in bfloat16 too. Subnormal x is 0 there. */
#if defined(__AVX512BF16__) && LANES == 16
#define HAS_PAIRS 1
#define TWICE(...) {__VA_ARGS__, __VA_ARGS__} /* an index has 5 bits, the highest of them foreign */

/* n - 8 of field k, 4 bits of each 16-bit word; 8 bits: n - 128 is the sum of its two halves'. */
static inline floats field_pairs(words n, int bits, int k) {
    typedef uint16_t table __attribute__((vector_size(64)));
    /* -8 to 7; 0 to 15; -128 to 112 in steps of 16 */
    const table steps = TWICE(0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
                              0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0);
    const table low = TWICE(0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
                            0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170);
    const table high = TWICE(0xc300, 0xc2e0, 0xc2c0, 0xc2a0, 0xc280, 0xc240, 0xc200, 0xc180,
                             0, 0x4180, 0x4200, 0x4240, 0x4280, 0x42a0, 0x42c0, 0x42e0);
    table index = (table)n >> 4 * k;
    return (floats)_mm512_permutexvar_epi16(
        (__m512i)index, (__m512i)(bits == 4 ? steps : k % 2 ? high : low));
}
static inline floats multiply_add_pairs(floats sum, floats w, floats value) {
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)value);
}
#else
#define HAS_PAIRS 0
#endif

/* As DEFINE_DOT of cpu.c: rows of so many bytes and their scales, x as lay_out() leaves it. */
#define DEFINE_PREVIEW_DOT(NAME, BITS, COUNT, FIELDS, FIELD, ADD)                                  \
    static void NAME(const uint8_t *const *row, const uint8_t *const *next,                        \
                     const uint16_t *const *scale, const float *x, int64_t x_stride,               \
                     int64_t bytes, float (*out)[MAX_TOKENS]) {                                    \
        floats sum[ROWS][COUNT] = {{{0}}};                                                         \
        for (int64_t j = 0; j < bytes; j += CHUNK, x += FIELDS * LANES) {                          \
            words n[ROWS];                                                                         \
            floats part[ROWS][COUNT] = {{{0}}};                                                    \
            UNROLL for (int r = 0; r < ROWS; r++) {                                                \
                FETCH(next[r] + j);                                                                \
                n[r] = j + CHUNK <= bytes ? load_words(row[r] + j, CHUNK)                          \
                                          : load_words(row[r] + j, bytes - j);                     \
            }                                                                                      \
            _Pragma("GCC unroll 8") for (int k = 0; k < FIELDS; k++) {                             \
                floats w[ROWS];                                                                    \
                UNROLL for (int r = 0; r < ROWS; r++) w[r] = FIELD(n[r], BITS, k);                 \
                UNROLL for (int t = 0; t < COUNT; t++) {                                           \
                    floats value = load_f32(x + t * x_stride + k * LANES, LANES);                  \
                    UNROLL for (int r = 0; r < ROWS; r++)                                          \
                        part[r][t] = ADD(part[r][t], w[r], value);                                 \
                }                                                                                  \
            }                                                                                      \
            UNROLL for (int r = 0; r < ROWS; r++) {                                                \
                floats worth = load_scale(scale[r] + j / (PREVIEW_GROUP * BITS / 8), BITS);        \
                UNROLL for (int t = 0; t < COUNT; t++) sum[r][t] += part[r][t] * worth;            \
            }                                                                                      \
        }                                                                                          \
        UNROLL for (int r = 0; r < ROWS; r++)                                                      \
            UNROLL for (int t = 0; t < COUNT; t++) out[r][t] = total(sum[r][t]);                   \
    }
#define DEFINE_PREVIEW_DOTS(NAME, BITS, FIELDS, FIELD, ADD)                                        \
    DEFINE_PREVIEW_DOT(NAME##_dot_one, BITS, 1, FIELDS, FIELD, ADD)                                \
    DEFINE_PREVIEW_DOT(NAME##_dot_group, BITS, GROUP, FIELDS, FIELD, ADD)

DEFINE_PREVIEW_DOTS(preview_4, 4, 8, field, multiply_add)
DEFINE_PREVIEW_DOTS(preview_8, 8, 4, field, multiply_add)
#if HAS_PAIRS
DEFINE_PREVIEW_DOTS(pairs_4, 4, 4, field_pairs, multiply_add_pairs)
DEFINE_PREVIEW_DOTS(pairs_8, 8, 4, field_pairs, multiply_add_pairs)
#endif

/* [whether x is in pairs][whether 8 bits][whether GROUP tokens] */
static void (*const preview_dot[][2][2])(const uint8_t *const *, const uint8_t *const *,
                                         const uint16_t *const *, const float *, int64_t, int64_t,
                                         float (*)[MAX_TOKENS]) = {
    {{preview_4_dot_one, preview_4_dot_group}, {preview_8_dot_one, preview_8_dot_group}},
#if HAS_PAIRS
    {{pairs_4_dot_one, pairs_4_dot_group}, {pairs_8_dot_one, pairs_8_dot_group}},
#endif
};

/* One token's n inputs (whole widest chunks) in the order in which the dots read them. */
static void lay_out(const float *x, int64_t n, int32_t bits, int pairs, float *out) {
    int step = pairs ? 2 : 4; /* bytes of a word */
    uint16_t *pair = (uint16_t *)out;
    for (int64_t chunk = 0; chunk < n * bits / 8; chunk += CHUNK)
        for (int k = 0; k < (pairs ? 4 : 32 / bits); k++)
            for (int64_t word = chunk; word < chunk + CHUNK; word += step) {
                int64_t byte = word + (pairs ? k / 2 : k * bits / 8);
                float value = x[bits == 4 ? byte + (byte & ~31) + k % 2 * 32 : byte];
                if (pairs)
                    *pair++ = (uint16_t)(to_bits(value) >> 16);
                else
                    *out++ = value;
            }
}

/* Dots of x ([tokens][x_stride], laid out) with the previews of neurons first..last out of
 * `neurons`, n inputs each. */
static void preview_dots(const uint8_t *preview, const uint16_t *scales, int32_t bits, int pairs,
                         int64_t first, int64_t last, int64_t neurons, const float *x,
                         int64_t x_stride, int64_t n, int64_t tokens, float (*out)[MAX_TOKENS]) {
    int64_t groups = round_up(n, PREVIEW_GROUP) / PREVIEW_GROUP;
    int64_t bytes = groups * PREVIEW_GROUP * bits / 8;
    int64_t scale_stride = round_up(groups, SCALE_GROUPS);
    for (int64_t i = first; i < last; i += ROWS, out += ROWS) {
        const uint8_t *row[ROWS], *next[ROWS];
        const uint16_t *scale[ROWS];
        float sums[ROWS][MAX_TOKENS], (*sum)[MAX_TOKENS] = i + ROWS <= last ? out : sums;
        for (int r = 0; r < ROWS; r++) {
            int64_t here = least(i + r, last - 1), ahead = least(i + ROWS + r, neurons - 1);
            row[r] = preview + here * bytes;
            next[r] = preview + ahead * bytes;
            scale[r] = scales + here * scale_stride;
        }
        for (int64_t t = 0; t < tokens;) {
            int group = t + GROUP <= tokens;
            preview_dot[pairs][bits == 8][group](row, next, scale, x + t * x_stride, x_stride,
                                                 bytes, (float(*)[MAX_TOKENS])(sum[0] + t));
            t += group ? GROUP : 1;
        }
        if (sum == sums) memcpy(out, sums, (size_t)(last - i) * sizeof *out);
    }
}

#endif
