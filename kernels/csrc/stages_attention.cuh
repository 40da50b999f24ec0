// Attention of one token over the cache: rotary embedding, scores and values in one pass (online softmax), and what its
// partial results add up to. A warp takes some positions at a time, 16 bytes of keys and values a thread.
#pragma once
#include "stages_list.cuh"

constexpr int HALF = HEAD_DIM / 2, ACROSS = HEAD_DIM / 8;  // threads of a position
constexpr int ABREAST = 32 / ACROSS, SWEEP = WARPS * ABREAST;  // positions of a warp and of a CTA at once
constexpr int DEEP = 4;  // sweeps on their way
constexpr int RESULT = HEAD_DIM + 2;  // floats of a partial result: sums of values, the largest score, the exponentials

// q of Q heads, k and v as a CTA's threads project them: a thread has a pair to be rotated, or an entry of v. Biases and
// norms come beforehand.
template <int Q> struct Projection {
    static constexpr int PAIRS = (Q + 1) * HALF, EACH = cdiv(PAIRS + HEAD_DIM, THREADS);
    int column[EACH];  // of qkv; -1: none
    float cos[EACH], sin[EACH], bias[EACH][2], weight[EACH][2];

    // head: the first; the last ones are the same where there are but `heads`.
    __device__ __forceinline__ void prepare(const Step& S, const Layer& L, int head, int heads, int kv, int position) {
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int i = e * THREADS + threadIdx.x, d = i % HALF, j = i / HALF;
            const bool is_v = i >= PAIRS;
            column[e] = j < Q ? (head + least(j, heads - 1)) * HEAD_DIM + d : !is_v ? (HEADS + kv) * HEAD_DIM + d
                : i < PAIRS + HEAD_DIM ? (HEADS + KV_HEADS + kv) * HEAD_DIM + i - PAIRS : -1;
            bias[e][0] = bias[e][1] = 0, weight[e][0] = weight[e][1] = 1;
            if (column[e] < 0) continue;
            if (L.qkv_bias) bias[e][0] = half_at(L.qkv_bias, column[e]);
            if (is_v) continue;
            const float angle = (float)position * __ldg(S.frequencies + d);
            cos[e] = cosf(angle), sin[e] = sinf(angle);
            if (L.qkv_bias) bias[e][1] = half_at(L.qkv_bias, column[e] + HALF);
            const u16* norm = j < Q ? L.q_norm : L.k_norm;
            if (QK_NORM) weight[e][0] = half_at(norm, d), weight[e][1] = half_at(norm, d + HALF);
        }
    }

    // Writes q, k and v into shared memory, rounded as the cache is. All threads call it: barriers are in it.
    __device__ __forceinline__ void rotate(Shared& s, const Step& S) const {
        float a[EACH], b[EACH];
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int i = e * THREADS + threadIdx.x;
            a[e] = column[e] >= 0 ? __ldcg(S.qkv + column[e]) + bias[e][0] : 0;
            b[e] = i < PAIRS ? __ldcg(S.qkv + column[e] + HALF) + bias[e][1] : 0;
        }
        if (QK_NORM) {
            constexpr int LANES = least(32, HALF), PARTS = HALF / LANES;
#pragma unroll
            for (int e = 0; e < EACH; e++) {
                const int i = e * THREADS + threadIdx.x;
                const float sum = across(a[e] * a[e] + b[e] * b[e], add, 1, LANES);
                if (i < PAIRS && i % LANES == 0) s.some[i / LANES].x = sum;
            }
            __syncthreads();
#pragma unroll
            for (int e = 0; e < EACH; e++) {
                const int i = e * THREADS + threadIdx.x;
                float sum = 0;
                for (int j = 0; j < PARTS && i < PAIRS; j++) sum += s.some[i / HALF * PARTS + j].x;
                const float scale = rsqrtf(sum / HEAD_DIM + S.eps);
                if (i < PAIRS) a[e] *= scale * weight[e][0], b[e] *= scale * weight[e][1];
            }
        }
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int i = e * THREADS + threadIdx.x, d = i % HALF, j = i / HALF;
            const float x = a[e] * cos[e] - b[e] * sin[e], y = b[e] * cos[e] + a[e] * sin[e];
            const float root = 1 / sqrtf((float)HEAD_DIM);
            if (j < Q) s.q[j * HEAD_DIM + d] = rounded(x * root), s.q[j * HEAD_DIM + d + HALF] = rounded(y * root);
            else if (i < PAIRS) s.k[d] = rounded(x), s.k[d + HALF] = rounded(y);
            else if (i < PAIRS + HEAD_DIM) s.v[i - PAIRS] = rounded(a[e]);
        }
        __syncthreads();
    }
};

// The token's own key and value go to the cache from shared memory.
__device__ __forceinline__ void remember(const Shared& s, const Step& S, const Layer& L, int kv, i64 position) {
    const int t = threadIdx.x;
    if (t >= HEAD_DIM || position >= S.length) return;
    const i64 at = (kv * S.length + position) * HEAD_DIM + t;
    L.k[at] = half_bits(s.k[t]), L.v[at] = half_bits(s.v[t]);
}

// Keys and values of DEEP sweeps of positions from `first` on, those before `end`.
struct Past {
    uint4 k[DEEP], v[DEEP];
    __device__ __forceinline__ void load(const Step& S, const Layer& L, int kv, int first, int end) {
        const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
        for (int u = 0; u < DEEP; u++) {
            const int p = first + (u * WARPS + warp) * ABREAST + lane / ACROSS;
            if (p >= end) continue;
            const i64 at = (kv * S.length + p) * HEAD_DIM + lane % ACROSS * 8;
            k[u] = __ldcg((const uint4*)(L.k + at)), v[u] = __ldcg((const uint4*)(L.v + at));
        }
    }
};

template <int Q> struct Attention {
    float peak[Q], total[Q] = {}, y[Q][8] = {};

    // Attends over positions first to last, of which `position` itself comes from shared memory; `past` holds the first.
    __device__ __forceinline__ void over(
        Shared& s, const Step& S, const Layer& L, int kv, int first, int last, int position, Past& past) {
        const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, d = lane % ACROSS * 8;
#pragma unroll
        for (int j = 0; j < Q; j++) peak[j] = -1e30f;
        for (int begin = first; begin <= last; begin += DEEP * SWEEP) {
            if (begin != first) past.load(S, L, kv, begin, position);
#pragma unroll
            for (int u = 0; u < DEEP; u++) {
                const int p = begin + (u * WARPS + warp) * ABREAST + lane / ACROSS;
                if (begin + (u * WARPS + warp) * ABREAST > last) break;  // the same in a warp
                float k[8], v[8];
                if (p < position) widen(past.k[u], k), widen(past.v[u], v);
                else
#pragma unroll
                    for (int i = 0; i < 8; i++) k[i] = s.k[d + i], v[i] = s.v[d + i];
#pragma unroll
                for (int j = 0; j < Q; j++) {
                    float score = 0;
#pragma unroll
                    for (int i = 0; i < 8; i++) score += s.q[j * HEAD_DIM + d + i] * k[i];
                    score = across(score, add, 1, ACROSS);
                    if (p > last) continue;
                    const float now = fmaxf(peak[j], score), fade = __expf(peak[j] - now), e = __expf(score - now);
                    peak[j] = now, total[j] = total[j] * fade + e;
#pragma unroll
                    for (int i = 0; i < 8; i++) y[j][i] = y[j][i] * fade + e * v[i];
                }
            }
        }
    }

    // The CTA's result of query j in thread d < HEAD_DIM; the same barriers in all threads.
    __device__ __forceinline__ void gather(Shared& s, float* sums, float* largest, float* exponentials) {
        const int t = threadIdx.x, lane = t & 31, warp = t >> 5;
#pragma unroll
        for (int j = 0; j < Q; j++) {
            const float top = across(peak[j], larger, ACROSS, 32), fade = __expf(peak[j] - top);
            total[j] = across(total[j] * fade, add, ACROSS, 32);
            float* to = (float*)s.part + (j * WARPS + warp) * HEAD_DIM + lane * 8;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                y[j][i] = across(y[j][i] * fade, add, ACROSS, 32);
                if (lane < ACROSS) to[i] = y[j][i];
            }
            if (lane == 0) s.fade[j * WARPS + warp] = top, s.total[j * WARPS + warp] = total[j];
        }
        __syncthreads();
        if (t >= HEAD_DIM) return;
#pragma unroll
        for (int j = 0; j < Q; j++) {
            float top = -1e30f, a = 0, z = 0;
            for (int i = 0; i < WARPS; i++) top = fmaxf(top, s.fade[j * WARPS + i]);
            for (int i = 0; i < WARPS; i++) {
                const float fade = __expf(s.fade[j * WARPS + i] - top);
                a += fade * ((float*)s.part)[(j * WARPS + i) * HEAD_DIM + t], z += fade * s.total[j * WARPS + i];
            }
            sums[j] = a, largest[j] = top, exponentials[j] = z;
        }
    }
};

__device__ __forceinline__ float* partial_result(const Step& S, int head, int chunk) {
    return S.partial + ((i64)head * ((S.length + CHUNK - 1) / CHUNK) + chunk) * RESULT;
}

// A head's output in threads d < HEAD_DIM from the partial results of chunks first to last; a barrier is in it.
__device__ __forceinline__ float merge(Shared& s, const Step& S, int head, int first, int last) {
    constexpr int TEAMS = THREADS / HEAD_DIM;
    const int t = threadIdx.x, d = t % HEAD_DIM, team = t / HEAD_DIM;
    float top = -1e30f, a = 0, z = 0;
    for (int c = first + (t & 31); c <= last; c += 32) top = fmaxf(top, __ldcg(partial_result(S, head, c) + HEAD_DIM));
    top = across(top, larger, 1, 32);
#pragma unroll 4
    for (int c = first + team; c <= last; c += TEAMS) {
        const float* from = partial_result(S, head, c);
        const float fade = __expf(__ldcg(from + HEAD_DIM) - top);
        a += fade * __ldcg(from + d), z += fade * __ldcg(from + HEAD_DIM + 1);
    }
    s.some[t] = make_float4(a, z, 0, 0);
    __syncthreads();
    for (int i = 1; i < TEAMS; i++) a += s.some[i * HEAD_DIM + d].x, z += s.some[i * HEAD_DIM + d].y;  // of team 0
    return a / z;
}
