/* A dense product for one to four tokens on NVIDIA GPUs from Hopper on:
 *   y = round(w norm(x) + bias) + residual
 * where w is up to three matrices one below the other, as q, k and v.
 *
 * A block owns a slice of the rows and finishes `capacity` of them at a time, whole stages. They are
 * streamed through the ring from before the previous kernel has ended, as weights do not depend on
 * it. Stands behind numbers.cuh, weights.cuh, stream.cuh and preview.cuh.
 */

#define PARTS 3

#if WEIGHT == 3
#define STEP TILE
#else
#define STEP ROWS
#endif

/* Linear of linear.py. Pitch (from row to row of a stage) and stage are in bytes. */
struct Linear {
    const weight_t *x;
    Matrix w[PARTS];
    const weight_t *bias[PARTS], *residual;
    weight_t *y; /* [tokens, rows] */
    int rows[PARTS]; /* of each matrix */
    Norm norm;
    int tokens, hidden, total, capacity, pitch, stage, stages;
};

/* Which matrix a row of all is in; the row becomes its own. */
DEVICE int part_of(const Linear &p, int &row) {
    int second = p.rows[0], third = second + p.rows[1], part = (row >= second) + (row >= third);
    row -= part == 0 ? 0 : part == 1 ? second : third;
    return part;
}

/* Rows of a block one after the other: of one matrix, and at most `capacity`. */
struct Run {
    int row, part, count; /* of the matrix */
    /* What this thread's first result of the run needs, asked for while rows come. */
    float scale = 1.0f, bias = 0.0f, residual = 0.0f;

    DEVICE_METHOD Run(const Linear &p, int first, int left) : row(first) {
        part = part_of(p, row);
        count = min(min(left, p.capacity), p.rows[part] - row);
    }
    DEVICE_METHOD void ask_weights(const Linear &p) {
        int own = row + threadIdx.x % count;
        if (ROW_SCALES) scale = p.w[part].row_scale(own);
        if (p.bias[part]) bias = to_float(p.bias[part][own]);
    }
    DEVICE_METHOD void ask_residual(const Linear &p, int first) {
        int k = threadIdx.x % count, t = threadIdx.x / count;
        if (p.residual && t < p.tokens)
            residual = to_float(p.residual[(long long)t * p.total + first + k]);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1)
    linear(const __grid_constant__ Linear p) {
    extern __shared__ __align__(128) char memory[];
    __shared__ u64 full[MAX_STAGES], empty[MAX_STAGES];
    char *after_stages = memory + p.stages * p.stage;
#if WEIGHT == 3
    signed char *digits = (signed char *)after_stages; /* [TOKENS, DIGITS, INPUTS] */
    float *units = (float *)(digits + TOKENS * DIGITS * INPUTS); /* [TOKENS, ROW_GROUPS] */
    after_stages = (char *)(units + TOKENS * ROW_GROUPS);
#endif
    float *dots = (float *)after_stages; /* [capacity, TOKENS, PITCH] */

    int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    int first = (int)((long long)p.total * blockIdx.x / gridDim.x);
    int count = (int)((long long)p.total * (blockIdx.x + 1) / gridDim.x) - first;
    Ring ring{memory, full, empty, p.stages, p.stage, p.pitch};
    launch_dependents();
    if (tid == 0) {
        for (int s = 0; s < p.stages; s++)
            barrier_init(full + s, 1), barrier_init(empty + s, WARPS);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();

    if (warp == WARPS) { /* ---- the producer ---- */
        if (lane) return;
        u64 policy;
        asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
        for (int at = 0; at < count;) {
            Run run(p, first + at, count - at);
            for (int k = 0; k < run.count; k += STEP) {
#if WEIGHT == 3
                Preview w{p.w[run.part].data, p.w[run.part].scale};
                for (int i = k; i < k + TILE; i += STAGE_ROWS)
                    w.fill(ring, run.row + i, max(0, min(STAGE_ROWS, run.count - i)), policy);
#else
                ring.fill_run(min(ROWS, run.count - k), p.w[run.part], p.hidden, policy,
                              run.row + k);
#endif
            }
            at += run.count;
        }
        return;
    }

    /* ---- the consumers ---- */
    Run run(p, first, count);
    run.ask_weights(p);
    NormWeights norm_weights(p.norm, p.hidden);
    float xs[TOKENS][COLUMNS * VEC];
#if WEIGHT == 3
    Fragments fragments;
#else
    Factor factors[TOKENS][COLUMNS];
#endif
    /* With a norm once for nothing, while the kernel ahead runs: a microsecond less afterwards, as
     * the instructions are at hand. */
#pragma unroll 1
    for (int turn = p.norm.weight ? 0 : 1; turn < 2; turn++) {
        if (turn) {
            wait_for_previous();
            run.ask_residual(p, first);
        }
        load_x(turn ? p.x : p.norm.weight, turn ? p.tokens : 1, p.hidden, p.norm, norm_weights, xs);
#if WEIGHT == 3
        to_digits(xs, digits, units);
        consumers_sync();
        fragments.load(digits, units);
#else
        to_factors(xs, factors);
#endif
    }
    for (int at = 0; at < count;) {
        const Matrix &w = p.w[run.part];
#if WEIGHT == 3
        for (int k = 0; k < run.count; k += TILE)
            Preview::dot_tile(ring, fragments, k, run.count, dots,
                              [&](int i) { return run.row + i; });
#else
        dot_rows(ring, 0, run.count, p.hidden, factors, dots);
#endif
        consumers_sync();
        for (int i = tid; i < run.count * p.tokens; i += THREADS) {
            int k = i % run.count, t = i / run.count;
            long long to = (long long)t * p.total + first + at + k;
            float y = dot_of(dots, k, t), scale = run.scale, bias = run.bias;
            float residual = run.residual;
            if (i != tid) {
                if (ROW_SCALES) scale = w.row_scale(run.row + k);
                if (p.bias[run.part]) bias = to_float(p.bias[run.part][run.row + k]);
                if (p.residual) residual = to_float(p.residual[to]);
            }
            y = y * scale + bias;
            if (p.residual) y = residual + rounded(y);
            p.y[to] = round_to_weight(y);
        }
        at += run.count;
        if (at >= count) return;
        consumers_sync(); /* the next rows' dots take the place of these */
        run = Run(p, first + at, count - at);
        run.ask_weights(p);
        run.ask_residual(p, first + at);
    }
}
