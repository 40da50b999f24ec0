// Rows of a weight times the entries of a list in shared memory: 16 bytes of a row a thread, two batches on their way.
//
// An entry is a row's number and its x: fp32 bits for rows of 16 bits; for int8 a whole number of 16 bits, which two rows'
// weights meet in one DP2A; for four bits a float in such units, which is rounded once the row's own scale is in it. An
// entry too large for fixed point (kernels/outliers.py) stands there as zero with its 16-bit float above the row's
// number, and `add_outliers` adds it in fp32. So int8 and four bits take up to 65,536 rows.
#pragma once
#include "stages_base.cuh"

template <int BITS> struct Sum;

template <> struct Sum<16> {
    static constexpr int C = 8;
    struct Row { uint4 w; float x; };
    float y[C] = {};
    static __device__ int steps(int n) { return n; }
    template <int ROW, int STRIDE>
    static __device__ __forceinline__ void load(Row& r, const uint2* list, int p, int n, const u8* base, const u16*) {
        r.x = 0, r.w = make_uint4(0, 0, 0, 0);
        if (p < n) {
            const uint2 e = list[p];
            r.x = __uint_as_float(e.y), r.w = load_weights(base + (u64)e.x * ROW);
        }
    }
    __device__ __forceinline__ void use(const Row& r) {
        float w[C];
        widen(r.w, w);
#pragma unroll
        for (int i = 0; i < C; i++) y[i] += w[i] * r.x;
    }
    __device__ __forceinline__ float value(int i, float) const { return y[i]; }
};

__device__ __forceinline__ int dot_low(int x, u32 w, int y) {
    asm("dp2a.lo.s32.s32 %0, %1, %2, %0;" : "+r"(y) : "r"(x), "r"(w));
    return y;
}
__device__ __forceinline__ int dot_high(int x, u32 w, int y) {
    asm("dp2a.hi.s32.s32 %0, %1, %2, %0;" : "+r"(y) : "r"(x), "r"(w));
    return y;
}
__device__ __forceinline__ void dots(int x, u32 lo, u32 hi, int* y) {  // of two rows' bytes side by side
    y[0] = dot_low(x, lo, y[0]), y[1] = dot_high(x, lo, y[1]);
    y[2] = dot_low(x, hi, y[2]), y[3] = dot_high(x, hi, y[3]);
}
// Four-bit values in the upper halves of bytes as signed bytes: (value - 8) * 16.
__device__ __forceinline__ u32 nibbles(u32 w) { return (w & 0xf0f0f0f0u) ^ 0x80808080u; }

template <int BITS> struct WholeSum {  // int8 and four bits: pairs of rows, exact sums in 32 bits
    static constexpr int C = columns(BITS);
    struct Row { uint4 w, z; int x; };
    int y[C] = {};
    static __device__ int steps(int n) { return (n + 1) >> 1; }
    static __device__ __forceinline__ u32 whole(u32 entry, u32 row, const u16* scales, int stride) {
        if (BITS == 8) return entry;
        const float scale = __uint_as_float((u32)scales[row * stride] << 16);
        return bits_of(__fmaf_rn(__uint_as_float(entry), scale, ROUNDING));
    }
    template <int ROW, int STRIDE>
    static __device__ __forceinline__ void load(Row& r, const uint2* list, int p, int n, const u8* base, const u16* scales) {
        r.x = 0, r.w = r.z = make_uint4(0, 0, 0, 0);
        if (p < n) {
            const uint4 e = ((const uint4*)list)[p];
            const u32 k = e.x & 0xffff, l = e.z & 0xffff;
            r.w = load_weights(base + (u64)k * ROW), r.z = load_weights(base + (u64)l * ROW);
            r.x = __byte_perm(whole(e.y, k, scales, STRIDE), whole(e.w, l, scales, STRIDE), 0x5410);
        }
    }
    __device__ __forceinline__ void use(const Row& r) {
        const u32 w[4] = {r.w.x, r.w.y, r.w.z, r.w.w}, z[4] = {r.z.x, r.z.y, r.z.z, r.z.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const u32 lo = __byte_perm(w[i], z[i], 0x5140), hi = __byte_perm(w[i], z[i], 0x7362);
            if (BITS == 8) {
                dots(r.x, lo, hi, y + 4 * i);
            } else {  // 16 bytes hold values 0 to 15 in their low halves, 16 to 31 in their high ones
                dots(r.x, nibbles(lo << 4), nibbles(hi << 4), y + 4 * i);
                dots(r.x, nibbles(lo), nibbles(hi), y + 16 % C + 4 * i);
            }
        }
    }
    __device__ __forceinline__ float value(int i, float unit) const { return y[i] * (BITS == 8 ? unit : unit / 16); }
};
template <> struct Sum<8> : WholeSum<8> {};
template <> struct Sum<4> : WholeSum<4> {};

// Adds the list's entries first, first + step, … (pairs of them, of whole numbers) times their rows, each ROW bytes, from
// `base` on. scales: of four bits, row k's at k * STRIDE.
template <int UNROLL, int ROW, int STRIDE = 0, int BITS>
__device__ __forceinline__ void walk(
    Sum<BITS>& y, const uint2* list, int n, int first, int step, const u8* base, const u16* scales = nullptr) {
    typename Sum<BITS>::Row a[UNROLL], b[UNROLL];
    n = Sum<BITS>::steps(n);
#pragma unroll
    for (int u = 0; u < UNROLL; u++) Sum<BITS>::template load<ROW, STRIDE>(a[u], list, first + u * step, n, base, scales);
    for (int p = first; p < n; p += 2 * UNROLL * step) {
#pragma unroll
        for (int u = 0; u < UNROLL; u++)
            Sum<BITS>::template load<ROW, STRIDE>(b[u], list, p + (UNROLL + u) * step, n, base, scales);
#pragma unroll
        for (int u = 0; u < UNROLL; u++) y.use(a[u]);
#pragma unroll
        for (int u = 0; u < UNROLL; u++)
            Sum<BITS>::template load<ROW, STRIDE>(a[u], list, p + (2 * UNROLL + u) * step, n, base, scales);
#pragma unroll
        for (int u = 0; u < UNROLL; u++) y.use(b[u]);
    }
}

// A thread's sums as float4s, `stride` apart.
template <int BITS> __device__ __forceinline__ void store(const Sum<BITS>& y, float4* to, int stride, float unit) {
#pragma unroll
    for (int i = 0; i < Sum<BITS>::C; i += 4)
        to[i / 4 * stride] = make_float4(y.value(i, unit), y.value(i + 1, unit), y.value(i + 2, unit), y.value(i + 3, unit));
}

// The list's outliers, which fixed point leaves out, added to a thread's stored sums; one thread a column does it. Rare.
template <int BITS, int ROW, int STRIDE = 0>
__device__ __forceinline__ void add_outliers(
    float4* to, int stride, const uint2* outliers, int n, const u8* base, const u16* scales = nullptr) {
    for (int p = 0; p < n; p++) {
        const u32 k = outliers[p].x;
        const float value = __uint_as_float(outliers[p].y);
        const float x = BITS == 4 ? value * __uint_as_float((u32)scales[k * STRIDE] << 16) : value;
        const uint4 w = load_weights(base + (u64)k * ROW);
        const u32 word[4] = {w.x, w.y, w.z, w.w};
        for (int i = 0; i < Sum<BITS>::C / 4; i++) {
            const u32 bytes = BITS == 8 ? word[i] : word[i % 4] >> (i < 4 ? 0 : 4) & 0x0f0f0f0fu;
            float v[4];
            for (int j = 0; j < 4; j++) v[j] = BITS == 8 ? (int)(signed char)(bytes >> 8 * j) : (int)(bytes >> 8 * j & 15) - 8;
            to[i * stride] = plus(to[i * stride], make_float4(v[0] * x, v[1] * x, v[2] * x, v[3] * x));
        }
    }
}
