/* Vectors of the CPU kernel: how wide they are, how weights become floats and floats results. */
#ifndef CATSPARSE_CPU_VECTORS_H
#define CATSPARSE_CPU_VECTORS_H

#include <stdint.h>
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

#define MAX_TOKENS 16
/* Rows read side by side: their sums hide each other's latency and share the loads of x. */
#define ROWS 4

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef float fours __attribute__((vector_size(16)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t bytes __attribute__((vector_size(LANES)));

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
static inline floats from_f16(halves value) {
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
static inline floats load_f16(const uint16_t *p, int64_t n) { return from_f16(load_halves(p, n)); }
static inline bytes load_bytes(const uint8_t *p, int64_t n) {
    bytes value = {0};
    memcpy(&value, p, n == LANES ? sizeof value : (size_t)n);
    return value;
}
static inline words widen_bytes(bytes value) {
#if defined(__AVX512F__)
    return (words)_mm512_cvtepu8_epi32((__m128i)value);
#elif defined(__AVX2__)
    return (words)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)&value));
#else
    return __builtin_convertvector(value, words);
#endif
}
/* Whole numbers below 2^23 as floats less `zero`: their bits are a mantissa, no conversion. */
static inline floats number(words n, float zero) {
    return (floats)(n | 0x4b000000) - (8388608.0f + zero);
}
static inline floats load_int8(const uint8_t *p, int64_t n) {
    return number(widen_bytes(load_bytes(p, n)) ^ 0x80, 128.0f);
}
static inline halves widen_to_halves(bytes value) {
#if defined(__AVX512F__)
    return (halves)_mm256_cvtepu8_epi16((__m128i)value);
#elif defined(__AVX2__)
    return (halves)_mm_cvtepu8_epi16(_mm_loadl_epi64((const void *)&value));
#else
    return __builtin_convertvector(value, halves);
#endif
}
/* e4m3's exponent has one bit less than a half's, and a bias of 7 in place of 15. What would be 480
 * is NaN. */
static inline floats load_fp8(const uint8_t *p, int64_t n) {
    halves bits = widen_to_halves(load_bytes(p, n));
    floats value = from_f16((bits << 8 & 0x8000) | (bits << 7 & 0x3f80)) * 256.0f;
    words none = (words)(((words)value & 0x7fffffff) == 0x43f00000);
    return (floats)((words)value | (none & 0x7fc00000));
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

#endif
