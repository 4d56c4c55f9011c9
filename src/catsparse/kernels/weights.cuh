/* Weights as the streaming kernels read them: floats of x's dtype, or packed (formats.py). A piece of
 * x or of the output, 16 bytes or VEC elements, meets as many weights, and the consumer that owns the
 * one owns the others. Which columns these are is for the packing to choose: of int4 half of them lie
 * in the low halves of a word's bytes, and half, 32 columns further on, in the high ones.
 *
 * Products with int8 are of whole numbers: a piece of x is fixed point, 15 bits and a sign, 23 for
 * floats, times a power of two, in digits of 8 bits. Those with int4 are in preview.cuh. A row's
 * scale is the caller's business, as is a group's.
 *
 * Stands between numbers.cuh and stream.cuh, and needs this constant:
 *   WEIGHT   0 floats as x, 1 int8, 2 fp8 (e4m3), 3 int4 in groups of 64
 */

#define GROUP 64
#if WEIGHT == 0
#define WEIGHT_BITS (8 * SIZE)
#elif WEIGHT == 3
#define WEIGHT_BITS 4
#else
#define WEIGHT_BITS 8
#endif
#define ROW_SCALES (WEIGHT == 1 || WEIGHT == 2)
#define PIECE_BYTES (VEC * WEIGHT_BITS / 8)
#define PIECE_WORDS ((PIECE_BYTES + 3) / 4)

#define DIGITS (DTYPE == 2 ? 3 : 2)
#define NUMBER_BITS (DTYPE == 2 ? 22 : 14) /* the largest number has so many, less a half */

DEVICE float power_of_two(int n) { return __uint_as_float((u32)(n + 127) << 23); }

/* Bytes of a row, and of its groups' scales. */
DEVICE int packed_bytes(int columns) { return columns * WEIGHT_BITS / 8; }
DEVICE int scale_bytes(int columns) {
    return WEIGHT == 3 ? (columns / GROUP + 7) / 8 * 16 : 0;
}

/* The column of a piece's element. */
DEVICE int column_of(int piece, int e) {
#if WEIGHT == 3
    const int each = GROUP / VEC, half = VEC / 2;
    return piece / each * GROUP + piece % each * half + e + (e < half ? 0 : GROUP / 2 - half);
#else
    return piece * VEC + e;
#endif
}

/* ---- a piece of weights ----------------------------------------------------------------------- */

struct Piece {
    u32 word[PIECE_WORDS];
#if WEIGHT == 3
    float scale;
#endif

    /* Of a row in shared memory, which is number `row` of its matrix; its groups' scales. */
    DEVICE_METHOD void load(const char *from, const char *scales, int piece, int row, int columns) {
        int at = piece * PIECE_BYTES;
#if WEIGHT == 3
        /* Runs of 64 bytes change places, by row, within whole fours. */
        if (at < packed_bytes(columns) / 256 * 256) at ^= row % 4 * 64;
        scale = __uint_as_float((u32)((const unsigned short *)scales)[piece / (GROUP / VEC)] << 16);
#endif
        from += at;
        if constexpr (PIECE_BYTES == 16) {
            uint4 v = *(const uint4 *)from;
            word[0] = v.x, word[1] = v.y, word[2] = v.z, word[3] = v.w;
        } else if constexpr (PIECE_BYTES == 8) {
            uint2 v = *(const uint2 *)from;
            word[0] = v.x, word[1] = v.y;
        } else if constexpr (PIECE_BYTES == 4)
            word[0] = *(const u32 *)from;
        else
            word[0] = *(const unsigned short *)from;
    }

    /* The weights, without scales. */
    DEVICE_METHOD void floats(float (&v)[VEC]) const {
#if WEIGHT == 0
        unpack(make_uint4(word[0], word[1], word[2], word[3]), v);
#elif WEIGHT == 1
        /* Byte n + 128 in the mantissa of 2^23. */
#pragma unroll
        for (int e = 0; e < VEC; e++)
            v[e] = __uint_as_float(__byte_perm(word[e / 4] ^ 0x80808080u, 0x4b000000u,
                                               0x7440 + e % 4)) - 8388736.0f;
#elif WEIGHT == 2
#pragma unroll
        for (int e = 0; e < VEC; e += 2) {
            u32 two;
            unsigned short pair = word[e / 4] >> (e % 4 ? 16 : 0);
            asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(two) : "h"(pair));
            v[e] = half_to_float(two & 0xffffu), v[e + 1] = half_to_float(two >> 16);
        }
#else
        u32 low = word[0] & 0x0f0f0f0fu, high = word[0] >> 4 & 0x0f0f0f0fu;
#pragma unroll
        for (int e = 0; e < VEC; e++) {
            u32 byte = e % (VEC / 2);
            v[e] = __uint_as_float(__byte_perm(e < VEC / 2 ? low : high, 0x4b000000u,
                                               0x7440 + byte)) - 8388616.0f;
        }
#endif
    }
};

/* ---- x, and its products ------------------------------------------------------------------------ */

#if WEIGHT == 1

/* A consumer's piece of x. An infinity has a digit 1 of infinite worth; NaN is worth NaN. */
struct Factor {
    u32 digit[DIGITS][VEC == 8 ? 2 : 1]; /* highest first, a byte a column */
    float unit;

    DEVICE_METHOD void set(const float *x) {
        const float infinity = __uint_as_float(0x7f800000u);
        float most = 0.0f;
#pragma unroll
        for (int e = 0; e < VEC; e++) {
            float size = fabsf(x[e]);
            most = fmaxf(most, size < infinity ? size : infinity);
        }
        int exponent = __float_as_uint(most) >> 23;
        bool small = most < 1e-30f, plain = !small && most < infinity;
        float per_unit = plain ? power_of_two(NUMBER_BITS + 126 - exponent) : 0.0f;
        unit = plain ? power_of_two(exponent - 126 - NUMBER_BITS) : small ? 0.0f : infinity;
#pragma unroll
        for (int d = 0; d < DIGITS; d++)
#pragma unroll
            for (int i = 0; i < (VEC == 8 ? 2 : 1); i++) digit[d][i] = 0;
#pragma unroll
        for (int e = 0; e < VEC; e++) {
            int number = __float2int_rn(x[e] * per_unit);
            if (most == infinity) number = x[e] == infinity ? 1 : x[e] == -infinity ? -1 : 0;
#pragma unroll
            for (int d = DIGITS - 1; d >= 0; d--) {
                digit[d][e / 4] |= (number & 0xff) << 8 * (e % 4);
                number = (number + 128) >> 8;
            }
        }
    }

    DEVICE_METHOD float dot(const Piece &w) const {
        int sum = 0;
#pragma unroll
        for (int d = 0; d < DIGITS; d++) {
            int part = 0;
#pragma unroll
            for (int i = 0; i < PIECE_WORDS; i++)
                asm("dp4a.s32.s32 %0, %1, %2, %0;"
                    : "+r"(part)
                    : "r"(w.word[i]), "r"(digit[d][i]));
            sum = sum * 256 + part;
        }
        return (float)sum * unit;
    }
};

#elif WEIGHT != 3

struct Factor {
    float x[VEC];

    DEVICE_METHOD void set(const float *from) {
#pragma unroll
        for (int e = 0; e < VEC; e++) x[e] = from[e];
    }
};

#endif
