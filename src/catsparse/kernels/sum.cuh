/* What kernels share that skip rows of a matrix and add up the others: a block adds the rows on its
 * list into a partial output, and a second, small kernel adds the blocks' in order.
 *
 * Stands behind stream.cuh.
 */

#define TOKEN_BIT 24 /* of a list entry: below it the row, from it one bit a token that keeps it */
#define NEURON ((1 << TOKEN_BIT) - 1)

/* The rows on the list, as they come through the ring, times hidden [kept, TOKENS], into out. */
DEVICE void add_rows(Ring &ring, int kept, int columns, const int *list, const float *hidden,
                     float (&out)[TOKENS][COLUMNS * VEC]) {
    int tid = threadIdx.x;
    for (int k0 = 0; k0 < kept; k0 += ROWS) {
        ring.wait_full();
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            if (!EVEN && (tid + c * THREADS) * VEC >= columns) break;
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                if (k0 + i >= kept) break; /* what lies there is an earlier row */
                Piece piece;
                ring.load(piece, i, tid + c * THREADS, list[k0 + i] & NEURON, columns);
                float w[VEC];
                piece.floats(w);
#pragma unroll
                for (int t = 0; t < TOKENS; t++) {
                    float h = hidden[(k0 + i) * TOKENS + t];
#if WEIGHT == 3
                    h *= piece.scale;
#endif
                    /* A token that drops the row takes nothing of it, not even infinity. */
                    if (TOKENS > 1 && !(list[k0 + i] >> (TOKEN_BIT + t) & 1)) continue;
#pragma unroll
                    for (int e = 0; e < VEC; e++) out[t][c * VEC + e] += h * w[e];
                }
            }
        }
        ring.release();
    }
}

/* This block's part: partial is [blocks, tokens, columns]. */
DEVICE void store_partial(const float (&out)[TOKENS][COLUMNS * VEC], int tokens, int columns,
                          float *partial) {
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        if (t >= tokens) break;
        float *to = partial + ((long long)blockIdx.x * tokens + t) * columns;
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            int at = (threadIdx.x + c * THREADS) * VEC;
            if (!EVEN && at >= columns) break;
#if WEIGHT == 3
#pragma unroll
            for (int e = 0; e < VEC; e += 2)
                *(float2 *)(to + column_of(at / VEC, e)) =
                    make_float2(out[t][c * VEC + e], out[t][c * VEC + e + 1]);
#else
#pragma unroll
            for (int e = 0; e < VEC; e += 4) {
                const float *v = out[t] + c * VEC + e;
                *(float4 *)(to + at + e) = make_float4(v[0], v[1], v[2], v[3]);
            }
#endif
        }
    }
}

/* Sum of sums.py. */
struct Sum {
    const float *partial, *bias;
    const weight_t *residual; /* added to the result, or null */
    weight_t *y;
    int parts, tokens, columns;
};

/* 32 columns a block of 256 threads: 8 lanes of 4 columns, 32 partial outputs at a time, of which a
 * warp adds up four by exchange. */
extern "C" __global__ void __launch_bounds__(256) sum_partials(const __grid_constant__ Sum p) {
    __shared__ float4 sums[8][8];
    int lane = threadIdx.x % 8, row = threadIdx.x / 8;
    int total = p.tokens * p.columns, at = blockIdx.x * 32 + lane * 4;
    launch_dependents();
    wait_for_previous();
    /* Of this thread's result, where it has one: asked for first, though needed last. */
    int to = blockIdx.x * 32 + threadIdx.x;
    bool own = threadIdx.x < 32 && to < total;
    float y = own && p.bias ? p.bias[to % p.columns] : 0.0f;
    float residual = own && p.residual ? to_float(p.residual[to]) : 0.0f;
    float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
    if (at < total) {
#pragma unroll 8
        for (int i = row; i < p.parts; i += 32) {
            float4 v = *(const float4 *)(p.partial + (long long)i * total + at);
            sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
        }
    }
#pragma unroll
    for (int off = 8; off < 32; off *= 2) {
        sum.x += __shfl_xor_sync(ALL, sum.x, off), sum.y += __shfl_xor_sync(ALL, sum.y, off);
        sum.z += __shfl_xor_sync(ALL, sum.z, off), sum.w += __shfl_xor_sync(ALL, sum.w, off);
    }
    if (threadIdx.x % 32 < 8) sums[threadIdx.x / 32][lane] = sum;
    __syncthreads();
    if (own) {
        const float *flat = (const float *)sums;
#pragma unroll
        for (int i = 0; i < 8; i++) y += flat[i * 32 + threadIdx.x];
        if (p.residual) y = residual + rounded(y);
        p.y[to] = round_to_weight(y);
    }
}
