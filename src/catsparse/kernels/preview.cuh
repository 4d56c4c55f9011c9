/* A preview's dot products on tensor cores: tiles of 16 rows of a 4- or 8-bit copy of W_gate, or of
 * W_up (preview.py), or of int4 weights, which are packed alike, against the tokens, in whole
 * numbers. A group of 64 inputs of a token is fixed
 * point: 15 bits and a sign, 23 for floats, times a power of two, in digits of 8 bits, each a column
 * of its own; so the sums over a group are exact. A warp owns the same few groups of every tile;
 * lane l has rows l / 4 and l / 4 + 8 of it, and of their sums token l % 4's. Which inputs a step
 * multiplies is for the packing to choose, as both sides of a product may be permuted alike.
 *
 * A stage of the ring holds some of a tile's rows, which are one run of memory, and then their
 * scales: two copies. One a row would take longer to ask for than to fetch.
 *
 * Stands between stream.cuh and a kernel, and needs these constants more:
 *   PREVIEW     bits a weight, 0 for none     ROW_GROUPS  groups of a row
 *   SPLITS      stages of a tile: 1, 2, 4, 8
 */

#if PREVIEW

#define TILE 16
#define GROUPS ((ROW_GROUPS + WARPS - 1) / WARPS) /* of a warp */
#define GROUP_BYTES (GROUP * PREVIEW / 8)
#define ROW_BYTES (ROW_GROUPS * GROUP_BYTES)
#define SCALE_BYTES ((ROW_GROUPS + 7) / 8 * 16)
#define STAGE_ROWS (TILE / SPLITS)
/* Runs of memory that the packing swaps with their neighbours, by row; what is left of whole fours
 * stays in its place. */
#define RUN 64
#define SWAPPED (ROW_BYTES / (4 * RUN) * 4)

#define INPUTS (ROW_GROUPS * GROUP)
#define COLUMN_TILES (DTYPE == 2 ? 2 : 1) /* columns 2 t and 2 t + 1 are token t's */
/* Weights of 4 bits are multiplied in the upper half of a byte. */
#define WEIGHT_UNIT (PREVIEW == 4 ? 0.0625f : 1.0f)

/* The digits of xs: [TOKENS, DIGITS, INPUTS], highest first; what they are worth: [TOKENS,
 * ROW_GROUPS]. An infinity has a digit 1 of infinite worth; NaN is worth NaN. */
DEVICE void to_digits(const float (&xs)[TOKENS][COLUMNS * VEC], signed char *digits, float *units) {
    const float infinity = __uint_as_float(0x7f800000u);
#pragma unroll
    for (int t = 0; t < TOKENS; t++)
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            int at = (threadIdx.x + c * THREADS) * VEC;
            float most = 0.0f;
#pragma unroll
            for (int e = 0; e < VEC; e++) {
                float size = fabsf(xs[t][c * VEC + e]);
                most = fmaxf(most, size < infinity ? size : infinity);
            }
#pragma unroll
            for (int off = 1; off < GROUP / VEC; off *= 2)
                most = fmaxf(most, __shfl_xor_sync(ALL, most, off));
            int exponent = __float_as_uint(most) >> 23;
            bool small = most < 1e-30f, plain = !small && most < infinity;
            float per_unit = plain ? power_of_two(NUMBER_BITS + 126 - exponent) : 0.0f;
            u32 word[DIGITS][VEC / 4] = {};
#pragma unroll
            for (int e = 0; e < VEC; e++) {
                float v = xs[t][c * VEC + e];
                int number = __float2int_rn(v * per_unit);
                if (most == infinity) number = v == infinity ? 1 : v == -infinity ? -1 : 0;
#pragma unroll
                for (int d = DIGITS - 1; d >= 0; d--) {
                    word[d][e / 4] |= (number & 0xff) << 8 * (e % 4);
                    number = (number + 128) >> 8;
                }
            }
            if (at >= INPUTS) continue;
#pragma unroll
            for (int d = 0; d < DIGITS; d++)
#pragma unroll
                for (int w = 0; w < VEC / 4; w++)
                    *(u32 *)(digits + (t * DIGITS + d) * INPUTS + at + 4 * w) = word[d][w];
            if (at % GROUP == 0)
                units[t * ROW_GROUPS + at / GROUP] =
                    plain ? power_of_two(exponent - 126 - NUMBER_BITS) * WEIGHT_UNIT
                    : small ? 0.0f : infinity;
        }
}

/* A warp's part of the digits, as the other side of weights(). */
struct Fragments {
    u32 digit[GROUPS][COLUMN_TILES][4];
    float unit[GROUPS];

    DEVICE_METHOD void load(const signed char *digits, const float *units) {
        int lane = threadIdx.x % 32, warp = threadIdx.x / 32, q = lane % 4;
#pragma unroll
        for (int i = 0; i < GROUPS; i++) {
            int own = warp * GROUPS + i, token = lane / 8;
#pragma unroll
            for (int n = 0; n < COLUMN_TILES; n++) {
                int d = 2 * n + lane / 4 % 2;
                bool live = own < ROW_GROUPS && token < TOKENS && d < DIGITS;
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    int from = PREVIEW == 4 ? 8 * q + j % 2 * 32 + j / 2 * 4 : 16 * q + 4 * j;
                    const signed char *at = digits + (token * DIGITS + d) * INPUTS + own * GROUP;
                    digit[i][n][j] = live ? *(const u32 *)(at + from) : 0;
                }
            }
            unit[i] = own < ROW_GROUPS && q < TOKENS ? units[q * ROW_GROUPS + own] : 0.0f;
        }
    }
};

/* Four of a lane's sixteen weights of a group. */
DEVICE u32 weights(const u32 *word, int j) {
#if PREVIEW == 4
    return ((j % 2 ? word[j / 2] : word[j / 2] << 4) & 0xf0f0f0f0u) ^ 0x80808080u;
#else
    return word[j] ^ 0x80808080u;
#endif
}

struct Preview {
    const char *data, *scale; /* [rows, ROW_BYTES], [rows, SCALE_BYTES] of bf16 */

    /* The producer's: rows first .. first + n - 1, some or none, into the next stage. */
    DEVICE_METHOD void fill(Ring &ring, int first, int n, u64 policy) const {
        ring.wait_empty(n * (ROW_BYTES + SCALE_BYTES));
        if (n) {
            ring.copy(0, data + (long long)first * ROW_BYTES, n * ROW_BYTES, policy);
            ring.copy(STAGE_ROWS * ROW_BYTES, scale + (long long)first * SCALE_BYTES,
                      n * SCALE_BYTES, policy);
        }
        ring.advance();
    }

    /* The same for rows row_of(0) .. row_of(n - 1), wherever they are. */
    template <class RowOf>
    DEVICE_METHOD void gather(Ring &ring, int n, u64 policy, RowOf row_of) const {
        ring.wait_empty(n * (ROW_BYTES + SCALE_BYTES));
        for (int i = 0; i < n; i++) {
            long long row = row_of(i);
            ring.copy(i * ROW_BYTES, data + row * ROW_BYTES, ROW_BYTES, policy);
            ring.copy(STAGE_ROWS * ROW_BYTES + i * SCALE_BYTES, scale + row * SCALE_BYTES,
                      SCALE_BYTES, policy);
        }
        ring.advance();
    }

    /* dots[(k * TOKENS + t) * PITCH + warp] = this warp's part of a row times x[t], for the tile's
     * rows, k0 .. k0 + TILE - 1 below last; k is row_of(k) of the preview. */
    template <class RowOf>
    static DEVICE_METHOD void dot_tile(Ring &ring, const Fragments &x, int k0, int last,
                                       float *dots, RowOf row_of) {
        int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, q = lane % 4;
        int start = warp * GROUPS, swap[2];
#pragma unroll
        for (int half = 0; half < 2; half++) swap[half] = row_of(k0 + r + 8 * half) & 3;
        const char *rows[2], *scales[2];
#pragma unroll
        for (int s = 0; s < SPLITS; s++) {
            const char *stage = ring.wait_full_ahead(s);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int at = r + 8 * half;
                if (at / STAGE_ROWS != s) continue;
                rows[half] = stage + at % STAGE_ROWS * ROW_BYTES;
                scales[half] = stage + STAGE_ROWS * ROW_BYTES + at % STAGE_ROWS * SCALE_BYTES;
            }
        }
        u32 packed[2][(GROUPS + 1) / 2];
#pragma unroll
        for (int half = 0; half < 2; half++) load_scales(scales[half] + 2 * start, packed[half]);
        float total[2] = {};
#pragma unroll
        for (int i = 0; i < GROUPS; i++) {
            if (ROW_GROUPS != WARPS * GROUPS && start + i >= ROW_GROUPS) break;
            int from = (start + i) * GROUP_BYTES;
            u32 word[2][GROUP_BYTES / 16];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int run = from / RUN;
                if (SWAPPED * RUN == ROW_BYTES || run < SWAPPED) run ^= swap[half];
                int at = run * RUN + from % RUN + q * (GROUP_BYTES / 4);
#if PREVIEW == 4
                uint2 v = *(const uint2 *)(rows[half] + at);
#else
                uint4 v = *(const uint4 *)(rows[half] + at);
                word[half][2] = v.z, word[half][3] = v.w;
#endif
                word[half][0] = v.x, word[half][1] = v.y;
            }
            int sum[COLUMN_TILES][4] = {};
#pragma unroll
            for (int j = 0; j < 4; j += 2) {
                u32 a[4] = {weights(word[0], j), weights(word[1], j), weights(word[0], j + 1),
                            weights(word[1], j + 1)};
#pragma unroll
                for (int n = 0; n < COLUMN_TILES; n++)
                    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
                        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                        : "+r"(sum[n][0]), "+r"(sum[n][1]), "+r"(sum[n][2]), "+r"(sum[n][3])
                        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(x.digit[i][n][j]),
                          "r"(x.digit[i][n][j + 1]));
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float number = (float)(sum[0][2 * half] * 256 + sum[0][2 * half + 1]);
#if DTYPE == 2
                number = number * 256.0f + (float)sum[1][2 * half];
#endif
                u32 two = packed[half][i / 2];
                float scale = __uint_as_float(i % 2 ? two & 0xffff0000u : two << 16);
                total[half] += scale * x.unit[i] * number;
            }
        }
#pragma unroll
        for (int s = 0; s < SPLITS; s++) ring.release();
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int k = k0 + r + 8 * half;
            if (q < TOKENS && k < last) dots[(k * TOKENS + q) * PITCH + warp] = total[half];
        }
    }

  private:
    /* A warp's scales of a row, two a word, in as few loads as their place allows. */
    static DEVICE_METHOD void load_scales(const char *from, u32 (&to)[(GROUPS + 1) / 2]) {
#if GROUPS % 8 == 0
#pragma unroll
        for (int i = 0; i < GROUPS / 2; i += 4) {
            uint4 v = *(const uint4 *)(from + 4 * i);
            to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
        }
#else
#pragma unroll
        for (int i = 0; i < (GROUPS + 1) / 2; i++) {
#if GROUPS % 2 == 0
            to[i] = *(const u32 *)(from + 4 * i);
#else
            const unsigned short *two = (const unsigned short *)from + 2 * i;
            to[i] = two[0] | (2 * i + 1 < GROUPS ? (u32)two[1] << 16 : 0);
#endif
        }
#endif
    }
};

#endif
