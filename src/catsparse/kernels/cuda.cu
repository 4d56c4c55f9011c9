/* catsparse::gated_mlp on NVIDIA GPUs from Hopper on, for one to four tokens:
 *   g = act(w_gate x), kept iff |g| > threshold, y = sum over kept (g u - mean) w_down_t + bias
 * With a preview of w_gate, its rows take the place of w_gate's in the decision, and w_gate's rows of
 * kept neurons are read after it; with one of w_up, too, their product decides. With a second decision, a neuron
 * whose |g u| is at most its product threshold is dropped, too, before its row of w_down_t is asked
 * for. Weights in int4 are their own preview (OWN): what it foretells is the gate itself.
 *
 * A block owns a slice of the neurons. One thread of it, the producer, asks the bulk copy engine
 * for rows: the gate rows, then the up rows of kept neurons, then their rows of w_down_t. They come
 * into a ring of stages in shared memory, so that tens of rows are under way all the time, whatever
 * the other threads, the consumers, wait for. A consumer owns the same few columns of every row.
 * Gate rows are decided in chunks: while the last chunk streams in, up rows of the first ones are
 * asked for, so the stream does not stop at the decision.
 *
 * Each block writes a partial output; a second, small kernel (sum.cuh) adds them in order. There are no
 * atomics: the bits of a result depend on the inputs and the number of blocks alone. Both kernels
 * start before the one ahead of them has ended (programmatic dependent launch), and wait for its
 * results before they read or write anything; weights excepted, where the caller says `early`.
 *
 * Stands behind numbers.cuh, weights.cuh, stream.cuh, sum.cuh and preview.cuh, and needs these
 * constants more:
 *   ACT      0 silu, 1 gelu_tanh, 2 gelu, 3 relu
 *   CHUNKS   chunks of a decision
 *   SECOND   whether there is a second one
 *   PRODUCTS whether the preview is of w_up, too
 *   OWN      whether it is w_gate itself, and w_up is packed alike
 */

/* Problem of cuda.py. Pitch is from row to row of a stage, in bytes. */
struct Problem {
    const weight_t *x;
    Matrix w_gate, w_up, w_down_t;
    const float *threshold, *product_threshold, *mean;
    float *partial; /* [blocks, tokens, columns] */
    Norm norm; /* of x */
    int tokens, hidden, neurons, columns, threshold_stride, product_stride;
    int capacity, pitch, stage, stages; /* pitch and stage in bytes */
    int early; /* whether weights and thresholds may be read before the previous kernel has ended */
#if PREVIEW
    Preview preview;
#endif
};

#if PREVIEW
#define STEP TILE /* rows of gate that are multiplied at once */
#else
#define STEP ROWS
#endif
#if OWN
#define UP_STEP TILE
#else
#define UP_STEP ROWS
#endif

enum Which { GATE, UP, DOWN };

/* Where a chunk of n rows begins and how long it is: whole stages of STEP rows. */
DEVICE int chunk_of(int n, int step) { return ((n + CHUNKS - 1) / CHUNKS + step - 1) / step * step; }

DEVICE float activate(float z) {
#if ACT == 0
    return z / (1.0f + expf(-z));
#elif ACT == 1 /* 0.5 z (1 + tanh(a)) = z / (1 + exp(-2 a)) */
    return z / (1.0f + expf(-1.5957691216057308f * (z + 0.044715f * z * z * z)));
#elif ACT == 2
    return 0.5f * z * (1.0f + erff(z * 0.7071067811865476f));
#else
    return z < 0.0f ? 0.0f : z; /* not fmaxf, which hides NaN */
#endif
}

/* ---- the kernels ---------------------------------------------------------------------------- */

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1)
    gated_mlp(const __grid_constant__ Problem p) {
    extern __shared__ __align__(128) char memory[];
    __shared__ u64 full[MAX_STAGES], empty[MAX_STAGES], listed[1 + SECOND][CHUNKS];
    __shared__ int upto[1 + SECOND][CHUNKS], warp_counts[1 + SECOND][CHUNKS][WARPS];
    char *after_stages = memory + p.stages * p.stage;
#if PREVIEW
    weight_t *x_row = (weight_t *)after_stages; /* [TOKENS, INPUTS], first their digits */
    float *units = (float *)(after_stages + TOKENS * INPUTS * SIZE); /* [TOKENS, ROW_GROUPS] */
    after_stages = (char *)(units + TOKENS * ROW_GROUPS);
#endif
    /* [capacity, TOKENS, PITCH]; a preview's are a chunk's alone, of w_gate and then of w_up. */
    float *dots = (float *)after_stages;
    int most = PRODUCTS ? max(p.capacity, 2 * chunk_of(p.capacity, STEP)) : p.capacity;
    float *hidden = dots + most * TOKENS * PITCH; /* [capacity, TOKENS]: g of kept, then h */
    int *list = (int *)(hidden + p.capacity * TOKENS);  /* [capacity]: kept neurons, their tokens */
#if ROW_SCALES
    float *scales = (float *)(list + p.capacity); /* [3, capacity]: gate's, up's, down's of kept */
#endif
    auto scale_of = [&](int matrix, int place) {
#if ROW_SCALES
        return scales[matrix * p.capacity + place];
#else
        return 1.0f;
#endif
    };
    auto listed_row = [&](int k) { return list[k] & NEURON; };

    int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    int first = (int)((long long)p.neurons * blockIdx.x / gridDim.x);
    int count = (int)((long long)p.neurons * (blockIdx.x + 1) / gridDim.x) - first;
    int chunk = chunk_of(count, STEP);
    Ring ring{memory, full, empty, p.stages, p.stage, p.pitch};
    launch_dependents();
    if (tid == 0) {
        for (int s = 0; s < p.stages; s++)
            barrier_init(full + s, 1), barrier_init(empty + s, WARPS);
        for (int c = 0; c < CHUNKS * (1 + SECOND); c++) barrier_init(listed[0] + c, THREADS);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();

    if (warp == WARPS) { /* ---- the producer ---- */
        if (lane) return;
        if (!p.early) wait_for_previous();
        u64 policy;
        asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
        int kept = 0;
        /* Listed rows, from k on, a step of them. */
        auto fill_rows = [&](const Matrix &w, int columns, int k) {
            ring.fill(min(ROWS, kept - k), w, columns, policy,
                      [&](int i) { return listed_row(k + i); });
        };
        auto fill_up = [&](int k) {
#if OWN
            Preview up{p.w_up.data, p.w_up.scale};
            for (int i = k; i < k + TILE; i += STAGE_ROWS)
                up.gather(ring, max(0, min(STAGE_ROWS, kept - i)), policy,
                          [&](int j) { return listed_row(i + j); });
#else
            fill_rows(p.w_up, p.hidden, k);
#endif
        };
        auto fill = [&](Which which, int k) {
            if (which == UP)
                fill_up(k);
            else if (which == DOWN)
                fill_rows(p.w_down_t, p.columns, k);
            else
                fill_rows(p.w_gate, p.hidden, k);
        };
        /* Listed rows as the chunks of a decision come. */
        auto as_decided = [&](int decision, int step, Which which) {
            int k = 0;
            for (int c = 0; c < CHUNKS; c++) {
                barrier_wait(listed[decision] + c, 0);
                kept = upto[decision][c];
                /* A stage that the next chunk's neurons will fill up waits for them. */
                for (; c + 1 < CHUNKS ? k + step <= kept : k < kept; k += step)
                    fill(which, k);
            }
        };
#if PREVIEW
        for (int k = 0; k < count; k += TILE)
            for (int row = first; row <= first + PRODUCTS * p.neurons; row += p.neurons)
                for (int i = k; i < k + TILE; i += STAGE_ROWS)
                    p.preview.fill(ring, row + i, max(0, min(STAGE_ROWS, count - i)), policy);
#else
        for (int k = 0; k < count; k += ROWS)
            ring.fill_run(min(ROWS, count - k), p.w_gate, p.hidden, policy, first + k);
#endif
#if PREVIEW && !OWN
        as_decided(0, ROWS, GATE);
        for (int k = 0; k < kept; k += ROWS) fill(UP, k);
#else
        as_decided(0, UP_STEP, UP);
#endif
        /* Once decided on anew, the list holds the first chunks' neurons alone: every row of up
         * has been asked for by then. */
        if (SECOND)
            as_decided(1, ROWS, DOWN);
        else
            for (int k = 0; k < kept; k += ROWS) fill(DOWN, k);
        return;
    }

    /* ---- the consumers ---- */
    if (!p.early) wait_for_previous();
    float bounds[CHUNKS], own_scales[CHUNKS][3]; /* of this thread's neurons */
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        int k = c * chunk + tid;
        bool live = tid < chunk && k < count;
        bounds[c] = live ? p.threshold[(first + k) * (long long)p.threshold_stride] : 0.0f;
#if ROW_SCALES
        own_scales[c][0] = live ? p.w_gate.row_scale(first + k) : 0.0f;
        own_scales[c][1] = live ? p.w_up.row_scale(first + k) : 0.0f;
        own_scales[c][2] = live ? p.w_down_t.row_scale(first + k) : 0.0f;
#else
        own_scales[c][0] = 1.0f;
#endif
    }
    NormWeights norm_weights(p.norm, p.hidden);
    if (p.early) wait_for_previous();
    float xs[TOKENS][COLUMNS * VEC];
    load_x(p.x, p.tokens, p.hidden, p.norm, norm_weights, xs);
#if !OWN
    Factor factors[TOKENS][COLUMNS];
#endif
#if !PREVIEW
    to_factors(xs, factors);
#else
    to_digits(xs, (signed char *)x_row, units);
    consumers_sync();
    Fragments fragments;
    fragments.load((const signed char *)x_row, units);
#endif
#if PREVIEW && !OWN
    consumers_sync();
#pragma unroll
    for (int t = 0; t < TOKENS; t++)
#pragma unroll
        for (int i = 0; i < COLUMNS * VEC; i++) {
            int at = (tid + i / VEC * THREADS) * VEC + i % VEC;
            if (at < p.hidden) x_row[t * INPUTS + at] = round_to_weight(xs[t][i]);
        }
#endif

    /* Of this thread's entry: its place in the list, after those of the chunk's threads before. */
    auto place_of = [&](int decision, int c, bool live, int &kept) {
        u32 any = __ballot_sync(ALL, live);
        int *counts = warp_counts[decision][c];
        if (lane == 0) counts[warp] = __popc(any);
        consumers_sync();
        int place = kept + __popc(any & ((1u << lane) - 1));
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            if (w < warp) place += counts[w];
            kept += counts[w];
        }
        return place;
    };

    int kept = 0;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        int from = min(count, c * chunk), to = min(count, from + chunk);
#if PREVIEW
        float *up_dots = dots + chunk * TOKENS * PITCH;
        for (int k = from; k < to; k += TILE) {
            int row = first + from;
            auto row_of = [&](int i) { return row + i; };
            Preview::dot_tile(ring, fragments, k - from, to - from, dots, row_of);
            row += p.neurons;
            if (PRODUCTS)
                Preview::dot_tile(ring, fragments, k - from, to - from, up_dots, row_of);
        }
#else
        dot_rows(ring, from, to, p.hidden, factors, dots);
#endif
        consumers_sync();
        /* Decide, a thread a neuron, and list the kept ones in order. */
        int k = from + tid, entry = first + k;
        bool live = k < to;
        float g[TOKENS];
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
#if PREVIEW
            g[t] = live ? activate(dot_of(dots, tid, t)) : 0.0f;
            if (PRODUCTS && live) g[t] *= dot_of(up_dots, tid, t);
#else
            g[t] = live ? activate(dot_of(dots, k, t) * own_scales[c][0]) : 0.0f;
#endif
            bool keep = live && t < p.tokens && fabsf(g[t]) > bounds[c];
            entry |= keep << (TOKEN_BIT + t);
            if (!keep) g[t] = 0.0f;
        }
        int place = place_of(0, c, entry > NEURON, kept);
        if (entry > NEURON) {
            list[place] = entry;
#pragma unroll
            for (int t = 0; t < TOKENS; t++) hidden[place * TOKENS + t] = g[t];
#if ROW_SCALES
#pragma unroll
            for (int m = 0; m < 3; m++) scales[m * p.capacity + place] = own_scales[c][m];
#endif
        }
        if (tid == 0) upto[0][c] = kept;
        barrier_arrive(listed[0] + c);
    }
    /* New dots go where the last ones were: all have read those before the last barrier. */
#if PREVIEW && !OWN
    /* Read again rather than kept: registers are scarce while the preview streams. */
#pragma unroll
    for (int t = 0; t < TOKENS; t++)
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            int at = (tid + c * THREADS) * VEC;
            uint4 piece = {0, 0, 0, 0};
            if (at < p.hidden) piece = *(const uint4 *)(x_row + t * INPUTS + at);
            float v[VEC];
            unpack(piece, v);
            factors[t][c].set(v);
        }
    dot_rows(ring, 0, kept, p.hidden, factors, dots);
    consumers_sync();
    for (int i = tid; i < kept * TOKENS; i += THREADS) {
        int k = i / TOKENS, t = i % TOKENS;
        bool keep = list[k] >> (TOKEN_BIT + t) & 1;
        hidden[i] = keep ? activate(dot_of(dots, k, t) * scale_of(0, k)) : 0.0f;
    }
    consumers_sync();
#endif
    auto dot_up = [&](int from, int to) {
#if OWN
        for (int k = from; k < to; k += TILE)
            Preview::dot_tile(ring, fragments, k, to, dots,
                              [&](int i) { return listed_row(min(i, to - 1)); });
#else
        dot_rows(ring, from, to, p.hidden, factors, dots);
#endif
    };
#if SECOND
    int found = kept;
    chunk = chunk_of(found, UP_STEP);
    kept = 0;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        int from = min(found, c * chunk), to = min(found, from + chunk), k = from + tid;
        dot_up(from, to);
        consumers_sync();
        int entry = k < to ? list[k] : 0, neuron = entry & NEURON, now = neuron;
        float limit = k < to ? p.product_threshold[neuron * (long long)p.product_stride] : 0.0f;
        float up_scale = k < to ? scale_of(1, k) : 0.0f, down_scale = k < to ? scale_of(2, k) : 0.0f;
        float h[TOKENS];
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            h[t] = k < to ? hidden[k * TOKENS + t] * (dot_of(dots, k, t) * up_scale) : 0.0f;
            bool keep = entry >> (TOKEN_BIT + t) & 1 && fabsf(h[t]) > limit;
            now |= keep << (TOKEN_BIT + t);
            h[t] = !keep ? 0.0f : p.mean ? h[t] - p.mean[neuron] : h[t];
        }
        int place = place_of(1, c, now > NEURON, kept);
        if (now > NEURON) {
            list[place] = now;
#pragma unroll
            for (int t = 0; t < TOKENS; t++) hidden[place * TOKENS + t] = h[t] * down_scale;
        }
        if (tid == 0) upto[1][c] = kept;
        barrier_arrive(listed[1] + c);
    }
#else
    dot_up(0, kept);
    consumers_sync();
    for (int i = tid; i < kept * TOKENS; i += THREADS) {
        int k = i / TOKENS, t = i % TOKENS, entry = list[k];
        float h = hidden[i] * (dot_of(dots, k, t) * scale_of(1, k));
        if (p.mean && entry >> (TOKEN_BIT + t) & 1) h -= p.mean[entry & NEURON];
        hidden[i] = h * scale_of(2, k);
    }
#endif
    consumers_sync();

    float out[TOKENS][COLUMNS * VEC] = {};
    add_rows(ring, kept, p.columns, list, hidden, out);
    store_partial(out, p.tokens, p.columns, p.partial);
}
