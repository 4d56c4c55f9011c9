/* Attention of one new token a sequence on NVIDIA GPUs from Hopper on, reading only the slots of
 * the cache that hold a token: norms of q and k, rotary embedding, cache write, softmax, sum.
 *
 * A block takes one sequence, one key-value head with its GROUP query heads, and one share of the
 * slots; lanes of a warp share a slot's key. CLUSTER blocks of a head add their shares through each
 * other's shared memory, each some of the elements. Where one cluster would take too long, several
 * share the slots, and the one that ends last adds theirs through global memory. All sums are in
 * order, so results repeat bit for bit. Stands behind numbers.cuh, with these constants:
 *   HEAD     elements of a head          GROUP    query heads a key-value head
 *   THREADS  of a block, whole warps     CLUSTER  blocks of a cluster: 1, 2, 4 or 8
 *
 * Position, starts and the cache were written before the step began: they are read while the kernel
 * ahead, which computes q, k and v, still runs.
 */

#define WARPS (THREADS / 32)
#define PIECES (HEAD / VEC)                    /* 16-byte pieces of a head */
#define LANES (PIECES < 32 ? PIECES : 32)      /* that share a slot */
#define EACH (PIECES / LANES)                  /* pieces a lane */
#define SLOTS (32 / LANES)                     /* of a warp at a time */
#define DEEP (GROUP * EACH > 2 ? 2 : 4)        /* slots that a lane has under way */
#define STEP (WARPS * SLOTS * DEEP)
#define AHEAD (GROUP * EACH <= 4)              /* whether registers hold the next slots as well */
#define LOWEST -1e30f
#define MOST_SPLITS 64
/* Slots that a block takes before there is another cluster: a few are done sooner by one alone. */
#define FEW 128
#define OUTPUTS (GROUP * HEAD)

/* Attention of attention.py. */
struct Attention {
    const weight_t *qkv;              /* [tokens, (heads + 2 kv_heads) HEAD] */
    weight_t *keys, *values;          /* [tokens, kv_heads, length, HEAD] */
    const weight_t *cosines, *sines;  /* [positions, HEAD] */
    const weight_t *q_norm, *k_norm;  /* [HEAD] or null */
    const long long *position;        /* the new token's slot */
    const long long *starts;          /* [tokens]: first slot of each sequence */
    weight_t *out;                    /* [tokens, heads HEAD] */
    float *partial;                   /* [tokens, kv_heads, splits, GROUP (HEAD + 4)] */
    int *arrived;                     /* [tokens, kv_heads], all 0, and left so */
    long long batch_stride, head_stride; /* of the cache, in elements */
    float scale, q_eps, k_eps, offset;
    int kv_heads, splits, window;
};

/* ---- clusters ------------------------------------------------------------------------------- */

DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\n"
                 "barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/* The float at the same address in another block's shared memory. */
DEVICE float read_from(const float *mine, int rank) {
    u32 address = (u32)__cvta_generic_to_shared(mine), there;
    float value;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(there) : "memory");
    return value;
}

/* ---- a head ---------------------------------------------------------------------------------- */

/* One head into shared memory: norm, rotary embedding, scale. By one warp; `all` is room for it. */
DEVICE void prepare(const weight_t *from, const weight_t *norm, float eps, float offset,
                    const weight_t *cosines, const weight_t *sines, float scale, float *all) {
    int lane = threadIdx.x % 32;
    float v[HEAD / 32], squares = 0.0f;
#pragma unroll
    for (int i = 0; i < HEAD / 32; i++) {
        v[i] = to_float(from[lane + i * 32]);
        squares += v[i] * v[i];
    }
    if (norm) {
#pragma unroll
        for (int off = 16; off >= 1; off /= 2) squares += __shfl_xor_sync(ALL, squares, off);
        float inverse = rsqrtf(squares / HEAD + eps);
#pragma unroll
        for (int i = 0; i < HEAD / 32; i++) {
            float w = to_float(norm[lane + i * 32]);
            v[i] = offset ? v[i] * inverse * (offset + w) : rounded(v[i] * inverse) * w;
            v[i] = rounded(v[i]);
        }
    }
    /* The other half of the pair is HEAD / 2 away: in the same lane. */
#pragma unroll
    for (int i = 0; i < HEAD / 32; i++) {
        int d = lane + i * 32, half = HEAD / 64;
        float other = i < half ? -v[i + half] : v[i - half];
        float y = v[i] * to_float(cosines[d]) + other * to_float(sines[d]);
        all[d] = rounded(y) * scale;
    }
}

/* Keys and values that a lane has under way. */
struct Tile {
    uint4 keys[DEEP][EACH], values[DEEP][EACH];
    bool live[DEEP];

    DEVICE_METHOD void load(const Attention &p, long long cache, int base, int low, int high,
                            int place, int slot) {
#pragma unroll
        for (int u = 0; u < DEEP; u++) {
            int at = base + u * SLOTS + slot;
            live[u] = at < high;
            long long offset = cache + (long long)(live[u] ? at : low) * HEAD + place * VEC;
#pragma unroll
            for (int c = 0; c < EACH; c++) {
                keys[u][c] = *(const uint4 *)(p.keys + offset + c * LANES * VEC);
                values[u][c] = *(const uint4 *)(p.values + offset + c * LANES * VEC);
            }
        }
    }
};

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 2)
    attention(const __grid_constant__ Attention p) {
    __shared__ float q[OUTPUTS], k_new[HEAD], v_new[HEAD];
    __shared__ float sums[WARPS][GROUP][HEAD], maxima[WARPS][GROUP], totals[WARPS][GROUP];
    __shared__ float own_top[GROUP], own_total[GROUP]; /* of this block */
    float *own = q; /* [OUTPUTS], once the queries are in registers */
    __shared__ int last;
    int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    int split = blockIdx.x % p.splits, head = blockIdx.x / p.splits % p.kv_heads;
    int token = blockIdx.x / p.splits / p.kv_heads;
    launch_dependents();

    long long position = *p.position, start = p.starts[token];
    int from = (int)start, to = (int)position;
    if (p.window && to - from >= p.window) from = to - p.window + 1;
    int slots = to - from, share = (slots + CLUSTER - 1) / CLUSTER;
    if (share > FEW) share = max((slots + p.splits - 1) / p.splits, FEW);
    share = max(1, (share + STEP - 1) / STEP) * STEP;
    /* Clusters with slots, at least one; all blocks of those go on. */
    int used = max(1, (slots + share * CLUSTER - 1) / (share * CLUSTER));
    int cluster = split / CLUSTER, rank = split % CLUSTER;
    if (cluster >= used) return;
    int low = min(to, from + split * share), high = min(to, low + share);

    long long cache = token * p.batch_stride + head * p.head_stride;
    int place = lane % LANES, slot = lane / LANES;
    Tile tile;
    int base = low + warp * SLOTS * DEEP;
    if (base < high) tile.load(p, cache, base, low, high, place, slot);

    wait_for_previous();
    const weight_t *qkv = p.qkv + (long long)token * (GROUP + 2) * p.kv_heads * HEAD;
    const weight_t *cosines = p.cosines + (position - start) * HEAD;
    const weight_t *sines = p.sines + (position - start) * HEAD;
    const float LOG2E = 1.4426950408889634f;
    for (int g = warp; g < GROUP; g += WARPS)
        prepare(qkv + (head * GROUP + g) * HEAD, p.q_norm, p.q_eps, p.offset, cosines, sines,
                p.scale * LOG2E, q + g * HEAD);
    if (split == 0 && warp == WARPS - 1) {
        const weight_t *key = qkv + (GROUP * p.kv_heads + head) * HEAD;
        const weight_t *value = key + p.kv_heads * HEAD;
        prepare(key, p.k_norm, p.k_eps, p.offset, cosines, sines, 1.0f, k_new);
#pragma unroll
        for (int i = 0; i < HEAD / 32; i++) {
            int d = lane + i * 32;
            v_new[d] = to_float(value[d]);
            p.keys[cache + position * HEAD + d] = round_to_weight(k_new[d]);
            p.values[cache + position * HEAD + d] = value[d];
        }
    }
    __syncthreads();

    float mine[GROUP][EACH * VEC], sum[GROUP][EACH * VEC] = {}, top[GROUP], total[GROUP] = {};
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
        top[g] = LOWEST;
#pragma unroll
        for (int c = 0; c < EACH; c++)
#pragma unroll
            for (int e = 0; e < VEC; e++)
                mine[g][c * VEC + e] = q[g * HEAD + (place + c * LANES) * VEC + e];
    }
    if (split == 0 && warp == 0) { /* the new token, in the first slot's lanes */
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            float dot = 0.0f;
#pragma unroll
            for (int c = 0; c < EACH; c++)
#pragma unroll
                for (int e = 0; e < VEC; e++)
                    dot += mine[g][c * VEC + e] * k_new[(place + c * LANES) * VEC + e];
#pragma unroll
            for (int off = LANES / 2; off >= 1; off /= 2) dot += __shfl_xor_sync(ALL, dot, off);
            if (slot == 0) {
                top[g] = dot, total[g] = 1.0f;
#pragma unroll
                for (int c = 0; c < EACH; c++)
#pragma unroll
                    for (int e = 0; e < VEC; e++)
                        sum[g][c * VEC + e] = v_new[(place + c * LANES) * VEC + e];
            }
        }
    }

    for (; base < high; base += STEP) {
        Tile now;
        if constexpr (AHEAD) {
            now = tile;
            if (base + STEP < high) tile.load(p, cache, base + STEP, low, high, place, slot);
        } else {
            if (base >= low + STEP) tile.load(p, cache, base, low, high, place, slot);
            now = tile;
        }
        float score[DEEP][GROUP] = {};
#pragma unroll
        for (int u = 0; u < DEEP; u++) {
#pragma unroll
            for (int c = 0; c < EACH; c++) {
                float k[VEC];
                unpack(now.keys[u][c], k);
#pragma unroll
                for (int g = 0; g < GROUP; g++)
#pragma unroll
                    for (int e = 0; e < VEC; e++) score[u][g] += mine[g][c * VEC + e] * k[e];
            }
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
#pragma unroll
                for (int off = LANES / 2; off >= 1; off /= 2)
                    score[u][g] += __shfl_xor_sync(ALL, score[u][g], off);
                if (!now.live[u]) score[u][g] = LOWEST;
            }
        }
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            float higher = top[g];
#pragma unroll
            for (int u = 0; u < DEEP; u++) higher = fmaxf(higher, score[u][g]);
            float keep = exp2f(top[g] - higher);
            top[g] = higher;
            total[g] *= keep;
#pragma unroll
            for (int i = 0; i < EACH * VEC; i++) sum[g][i] *= keep;
#pragma unroll
            for (int u = 0; u < DEEP; u++) {
                score[u][g] = now.live[u] ? exp2f(score[u][g] - higher) : 0.0f;
                total[g] += score[u][g];
            }
        }
#pragma unroll
        for (int u = 0; u < DEEP; u++)
#pragma unroll
            for (int c = 0; c < EACH; c++) {
                float v[VEC];
                unpack(now.values[u][c], v);
#pragma unroll
                for (int g = 0; g < GROUP; g++)
#pragma unroll
                    for (int e = 0; e < VEC; e++) sum[g][c * VEC + e] += score[u][g] * v[e];
            }
    }

    /* A warp's slots, then the block's warps. */
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
#pragma unroll
        for (int off = LANES; off < 32; off *= 2) {
            float other = __shfl_xor_sync(ALL, top[g], off), higher = fmaxf(top[g], other);
            float keep = exp2f(top[g] - higher);
            total[g] *= keep;
            total[g] += __shfl_xor_sync(ALL, total[g], off);
            top[g] = higher;
#pragma unroll
            for (int i = 0; i < EACH * VEC; i++) {
                sum[g][i] *= keep;
                sum[g][i] += __shfl_xor_sync(ALL, sum[g][i], off);
            }
        }
        if (slot == 0) {
#pragma unroll
            for (int c = 0; c < EACH; c++)
#pragma unroll
                for (int e = 0; e < VEC; e++)
                    sums[warp][g][(place + c * LANES) * VEC + e] = sum[g][c * VEC + e];
            if (place == 0) maxima[warp][g] = top[g], totals[warp][g] = total[g];
        }
    }
    __syncthreads();

    for (int i = tid; i < OUTPUTS; i += THREADS) {
        int g = i / HEAD, d = i % HEAD;
        float higher = LOWEST, all = 0.0f, y = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) higher = fmaxf(higher, maxima[w][g]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float keep = exp2f(maxima[w][g] - higher);
            all += keep * totals[w][g], y += keep * sums[w][g][d];
        }
        own[i] = y;
        if (d == 0) own_top[g] = higher, own_total[g] = all;
    }
    cluster_sync();

    weight_t *out = p.out + ((long long)token * p.kv_heads + head) * OUTPUTS;
    long long unit = (long long)GROUP * (HEAD + 4), pair = (long long)token * p.kv_heads + head;
    int clusters = p.splits / CLUSTER;
    float *partial = p.partial + (pair * clusters + cluster) * unit;
    /* This block's part of the cluster's elements. */
    for (int i = rank * (OUTPUTS / CLUSTER) + tid; i < (rank + 1) * (OUTPUTS / CLUSTER);
         i += THREADS) {
        int g = i / HEAD;
        float tops[CLUSTER], y[CLUSTER], higher = LOWEST, all = 0.0f, sum = 0.0f;
#pragma unroll
        for (int r = 0; r < CLUSTER; r++)
            tops[r] = read_from(own_top + g, r), y[r] = read_from(own + i, r);
#pragma unroll
        for (int r = 0; r < CLUSTER; r++) higher = fmaxf(higher, tops[r]);
#pragma unroll
        for (int r = 0; r < CLUSTER; r++) {
            float keep = exp2f(tops[r] - higher);
            all += keep * read_from(own_total + g, r), sum += keep * y[r];
        }
        if (used == 1)
            out[i] = round_to_weight(sum / all);
        else
            partial[i] = sum;
        if (used > 1 && i % HEAD == 0)
            partial[OUTPUTS + g] = higher, partial[OUTPUTS + GROUP + g] = all;
    }
    if (used > 1) __threadfence();
    cluster_sync(); /* none ends while another reads of it */
    if (used == 1 || rank) return;
    if (tid == 0) {
        last = atomicAdd(p.arrived + pair, 1) == used - 1;
        if (last) p.arrived[pair] = 0;
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
    /* factors[s][g]: what share s of head g counts. */
    const float *shares = p.partial + pair * clusters * unit;
    float *factors = (float *)sums, *tops = factors + MOST_SPLITS * GROUP;
    for (int i = tid; i < used * GROUP; i += THREADS)
        tops[i] = __ldcg(shares + i / GROUP * unit + OUTPUTS + i % GROUP),
        factors[i] = __ldcg(shares + i / GROUP * unit + OUTPUTS + GROUP + i % GROUP);
    __syncthreads();
    if (tid < GROUP) {
        float higher = LOWEST, all = 0.0f;
        for (int s = 0; s < used; s++) higher = fmaxf(higher, tops[s * GROUP + tid]);
        for (int s = 0; s < used; s++) {
            float keep = exp2f(tops[s * GROUP + tid] - higher);
            all += keep * factors[s * GROUP + tid], tops[s * GROUP + tid] = keep;
        }
        for (int s = 0; s < used; s++) tops[s * GROUP + tid] /= all;
    }
    __syncthreads();
    for (int i = tid; i < OUTPUTS / 4; i += THREADS) {
        float4 y = {0.0f, 0.0f, 0.0f, 0.0f};
        const float *keep = tops + i * 4 / HEAD;
#pragma unroll 16
        for (int s = 0; s < used; s++) {
            float4 v = __ldcg((const float4 *)(shares + s * unit) + i);
            float k = keep[s * GROUP];
            y.x += k * v.x, y.y += k * v.y, y.z += k * v.z, y.w += k * v.w;
        }
        out[i * 4] = round_to_weight(y.x), out[i * 4 + 1] = round_to_weight(y.y);
        out[i * 4 + 2] = round_to_weight(y.z), out[i * 4 + 3] = round_to_weight(y.w);
    }
}
