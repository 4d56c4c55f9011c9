/* What the kernels share: numbers of the weights' type, activations, dependent launch.
 *   DTYPE    0 bf16, 1 fp16, 2 fp32      ACT      0 silu, 1 gelu_tanh, 2 gelu, 3 relu
 */
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;

#if DTYPE == 2
typedef float weight_t;
#else
typedef unsigned short weight_t;
#endif

#define SIZE ((int)sizeof(weight_t))
#define DEVICE static __device__ __forceinline__
#define DEVICE_METHOD __device__ __forceinline__

DEVICE float half_to_float(u32 bits) {
    float value;
    asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(value) : "r"(bits));
    return value;
}

DEVICE float weight_to_float(weight_t value) {
#if DTYPE == 2
    return value;
#elif DTYPE == 0
    return __uint_as_float((u32)value << 16);
#else
    return half_to_float(value);
#endif
}

DEVICE weight_t round_to_weight(float value) {
#if DTYPE == 2
    return value;
#else
    weight_t rounded;
#if DTYPE == 0
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(value));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded) : "f"(value));
#endif
    return rounded;
#endif
}

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

/* Programmatic dependent launch: a kernel starts before the one ahead of it has ended. */
DEVICE void launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
