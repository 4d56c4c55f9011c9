/* A dense product for one to four tokens on NVIDIA GPUs from Hopper on:
 *   y = round(w norm(x) + bias) + residual
 * where w is up to three matrices one below the other, as q, k and v.
 *
 * A block owns a slice of the rows and finishes `capacity` of them at a time, whole stages. They are
 * streamed through the ring from before the previous kernel has ended, as weights do not depend on
 * it. Stands behind numbers.cuh, weights.cuh and stream.cuh.
 */

#define PARTS 3

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
    int part = 0;
    while (row >= p.rows[part]) row -= p.rows[part++];
    return part;
}

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1)
    linear(const __grid_constant__ Linear p) {
    extern __shared__ __align__(128) char memory[];
    __shared__ u64 full[MAX_STAGES], empty[MAX_STAGES];
    float *dots = (float *)(memory + p.stages * p.stage); /* [capacity, TOKENS, PITCH] */

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
        u32 bytes = packed_bytes(p.hidden), more = scale_bytes(p.hidden);
        for (int k = 0; k < count; k += ROWS) {
            int n = min(ROWS, count - k);
            ring.wait_empty(n * (bytes + more));
            /* Runs of rows of one matrix. */
            for (int i = 0; i < n;) {
                int row = first + k + i, part = part_of(p, row);
                const Matrix &w = p.w[part];
                int rows = min(n - i, p.rows[part] - row);
                if (w.stride != bytes) rows = 1;
                ring.copy(i * p.pitch, w.row(row), rows * bytes, policy);
                if (more)
                    ring.copy(ROWS * p.pitch + i * more, w.scales(row, p.hidden), rows * more,
                              policy);
                i += rows;
            }
            ring.advance();
        }
        return;
    }

    /* ---- the consumers ---- */
    wait_for_previous();
    float xs[TOKENS][COLUMNS * VEC];
    load_x(p.x, p.tokens, p.hidden, p.norm, xs);
    Factor factors[TOKENS][COLUMNS];
    to_factors(xs, factors);
    for (int from = 0; from < count; from += p.capacity) {
        int rows = min(p.capacity, count - from);
        auto scale_of = [&](int k) {
            int row = first + from + k, part = part_of(p, row);
            return p.w[part].row_scale(row);
        };
        float scale = ROW_SCALES ? scale_of(tid % rows) : 1.0f; /* asked for while rows come */
        dot_rows(ring, 0, rows, p.hidden, factors, dots, [&](int k) {
            int row = first + from + k;
            part_of(p, row);
            return row;
        });
        consumers_sync();
        for (int i = tid; i < rows * p.tokens; i += THREADS) {
            int k = i % rows, t = i / rows, row = first + from + k;
            long long to = (long long)t * p.total + row;
            int part = part_of(p, row);
            float y = dot_of(dots, k, t);
            if (ROW_SCALES) y *= i == tid ? scale : p.w[part].row_scale(row);
            if (p.bias[part]) y += to_float(p.bias[part][row]);
            if (p.residual) y = to_float(p.residual[to]) + rounded(y);
            p.y[to] = round_to_weight(y);
        }
        consumers_sync(); /* the next rows' dots take the place of these */
    }
}
