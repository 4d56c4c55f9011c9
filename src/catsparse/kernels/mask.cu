/* What stands between the dense matmuls of a masked gated MLP, in one pass over [tokens, neurons]:
 *   u[t, i] = |act(z[t, i])| > threshold[i] ? act(z[t, i]) u[t, i] : mean[i]
 * Built at run time (nvrtc.py) with DTYPE and ACT (numbers.cuh). */

#include "numbers.cuh"

struct Mask {
    const weight_t *z;
    weight_t *u;
    const float *threshold, *mean;
    int tokens, neurons, threshold_stride;
};

extern "C" __global__ void __launch_bounds__(256) masked_hidden(const __grid_constant__ Mask p) {
    wait_for_previous();
    int i = blockIdx.x * 256 + threadIdx.x;
    if (i >= p.neurons) return;
    float limit = p.threshold[i * (long long)p.threshold_stride], mean = p.mean ? p.mean[i] : 0.0f;
    for (int t = 0; t < p.tokens; t++) {
        long long at = (long long)t * p.neurons + i;
        float g = activate(weight_to_float(p.z[at]));
        float h = fabsf(g) > limit ? g * weight_to_float(p.u[at]) : mean;
        p.u[at] = round_to_weight(h);
    }
}
