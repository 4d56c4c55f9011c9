/* catsparse::sparse_linear on NVIDIA GPUs from Hopper on, for one to four tokens:
 *   y = sum over kept j of (norm(x)_j - mean_j) w_t[j] + bias, j kept iff |norm(x)_j| > threshold
 * where w_t is up to three matrices beside each other, as of q, k and v, which share their input.
 *
 * A block owns a slice of the inputs. It decides, lists the kept ones, and streams their rows through
 * the ring; each block writes a partial output, and sum.cuh's kernel adds them in order. Unlike the
 * rows of a dense product these cannot be asked for before the input is there.
 *
 * Stands behind numbers.cuh, weights.cuh, stream.cuh and sum.cuh.
 */

#define PARTS 3

/* Problem of sparse_linear_cuda.py. Strides are in elements, pitch (from row to row of a stage) in
 * bytes. */
struct Problem {
    const weight_t *x, *w[PARTS];
    const float *threshold, *mean;
    float *partial; /* [blocks, tokens, columns] */
    long long stride[PARTS];
    int part_columns[PARTS]; /* 0 for none */
    Norm norm;
    int tokens, inputs, columns, threshold_stride, capacity, pitch, stages;
};

/* What norm(x) is x times, before its weight, for each token. */
DEVICE void norm_scales(const Problem &p, float (&scale)[TOKENS]) {
    __shared__ float squares[TOKENS][WARPS];
    int tid = threadIdx.x;
    for (int t = 0; t < p.tokens; t++) {
        float sum = 0.0f;
        for (int at = tid * VEC; at < p.inputs; at += THREADS * VEC) {
            float v[VEC];
            unpack(*(const uint4 *)(p.x + (long long)t * p.inputs + at), v);
#pragma unroll
            for (int e = 0; e < VEC; e++) sum += v[e] * v[e];
        }
#pragma unroll
        for (int off = 16; off >= 1; off /= 2) sum += __shfl_xor_sync(ALL, sum, off);
        if (tid % 32 == 0) squares[t][tid / 32] = sum;
    }
    consumers_sync();
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < WARPS; i++) sum += t < p.tokens ? squares[t][i] : 1.0f;
        scale[t] = rsqrtf(sum / p.inputs + p.norm.eps);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1)
    sparse_linear(const __grid_constant__ Problem p) {
    extern __shared__ __align__(128) char memory[];
    __shared__ u64 full[MAX_STAGES], empty[MAX_STAGES], listed;
    __shared__ int total, warp_counts[WARPS];
    float *hidden = (float *)(memory + p.stages * ROWS * p.pitch); /* [capacity, TOKENS] */
    int *list = (int *)(hidden + p.capacity * TOKENS);             /* [capacity] */

    int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    int first = (int)((long long)p.inputs * blockIdx.x / gridDim.x);
    int count = (int)((long long)p.inputs * (blockIdx.x + 1) / gridDim.x) - first;
    Ring ring{memory, full, empty, p.stages, ROWS * p.pitch, p.pitch};
    launch_dependents();
    if (tid == 0) {
        for (int s = 0; s < p.stages; s++)
            barrier_init(full + s, 1), barrier_init(empty + s, WARPS);
        barrier_init(&listed, THREADS);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();

    if (warp == WARPS) { /* ---- the producer ---- */
        if (lane) return;
        u64 policy;
        asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
        barrier_wait(&listed, 0);
        for (int k = 0; k < total; k += ROWS) {
            int n = min(ROWS, total - k);
            ring.wait_empty(n * p.columns * SIZE);
            for (int i = 0; i < n; i++) {
                int row = list[k + i] & NEURON, to = i * p.pitch;
                for (int part = 0; part < PARTS && p.part_columns[part]; part++) {
                    u32 bytes = p.part_columns[part] * SIZE;
                    ring.copy(to, p.w[part] + row * p.stride[part], bytes, policy);
                    to += bytes;
                }
            }
            ring.advance();
        }
        return;
    }

    /* ---- the consumers ---- */
    wait_for_previous();
    float scale[TOKENS];
    if (p.norm.weight) norm_scales(p, scale);
    int kept = 0;
    for (int from = 0; from < count; from += THREADS) {
        int k = from + tid, at = first + k, entry = at;
        bool live = k < count;
        float limit = live ? p.threshold[at * (long long)p.threshold_stride] : 0.0f, h[TOKENS];
        float w = live && p.norm.weight ? to_float(p.norm.weight[at]) : 0.0f;
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            bool there = live && t < p.tokens;
            float v = there ? to_float(p.x[(long long)t * p.inputs + at]) : 0.0f;
            if (p.norm.weight) { /* rounded where transformers' modules round */
                v *= scale[t];
                v = rounded(p.norm.offset ? v * (p.norm.offset + w) : rounded(v) * w);
            }
            bool keep = there && fabsf(v) > limit;
            entry |= keep << (TOKEN_BIT + t);
            h[t] = !keep ? 0.0f : p.mean ? v - p.mean[at] : v;
        }
        u32 any = __ballot_sync(ALL, entry > NEURON);
        consumers_sync(); /* all have read the last counts */
        if (lane == 0) warp_counts[warp] = __popc(any);
        consumers_sync();
        int place = kept + __popc(any & ((1u << lane) - 1));
#pragma unroll
        for (int i = 0; i < WARPS; i++) {
            if (i < warp) place += warp_counts[i];
            kept += warp_counts[i];
        }
        if (entry > NEURON) {
            list[place] = entry;
#pragma unroll
            for (int t = 0; t < TOKENS; t++) hidden[place * TOKENS + t] = h[t];
        }
    }
    if (tid == 0) total = kept;
    barrier_arrive(&listed);
    consumers_sync();
    float out[TOKENS][COLUMNS * VEC] = {};
    add_rows(ring, kept, p.columns, list, hidden, out);
    store_partial(out, p.tokens, p.columns, p.partial);
}
