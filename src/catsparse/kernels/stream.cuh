/* What the streaming kernels share: barriers, bulk copies, the ring, dot products, the input.
 *
 * A block has one producer warp, one thread of which asks the bulk copy engine for rows of weights,
 * and THREADS consumers, which each own the same few columns of every row. Stands between
 * weights.cuh and a kernel's source, and needs these constants:
 *   THREADS  consumers, whole warps      TOKENS   tokens of a call at most
 *   ROWS     rows of a stage, 1 to 16
 *   COLUMNS  pieces of a row that a      EVEN     whether rows are THREADS * COLUMNS pieces long
 *            consumer owns
 */

#define WARPS (THREADS / 32)
#define PITCH (WARPS | 1) /* odd, so that rows of partial dots fall on different banks */
#define MAX_STAGES 32

/* ---- barriers, copies, dependent launch ----------------------------------------------------- */

DEVICE u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

DEVICE void barrier_init(u64 *b, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(count)
                 : "memory");
}

DEVICE void barrier_arrive(u64 *b) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}

DEVICE void barrier_expect(u64 *b, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)),
                 "r"(bytes)
                 : "memory");
}

DEVICE void barrier_wait(u64 *b, u32 parity) {
    asm volatile("{.reg .pred done;\n"
                 "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;}" ::"r"(shared_address(b)),
                 "r"(parity)
                 : "memory");
}

DEVICE void copy_row(char *to, const void *from, u32 bytes, u64 *b, u64 policy) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(b)), "l"(policy)
                 : "memory");
}

/* All consumers, not the producer. */
DEVICE void consumers_sync() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }

/* ---- matrices ------------------------------------------------------------------------------- */

struct Matrix {
    const char *data, *scale; /* scales: fp32 a row, or bf16 a group */
    long long stride;         /* bytes */

    DEVICE_METHOD const char *row(int i) const { return data + i * stride; }
    DEVICE_METHOD const char *scales(int i, int columns) const {
        return scale + (long long)i * scale_bytes(columns);
    }
    DEVICE_METHOD float row_scale(int i) const { return ((const float *)scale)[i]; }
};

/* ---- the ring ------------------------------------------------------------------------------- */

/* Bytes that a block asks for ahead of those that have come: enough to keep the memory busy. More
 * would only stand in the way of all else that the multiprocessor loads, its own and that of the
 * kernels beside it. */
#ifndef UNDER_WAY
#define UNDER_WAY 65536
#endif
/* The same in the first round, while the kernel ahead may still run. */
#ifndef UNDER_WAY_FIRST
#define UNDER_WAY_FIRST UNDER_WAY
#endif

struct Ring {
    char *data;
    u64 *full, *empty;
    int stages, size, pitch; /* bytes of a stage, and from row to row of it */
    int stage = 0;
    u32 parity = 0;
    bool first_round = true;

    DEVICE_METHOD void advance() {
        if (++stage == stages) stage = 0, parity ^= 1, first_round = false;
    }
    DEVICE_METHOD char *rows() const { return data + stage * size; }
    DEVICE_METHOD void wait_full() const { barrier_wait(full + stage, parity); }
    /* The stage that many after this one, once it is full. */
    DEVICE_METHOD const char *wait_full_ahead(int ahead) const {
        bool wraps = stage + ahead >= stages;
        int at = stage + ahead - (wraps ? stages : 0);
        barrier_wait(full + at, parity ^ wraps);
        return data + at * size;
    }
    DEVICE_METHOD void release() { /* by every thread of a warp */
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(empty + stage);
        advance();
    }
    /* The producer's: the next stage is free, not too many before it are under way, and it will
     * hold so many bytes. */
    DEVICE_METHOD void wait_empty(u32 bytes) const {
        int most = first_round ? UNDER_WAY_FIRST : UNDER_WAY;
        int ahead = max(1, (most + size / 2) / size), at = stage - ahead;
        bool wraps = at < 0; /* in the first round to stages that pass, as nothing was asked of them */
        if (ahead < stages) barrier_wait(full + at + (wraps ? stages : 0), parity ^ wraps);
        barrier_wait(empty + stage, parity ^ 1);
        barrier_expect(full + stage, bytes);
    }
    DEVICE_METHOD void copy(int to, const void *from, u32 bytes, u64 policy) const {
        copy_row(rows() + to, from, bytes, full + stage, policy);
    }
    /* The producer's: rows row_of(0) .. row_of(n - 1) of w into the next stage, and behind all of
     * them their groups' scales. */
    template <class RowOf>
    DEVICE_METHOD void fill(int n, const Matrix &w, int columns, u64 policy, RowOf row_of) {
        u32 bytes = packed_bytes(columns), more = scale_bytes(columns);
        wait_empty(n * (bytes + more));
        for (int i = 0; i < n; i++) {
            int row = row_of(i);
            copy(i * pitch, w.row(row), bytes, policy);
            if (more) copy(ROWS * pitch + i * more, w.scales(row, columns), more, policy);
        }
        advance();
    }
    /* The same for n rows in order, without groups' scales, by one copy where they are one run of
     * memory. */
    DEVICE_METHOD void fill_run(int n, const Matrix &w, int columns, u64 policy, int first) {
        u32 bytes = packed_bytes(columns);
        wait_empty(n * bytes);
        if (w.stride == pitch && (int)bytes == pitch)
            copy(0, w.row(first), n * bytes, policy);
        else
            for (int i = 0; i < n; i++) copy(i * pitch, w.row(first + i), bytes, policy);
        advance();
    }
    /* A consumer's: its piece of the stage's row i, which is number `row` of its matrix. */
    DEVICE_METHOD void load(Piece &to, int i, int piece, int row, int columns) const {
        const char *from = rows();
        to.load(from + i * pitch, from + ROWS * pitch + i * scale_bytes(columns), piece, row,
                columns);
    }
};

/* ---- dot products --------------------------------------------------------------------------- */

/* Sums over a warp with as few exchanges as can be; lane l gets that of value l / (32 / ROWS). */
DEVICE float warp_sums(float (&v)[ROWS], int lane) {
#pragma unroll
    for (int n = ROWS / 2, off = 16; n >= 1; n /= 2, off /= 2)
#pragma unroll
        for (int i = 0; i < n; i++) {
            bool upper = lane & off;
            float mine = upper ? v[i + n] : v[i], other = upper ? v[i] : v[i + n];
            v[i] = mine + __shfl_xor_sync(ALL, other, off);
        }
#pragma unroll
    for (int off = 16 / ROWS; off >= 1; off /= 2) v[0] += __shfl_xor_sync(ALL, v[0], off);
    return v[0];
}

#if WEIGHT != 3 /* int4 is multiplied in tiles, see preview.cuh */

/* dots[(k * TOKENS + t) * PITCH + warp] = this part of row k times x[t], first <= k < last, without
 * the row's own scale. */
DEVICE void dot_rows(Ring &ring, int first, int last, int hidden,
                     const Factor (&xs)[TOKENS][COLUMNS], float *dots) {
    int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    for (int k0 = first; k0 < last; k0 += ROWS) {
        ring.wait_full();
        float v[TOKENS][ROWS] = {};
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            if (!EVEN && (tid + c * THREADS) * VEC >= hidden) break;
            Piece piece[ROWS];
#pragma unroll
            for (int i = 0; i < ROWS; i++)
                ring.load(piece[i], i, tid + c * THREADS, 0, hidden);
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
#if WEIGHT == 1
#pragma unroll
                for (int t = 0; t < TOKENS; t++) v[t][i] += xs[t][c].dot(piece[i]);
#else
                float w[VEC];
                piece[i].floats(w);
#pragma unroll
                for (int t = 0; t < TOKENS; t++)
#pragma unroll
                    for (int e = 0; e < VEC; e++) v[t][i] += w[e] * xs[t][c].x[e];
#endif
            }
        }
        ring.release();
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            float sum = warp_sums(v[t], lane);
            int k = k0 + lane / (32 / ROWS);
            if (lane % (32 / ROWS) == 0 && k < last) dots[(k * TOKENS + t) * PITCH + warp] = sum;
        }
    }
}

#endif

DEVICE float dot_of(const float *dots, int k, int t) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += dots[(k * TOKENS + t) * PITCH + w];
    return sum;
}

/* ---- the input ------------------------------------------------------------------------------ */

/* RMS norm of x on the way in; weight null for none. offset 1 is Gemma's: x (1 + weight). */
struct Norm {
    const weight_t *weight;
    float eps, offset;
};

/* This consumer's columns of its weight, asked for before the kernel ahead has ended. */
struct NormWeights {
    uint4 pieces[COLUMNS];

    DEVICE_METHOD NormWeights(const Norm &norm, int hidden) {
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            int at = (threadIdx.x + c * THREADS) * VEC;
            pieces[c] = {0, 0, 0, 0};
            if (norm.weight && at < hidden) pieces[c] = *(const uint4 *)(norm.weight + at);
        }
    }
};

/* The columns that this consumer owns, in fp32; 0 beyond the row and beyond `tokens`. */
DEVICE void load_x(const weight_t *x, int tokens, int hidden, const Norm &norm,
                   const NormWeights &weights, float (&xs)[TOKENS][COLUMNS * VEC]) {
    int tid = threadIdx.x;
#pragma unroll
    for (int t = 0; t < TOKENS; t++)
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            int at = (tid + c * THREADS) * VEC;
            uint4 piece = {0, 0, 0, 0};
            if (at < hidden && t < tokens) piece = *(const uint4 *)(x + (long long)t * hidden + at);
            float v[VEC];
            unpack(piece, v);
#pragma unroll
            for (int e = 0; e < VEC; e++) xs[t][c * VEC + e] = v[e];
        }
    if (!norm.weight) return;
    __shared__ float squares[TOKENS][WARPS];
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < COLUMNS * VEC; i++) sum += xs[t][i] * xs[t][i];
#pragma unroll
        for (int off = 16; off >= 1; off /= 2) sum += __shfl_xor_sync(ALL, sum, off);
        if (tid % 32 == 0) squares[t][tid / 32] = sum;
    }
    consumers_sync();
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
        int at = (tid + c * THREADS) * VEC;
        if (!EVEN && at >= hidden) break;
        float w[VEC];
        unpack(weights.pieces[c], w);
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < WARPS; i++) sum += squares[t][i];
            float scale = rsqrtf(sum / hidden + norm.eps);
#pragma unroll
            for (int e = 0; e < VEC; e++) {
                float &v = xs[t][c * VEC + e];
                /* Rounded where transformers' modules round. */
                v = norm.offset ? v * scale * (norm.offset + w[e]) : rounded(v * scale) * w[e];
                v = rounded(v);
            }
        }
    }
}

#if WEIGHT != 3

/* The same as factors of weights. */
DEVICE void to_factors(const float (&xs)[TOKENS][COLUMNS * VEC], Factor (&to)[TOKENS][COLUMNS]) {
#pragma unroll
    for (int t = 0; t < TOKENS; t++)
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) to[t][c].set(xs[t] + c * VEC);
}

#endif
