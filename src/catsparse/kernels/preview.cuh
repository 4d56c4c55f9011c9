/* The gate preview's dot products on tensor cores: tiles of 16 neurons of a 4- or 8-bit copy of
 * W_gate (preview.py), as bf16 against the tokens, in fp32. A warp owns the same few groups of 64
 * inputs of every tile; lane l has rows l / 4 and l / 4 + 8 of it. Which inputs a step multiplies is
 * for the packing to choose, as both sides of a product may be permuted alike.
 *
 * A stage of the ring holds some of a tile's rows, which are one run of memory, and then their
 * scales: two copies. One a row would take longer to ask for than to fetch.
 *
 * Stands between stream.cuh and cuda.cu, and needs these constants more:
 *   PREVIEW  bits a weight, 0 for none     GROUPS  groups of a warp
 *   SPLITS   stages of a tile: 1, 2, 4, 8
 */

#if PREVIEW

#define TILE 16
#define GROUP 64
#define GROUP_BYTES (GROUP * PREVIEW / 8)
/* A float is three bf16, a half two: they are columns of their own, whose sums add up. */
#define PARTS (DTYPE == 2 ? 3 : DTYPE == 1 ? 2 : 1)
#define COLUMN_TILES ((TOKENS * PARTS + 7) / 8)
#define STAGE_ROWS (TILE / SPLITS)

/* What is left of a value once so many bf16 have been taken from it, to be rounded to the next. */
DEVICE float after_parts(float value, int parts) {
#pragma unroll
    for (int i = 0; i + 1 < PARTS; i++) {
        unsigned short bits;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
        if (i < parts) value -= __uint_as_float((u32)bits << 16);
    }
    return value;
}

DEVICE u32 bf16_pair(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

/* Two weights of a group, as bf16 in one word: pair j of a lane's eight. */
DEVICE u32 preview_pair(const u32 *word, int j) {
    u32 pair;
#if PREVIEW == 4
    u32 n = (word[j / 4] >> 4 * (j % 4) & 0x000f000fu) | 0x43004300u; /* 128 + n */
    asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(pair) : "r"(n), "r"(0x43084308u));
#else
    u32 bytes = word[j / 2] >> 16 * (j % 2);
    float low = __uint_as_float(0x4b000000u | (bytes & 0xff)) - 8388736.0f;
    float high = __uint_as_float(0x4b000000u | (bytes >> 8 & 0xff)) - 8388736.0f;
    pair = bf16_pair(low, high);
#endif
    return pair;
}

/* The tokens, as the other side of those pairs. */
struct Fragments {
    u32 pair[GROUPS][COLUMN_TILES][8];

    /* x: [TOKENS, stride] in shared memory, zeros after the last input of whole groups. */
    DEVICE_METHOD void load(const weight_t *x, int stride, int groups) {
        int lane = threadIdx.x % 32, warp = threadIdx.x / 32, q = lane % 4;
#pragma unroll
        for (int i = 0; i < GROUPS; i++)
#pragma unroll
            for (int n = 0; n < COLUMN_TILES; n++) {
                int column = n * 8 + lane / 4, own = warp * GROUPS + i;
                bool live = own < groups && column < TOKENS * PARTS;
                const weight_t *at = x + column % TOKENS * stride + own * GROUP;
                float v[16]; /* two runs of 8 inputs, or one of 16 */
#pragma unroll
                for (int k = 0; k < 16; k += VEC) {
                    int from = PREVIEW == 4 ? 8 * q + k % 8 + k / 8 * 32 : 16 * q + k;
                    uint4 piece = {0, 0, 0, 0};
                    if (live) piece = *(const uint4 *)(at + from);
                    float values[VEC];
                    unpack(piece, values);
#pragma unroll
                    for (int e = 0; e < VEC; e++)
                        v[k + e] = after_parts(values[e], column / TOKENS);
                }
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    int low = PREVIEW == 4 ? j % 2 * 8 + j / 4 * 4 + j % 4 / 2 : 2 * j;
                    pair[i][n][j] = bf16_pair(v[low], v[low + (PREVIEW == 4 ? 2 : 1)]);
                }
            }
    }
};

struct Preview {
    const char *data;   /* [neurons, row] */
    const char *scale;  /* [neurons, scale_row] of bf16 */
    int row, scale_row; /* bytes */
    int groups;         /* of a row */

    /* The producer's: rows first .. first + n - 1, some or none, into the next stage. */
    DEVICE_METHOD void fill(Ring &ring, int first, int n, u64 policy) const {
        ring.wait_empty(n * (row + scale_row));
        if (n) {
            ring.copy(0, data + (long long)first * row, n * row, policy);
            ring.copy(STAGE_ROWS * row, scale + (long long)first * scale_row, n * scale_row, policy);
        }
        ring.advance();
    }

    /* dots[(k * TOKENS + t) * PITCH + warp] = this warp's part of row k times x[t], for the rows
     * k0 .. k0 + TILE - 1 below last. */
    DEVICE_METHOD void dot_tile(Ring &ring, const Fragments &x, int k0, int last,
                                float *dots) const {
        int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, q = lane % 4;
        const char *upper_row = nullptr, *lower_row = nullptr;
        const char *upper_scale = nullptr, *lower_scale = nullptr;
#pragma unroll
        for (int s = 0; s < SPLITS; s++) {
            const char *stage = ring.wait_full_ahead(s);
            int place = r % STAGE_ROWS, below = (r + 8) % STAGE_ROWS;
            if (r / STAGE_ROWS == s)
                upper_row = stage + place * row,
                upper_scale = stage + STAGE_ROWS * row + place * scale_row;
            if ((r + 8) / STAGE_ROWS == s)
                lower_row = stage + below * row,
                lower_scale = stage + STAGE_ROWS * row + below * scale_row;
        }
        int start = warp * GROUPS;
        u32 upper_scales[GROUPS], lower_scales[GROUPS]; /* as floats' bits */
        load_scales(upper_scale + 2 * start, upper_scales);
        load_scales(lower_scale + 2 * start, lower_scales);
        upper_row += start * GROUP_BYTES + q * (GROUP_BYTES / 4);
        lower_row += start * GROUP_BYTES + q * (GROUP_BYTES / 4);
        float total[COLUMN_TILES][4] = {};
#pragma unroll
        for (int i = 0; i < GROUPS; i++) {
            if (start + i >= groups) break;
            u32 upper[GROUP_BYTES / 16], lower[GROUP_BYTES / 16];
#pragma unroll
            for (int w = 0; w < GROUP_BYTES / 16; w += 2) {
                uint2 a = *(const uint2 *)(upper_row + i * GROUP_BYTES + w * 4);
                uint2 b = *(const uint2 *)(lower_row + i * GROUP_BYTES + w * 4);
                upper[w] = a.x, upper[w + 1] = a.y, lower[w] = b.x, lower[w + 1] = b.y;
            }
            float sum[COLUMN_TILES][4] = {};
#pragma unroll
            for (int j = 0; j < 8; j += 2) {
                u32 a[4] = {preview_pair(upper, j), preview_pair(lower, j),
                            preview_pair(upper, j + 1), preview_pair(lower, j + 1)};
#pragma unroll
                for (int n = 0; n < COLUMN_TILES; n++)
                    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                        : "+f"(sum[n][0]), "+f"(sum[n][1]), "+f"(sum[n][2]), "+f"(sum[n][3])
                        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(x.pair[i][n][j]),
                          "r"(x.pair[i][n][j + 1]));
            }
            float above = __uint_as_float(upper_scales[i]), below = __uint_as_float(lower_scales[i]);
#pragma unroll
            for (int n = 0; n < COLUMN_TILES; n++) {
                total[n][0] += above * sum[n][0], total[n][1] += above * sum[n][1];
                total[n][2] += below * sum[n][2], total[n][3] += below * sum[n][3];
            }
        }
#pragma unroll
        for (int s = 0; s < SPLITS; s++) ring.release();
        store(total, k0, last, dots);
    }

  private:
    /* In as few loads as their place allows. */
    static DEVICE_METHOD void load_scales(const char *from, u32 (&to)[GROUPS]) {
#pragma unroll
        for (int i = 0; i < GROUPS; i++) {
#if GROUPS % 8 == 0
            if (i % 8 == 0) {
                uint4 v = *(const uint4 *)(from + 2 * i);
                u32 word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int e = 0; e < 8; e++)
                    to[i + e] = e % 2 ? word[e / 2] & 0xffff0000u : word[e / 2] << 16;
            }
#elif GROUPS % 2 == 0
            u32 word = *(const u32 *)(from + i / 2 * 4);
            to[i] = i % 2 ? word & 0xffff0000u : word << 16;
#else
            to[i] = (u32) * (const unsigned short *)(from + 2 * i) << 16;
#endif
        }
    }

    static DEVICE_METHOD void store(const float (&total)[COLUMN_TILES][4], int k0, int last,
                                    float *dots) {
        int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, q = lane % 4;
#if DTYPE == 0
#pragma unroll
        for (int c = 0; c < 4; c++) {
            int token = 2 * q + c % 2, k = k0 + r + c / 2 * 8;
            if (token < TOKENS && k < last) dots[(k * TOKENS + token) * PITCH + warp] = total[0][c];
        }
#else
        __shared__ float columns[WARPS][TILE][COLUMN_TILES * 8 + 1];
        __syncwarp();
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
            for (int c = 0; c < 4; c++)
                columns[warp][r + c / 2 * 8][n * 8 + 2 * q + c % 2] = total[n][c];
        __syncwarp();
        for (int i = lane; i < TILE * TOKENS; i += 32) {
            int k = k0 + i / TOKENS, token = i % TOKENS;
            float sum = 0.0f;
#pragma unroll
            for (int part = 0; part < PARTS; part++)
                sum += columns[warp][i / TOKENS][part * TOKENS + token];
            if (k < last) dots[(k * TOKENS + token) * PITCH + warp] = sum;
        }
#endif
    }
};

#endif
