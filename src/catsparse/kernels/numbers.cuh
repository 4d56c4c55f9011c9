/* What every kernel shares: weights' numbers and programmatic dependent launch. Prepended to a
 * kernel's source, which is built at run time (nvrtc.py, no headers) with the constant
 *   DTYPE    0 bf16, 1 fp16, 2 fp32
 */

typedef unsigned int u32;
typedef unsigned long long u64;

#if DTYPE == 2
typedef float weight_t;
#else
typedef unsigned short weight_t;
#endif

#define SIZE ((int)sizeof(weight_t))
#define VEC (16 / SIZE) /* elements of a piece */
#define ALL 0xffffffffu
#define DEVICE static __device__ __forceinline__
#define DEVICE_METHOD __device__ __forceinline__

/* ---- numbers ------------------------------------------------------------------------------- */

DEVICE float half_to_float(u32 bits) {
    float value;
    asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(value) : "r"(bits));
    return value;
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

DEVICE float to_float(weight_t value) {
#if DTYPE == 2
    return value;
#elif DTYPE == 0
    return __uint_as_float((u32)value << 16);
#else
    return half_to_float(value);
#endif
}

DEVICE float rounded(float value) { return to_float(round_to_weight(value)); }

DEVICE void unpack(uint4 piece, float (&v)[VEC]) {
    u32 word[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
    for (int e = 0; e < VEC; e++) {
#if DTYPE == 2
        v[e] = __uint_as_float(word[e]);
#elif DTYPE == 0
        v[e] = __uint_as_float(e % 2 ? word[e / 2] & 0xffff0000u : word[e / 2] << 16);
#else
        v[e] = half_to_float(e % 2 ? word[e / 2] >> 16 : word[e / 2] & 0xffffu);
#endif
    }
}

/* ---- dependent launch ------------------------------------------------------------------------ */

DEVICE void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;"); }

DEVICE void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

