/* A dense product for one to four tokens on NVIDIA GPUs from Hopper on:
 *   y = round(w norm(x) + bias) + residual
 * where w is up to three matrices one below the other, as q, k and v.
 *
 * A block owns a slice of the rows and finishes `capacity` of them at a time, whole stages. They are
 * streamed through the ring from before the previous kernel has ended, as weights do not depend on
 * it. Stands behind numbers.cuh and stream.cuh.
 */

#define PARTS 3

/* Linear of linear.py. Strides are in elements, pitch (from row to row of a stage) in bytes. */
struct Linear {
    const weight_t *x, *w[PARTS], *bias[PARTS], *residual;
    weight_t *y; /* [tokens, rows] */
    long long stride[PARTS];
    int rows[PARTS]; /* of each matrix */
    Norm norm;
    int tokens, hidden, total, capacity, pitch, stages;
};

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1)
    linear(const __grid_constant__ Linear p) {
    extern __shared__ __align__(128) char memory[];
    __shared__ u64 full[MAX_STAGES], empty[MAX_STAGES];
    float *dots = (float *)(memory + p.stages * ROWS * p.pitch); /* [capacity, TOKENS, PITCH] */

    int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    int first = (int)((long long)p.total * blockIdx.x / gridDim.x);
    int count = (int)((long long)p.total * (blockIdx.x + 1) / gridDim.x) - first;
    Ring ring{memory, full, empty, p.stages, ROWS * p.pitch, p.pitch};
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
        for (int k = 0; k < count; k += ROWS)
            ring.fill(min(ROWS, count - k), p.hidden * SIZE, policy, [&](int i) {
                int row = first + k + i, part = 0;
                while (row >= p.rows[part]) row -= p.rows[part++];
                return p.w[part] + row * p.stride[part];
            });
        return;
    }

    /* ---- the consumers ---- */
    wait_for_previous();
    float xs[TOKENS][COLUMNS * VEC];
    load_x(p.x, p.tokens, p.hidden, p.norm, xs);
    for (int from = 0; from < count; from += p.capacity) {
        int rows = min(p.capacity, count - from);
        dot_rows(ring, 0, rows, p.hidden, xs, dots);
        consumers_sync();
        for (int i = tid; i < rows * p.tokens; i += THREADS) {
            int k = i % rows, t = i / rows, row = first + from + k, part = 0;
            long long to = (long long)t * p.total + row;
            float y = dot_of(dots, k, t);
            while (row >= p.rows[part]) row -= p.rows[part++];
            if (p.bias[part]) y += to_float(p.bias[part][row]);
            if (p.residual) y = to_float(p.residual[to]) + rounded(y);
            p.y[to] = round_to_weight(y);
        }
        consumers_sync(); /* the next rows' dots take the place of these */
    }
}
