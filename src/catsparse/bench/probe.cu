/* Reads `pieces` 16-byte pieces once, as fast as they come: the bandwidth that a benchmark's byte
 * limit is computed from. Built at run time by kernels/nvrtc.py. */

struct Read {
    const uint4 *data;
    unsigned *out; /* [blocks] */
    long long pieces;
};

#define THREADS 512
#define AT_ONCE 4

extern "C" __global__ void __launch_bounds__(THREADS) read_once(const __grid_constant__ Read p) {
    unsigned sum = 0;
    long long step = (long long)gridDim.x * THREADS * AT_ONCE;
    long long begin = (long long)blockIdx.x * THREADS * AT_ONCE + threadIdx.x;
    for (long long i = begin; i < p.pieces; i += step) {
        uint4 v[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            long long at = i + k * THREADS;
            v[k] = at < p.pieces ? __ldcs(p.data + at) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) sum += v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
    }
    /* So that no read is left out as useless. */
    if (sum == 0x9e3779b9) p.out[blockIdx.x] = sum;
}
