// A CTA's shared memory, and the lists of kept channels in it: of the normed residual, and of what a CTA made itself.
//
// Every CTA that needs the residual's list computes it whole: that takes less than a launch that made it for all.
#pragma once
#include "stages_rows.cuh"

constexpr int OUT = cdiv(DIM, 4);               // float4s of the residual
constexpr bool AHEAD = OUT <= 1024;             // scales and grids of as many columns wait in shared memory
constexpr int NORM = cdiv(DIM, 8 * THREADS);    // eights of channels that a thread norms
constexpr int ROW_O = DIM * BITS_A / 8, ROW_QKV = QKV * BITS_A / 8;  // bytes
constexpr int GROUPS_OUT = BITS_M == 4 ? DIM / GROUP : 1, GROUPS_MLP = BITS_M == 4 ? FFN / GROUP : 1;
constexpr int ROW_MLP = BITS_M == 4 ? cdiv(FFN + 4 * GROUPS_MLP, 32) * 32 : 2 * FFN * BITS_M / 8;  // of kernels/int4.py
constexpr int ROW_DOWN = BITS_M == 4 ? cdiv(DIM / 2 + 2 * GROUPS_OUT, 32) * 32 : DIM * BITS_M / 8;

// A row of DIM columns by segments, a warp each; what warps are left take turns with the rows.
template <int BITS> struct Out {
    static constexpr int C = columns(BITS), SEGMENTS = cdiv(DIM * BITS / 8, SEGMENT), ROUNDS = cdiv(SEGMENTS, WARPS);
    static constexpr int TURNS = most(1, WARPS / SEGMENTS), PITCH = C / 4 * 33;  // float4s of a segment, padded
    static constexpr int SIZE = TURNS * SEGMENTS * PITCH;
};

// Gate and up of CHANNELS channels: a thread of a row has a piece of either; slots of threads take turns with the rows.
constexpr int C_MLP = columns(BITS_M), PIECES = CHANNELS / C_MLP, WIDTH = 2 * PIECES, SLOTS = THREADS / WIDTH;
constexpr int BOTH = WIDTH * C_MLP / 4;  // float4s
constexpr int MLP_GROUPS = BITS_M == 4 ? cdiv(GROUP - common(CHANNELS, GROUP) + CHANNELS, GROUP) : 0;  // in its columns

constexpr int SHARING = HEADS / KV_HEADS;                       // heads of a key/value head
constexpr int QUERIES = cdiv(SHARING, BATCHES);  // of these a CTA of stage_attention takes

constexpr int PART = most(most(WARPS * columns(BITS_A) / 4 * 33, most(Out<BITS_A>::SIZE, Out<BITS_M>::SIZE)),
                          most(most(SLOTS * BOTH, WARPS * HEAD_DIM * QUERIES / 4), cdiv(DIM, 32 * 16) * 32 * 16 / 8));

struct Shared {
    float4 part[PART];     // sums of threads or warps
    float4 some[THREADS];  // sums of groups of these
    alignas(16) u16 q[QUERIES * HEAD_DIM], k[HEAD_DIM], v[HEAD_DIM];
    float own[QUERIES], peak[WARPS * QUERIES], total[WARPS * QUERIES], sums[WARPS], peaks[WARPS];
    int counts[WARPS];
    alignas(16) uint2 list[most(DIM, most(HEAD_DIM, CHANNELS)) + 2];
    float4 scale[AHEAD && BITS_A <= 8 ? OUT : 1], grid[AHEAD ? OUT : 1];
    alignas(16) u16 gate_up_groups[most(2 * MLP_GROUPS * DIM, 8)];  // four bits: scales of rows
    alignas(16) u16 down_groups[BITS_M == 4 ? CHANNELS * GROUPS_OUT : 8];
};
extern "C" { __device__ char shared_bytes[sizeof(Shared)]; }  // for its size, which the host asks for
extern __shared__ uint4 shared_memory[];
__device__ __forceinline__ Shared& shared() { return *(Shared*)shared_memory; }

// Fixed point for values of this largest size: what a level is worth, and its inverse. NaN stays NaN.
struct Fixed {
    float unit = 1, inverse = 1, most = 0;
    bool outliers = false;  // the same in all threads
    int apart = 0;          // how many there are: they stand behind the list, after an empty entry
    __device__ void reach(float peak, float usual, float scale) {
        outliers = peak > BEYOND * usual;
        most = (outliers ? HELD * usual : peak) * scale;
        unit = most / LEVELS, inverse = most > 1e-30f ? LEVELS / most : 0;
    }
};

template <int BITS> __device__ __forceinline__ bool is_outlier(float x, const Fixed& fixed) {
    return BITS <= 8 && fixed.outliers && fabsf(x) > fixed.most;
}
template <int BITS> __device__ __forceinline__ uint2 entry(int k, float x, const Fixed& fixed) {
    if (BITS == 16 || is_outlier<BITS>(x, fixed)) return make_uint2(k, bits_of(x));
    const float z = x * fixed.inverse;
    return make_uint2(k, BITS == 8 ? bits_of(z + ROUNDING) & 0xffff : bits_of(z));
}

constexpr int OUTLIER = 1 << 16;  // what one counts: outliers have the upper half of a number

// The number of set marks before this thread's, and of all, where a thread has `mine`; a barrier is in it.
__device__ __forceinline__ int place(Shared& s, int mine, int& all) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int upto = mine;
#pragma unroll
    for (int o = 1; o < 32; o <<= 1) {
        const int before = __shfl_up_sync(~0u, upto, o);
        if (lane >= o) upto += before;
    }
    if (lane == 31) s.counts[warp] = upto;
    __syncthreads();
    const int count = lane < WARPS ? s.counts[lane] : 0;
    int before = lane < warp ? count : 0;
    all = count;
#pragma unroll
    for (int o = 16; o; o >>= 1) before += __shfl_xor_sync(~0u, before, o), all += __shfl_xor_sync(~0u, all, o);
    return before + upto - mine;
}

// Eight channels of the residual from k on, with what o and, if any, the MLP have added since.
__device__ __forceinline__ void add_updates(const float* residual, const float* o, const float* mlp, int k, float* x) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
        float4 a = plus(fresh4(residual + k + i), fresh4(o + k + i));
        if (mlp) a = plus(a, fresh4(mlp + k + i));
        x[i] = a.x, x[i + 1] = a.y, x[i + 2] = a.z, x[i + 3] = a.w;
    }
}

// What a norm is given beforehand, and what it makes of the residual: a thread has NORM times eight channels.
struct Norm {
    uint4 weight[NORM];
    float4 threshold[NORM][2];
    float x[NORM][8];
    Fixed fixed;
    float peak;  // the largest |x|, or a little more

    static __device__ __forceinline__ int channel(int p) { return (p * THREADS + threadIdx.x) * 8; }

    __device__ __forceinline__ void prepare(const u16* weights, const float* thresholds) {
#pragma unroll
        for (int p = 0; p < NORM; p++)
            if (const int k = channel(p); k < DIM) {
                weight[p] = __ldg((const uint4*)(weights + k));
                if (thresholds) threshold[p][0] = load4(thresholds + k), threshold[p][1] = load4(thresholds + k + 4);
            }
    }

    // residual(k, x) gives eight channels from k on.
    template <class Source> __device__ __forceinline__ void compute(Shared& s, Source residual, float eps) {
        const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
        float sum = 0;
        peak = 0;
#pragma unroll
        for (int p = 0; p < NORM; p++)
            if (const int k = channel(p); k < DIM) {
                float w[8];
                residual(k, x[p]);
                widen(weight[p], w);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    sum += x[p][i] * x[p][i];
                    x[p][i] *= w[i];
                    peak = fmaxf(peak, fabsf(x[p][i]));
                }
            }
        sum = across(sum, add, 1, 32), peak = across(peak, larger, 1, 32);
        if (lane == 0) s.sums[warp] = sum, s.peaks[warp] = peak;
        __syncthreads();
        const float peaks = s.peaks[lane % WARPS];
        sum = across(s.sums[lane % WARPS], add, 1, WARPS), peak = across(peaks, larger, 1, WARPS);
        const float usual = across(peaks > 0 ? peaks : __int_as_float(0x7f800000), smaller, 1, WARPS);
        const float scale = rsqrtf(sum / DIM + eps);
        fixed.reach(peak, usual, scale * 1.01f);  // x is yet to be rounded to 16 bits
        peak *= scale * 1.01f;
#pragma unroll
        for (int p = 0; p < NORM; p++)
#pragma unroll
            for (int i = 0; i < 8; i++) x[p][i] = rounded(x[p][i] * scale);
    }

    // The list of the channels with |x| above their thresholds; returns its length, without outliers.
    template <int BITS> __device__ __forceinline__ int list(Shared& s) {
        u32 kept[NORM];
        int mine = 0, all;  // outliers are counted from bit 16 on
#pragma unroll
        for (int p = 0; p < NORM; p++) {
            const float t[8] = {threshold[p][0].x, threshold[p][0].y, threshold[p][0].z, threshold[p][0].w,
                                threshold[p][1].x, threshold[p][1].y, threshold[p][1].z, threshold[p][1].w};
            kept[p] = 0;
            if (channel(p) < DIM)
#pragma unroll
                for (int i = 0; i < 8; i++) kept[p] |= (fabsf(x[p][i]) <= t[i] ? 0u : 1u) << i;  // NaN is kept
            mine += __popc(kept[p]);
            if (BITS <= 8 && fixed.outliers)
#pragma unroll
                for (int i = 0; i < 8; i++)
                    if (kept[p] >> i & 1 && is_outlier<BITS>(x[p][i], fixed)) mine += OUTLIER - 1;
        }
        int at = place(s, mine, all);
        const int n = all % OUTLIER;
        int behind = n + 1 + at / OUTLIER;
        at %= OUTLIER, fixed.apart = all / OUTLIER;
#pragma unroll
        for (int p = 0; p < NORM; p++)
#pragma unroll
            for (int i = 0; i < 8; i++)
                if (kept[p] >> i & 1)
                    s.list[is_outlier<BITS>(x[p][i], fixed) ? behind++ : at++] = entry<BITS>(channel(p) + i, x[p][i], fixed);
        if (threadIdx.x == 0) s.list[n] = make_uint2(0, 0);  // the other half of the last pair
        __syncthreads();
        return n;
    }
};

// The list of N values, of which threads below N have one each, rounded already: rows are numbered from 0. Two barriers, or
// four where there are outliers.
template <int BITS, int N> __device__ __forceinline__ int short_list(Shared& s, float x, float threshold, Fixed& fixed) {
    constexpr int FULL = cdiv(N, 32);  // warps with values
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const bool kept = threadIdx.x < N && !(fabsf(x) <= threshold);
    if (BITS <= 8 && warp < FULL) {
        const float mine = threadIdx.x < N ? x : 0;
        const float peak = across(fabsf(mine), larger, 1, 32) + across(mine * 0, add, 1, 32);  // NaN and inf give NaN
        if (lane == 0) s.peaks[warp] = peak;
    }
    int n;
    int at = place(s, kept, n);
    if (BITS <= 8) {
        float peak = 0, usual = __int_as_float(0x7f800000);
#pragma unroll
        for (int i = 0; i < FULL; i++) {
            const float p = s.peaks[i];
            peak = p <= peak ? peak : p;  // NaN wins, and stays
            if (peak != peak) break;
            if (p > 0) usual = fminf(usual, p);
        }
        fixed.reach(peak, usual, 1);
        if (fixed.outliers) {
            const bool far = kept && is_outlier<BITS>(x, fixed);
            __syncthreads();  // all have read their places
            at = place(s, far ? OUTLIER : kept, n);
            fixed.apart = n / OUTLIER, n %= OUTLIER;
            at = far ? n + 1 + at / OUTLIER : at % OUTLIER;
        }
    }
    if (kept) s.list[at] = entry<BITS>(threadIdx.x, x, fixed);
    if (threadIdx.x == 0) s.list[n] = make_uint2(0, 0);
    __syncthreads();
    return n;
}
