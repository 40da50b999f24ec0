// What all CUDA C++ here shares: numbers, 16-bit floats (HALF_IS_FP16: fp16, else bf16), loads, matrix instructions. No header
// of CUDA's is included: NVRTC alone is enough to compile this.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr int cdiv(int a, int b) { return (a + b - 1) / b; }
constexpr int most(int a, int b) { return a > b ? a : b; }
constexpr int least(int a, int b) { return a < b ? a : b; }
constexpr int common(int a, int b) { return b ? common(b, a % b) : a; }  // the greatest common divisor
constexpr int power(int a) { return a <= 1 ? 1 : 2 * power((a + 1) / 2); }  // the next power of two

__device__ __forceinline__ u32 bits_of(float x) { return __float_as_uint(x); }

// ---- 16-bit floats ----
#if HALF_IS_FP16
__device__ __forceinline__ float low(u32 w) {
    float y;
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, a;}" : "=f"(y) : "r"(w));
    return y;
}
__device__ __forceinline__ float high(u32 w) { return low(w >> 16); }
__device__ __forceinline__ u16 half_bits(float x) {
    u16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
#else
__device__ __forceinline__ float low(u32 w) { return __uint_as_float(w << 16); }
__device__ __forceinline__ float high(u32 w) { return __uint_as_float(w & 0xffff0000u); }
__device__ __forceinline__ u16 half_bits(float x) {
    u16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
#endif
__device__ __forceinline__ u32 both(float a, float b) {  // a in the low half
    u32 y;
#if HALF_IS_FP16
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(b), "f"(a));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(b), "f"(a));
#endif
    return y;
}
__device__ __forceinline__ float rounded(float x) { return low(half_bits(x)); }
__device__ __forceinline__ void widen(uint4 w, float* x) {
    const u32 word[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int i = 0; i < 4; i++) x[2 * i] = low(word[i]), x[2 * i + 1] = high(word[i]);
}
__device__ __forceinline__ float half_at(const u16* p, i64 i) { return low(__ldg(p + i)); }
__device__ __forceinline__ u32 multiply_add(u32 a, u32 b, u32 c) {  // of two 16-bit floats each
    u32 y;
#if HALF_IS_FP16
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
#else
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
#endif
    return y;
}

// ---- memory ----
__device__ __forceinline__ uint4 load_weights(const u8* p) {  // read once: past the L1 cache
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
__device__ __forceinline__ uint2 load_weights_8(const u8* p) {
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}
__device__ __forceinline__ float4 plus(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}
__device__ __forceinline__ float4 times(float4 a, float4 b) {
    return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w);
}
__device__ __forceinline__ float4 load4(const float* p) { return __ldg((const float4*)p); }
__device__ __forceinline__ float4 fresh4(const float* p) { return __ldcg((const float4*)p); }  // made in this step
__device__ __forceinline__ float4 bias4(const u16* p) {
    const uint2 w = __ldg((const uint2*)p);
    return make_float4(low(w.x), high(w.x), low(w.y), high(w.y));
}

// ---- matrix instructions ----
// d += a b of 16 x 16 and 16 x 8 entries.
__device__ __forceinline__ void multiply(float* d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm(
#if HALF_IS_FP16
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#else
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#endif
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
