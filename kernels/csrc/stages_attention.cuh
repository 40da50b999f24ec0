// Attention of one token over the cache: rotary embedding, scores and values in one pass (online softmax), and what its
// partial results add up to. A warp takes some positions at a time, 16 bytes of keys and values a thread.
#pragma once
#include "stages_list.cuh"

constexpr int HALF = HEAD_DIM / 2, ACROSS = HEAD_DIM / 8;  // threads of a position
constexpr int ABREAST = 32 / ACROSS, SWEEP = WARPS * ABREAST;  // positions of a warp and of a CTA at once
constexpr int DEEP = 4;  // iterations on their way
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

// Which positions a warp's iterations take: ABREAST each, DEEP iterations at a time.
struct Whole {  // all positions from `begin` on, by one CTA
    int begin;
    __device__ int first(int i) const { return begin + (i * WARPS + (threadIdx.x >> 5)) * ABREAST; }
    __device__ int count(int last) const { return cdiv(last + 1 - begin, SWEEP); }
};
struct Split {  // runs of SPAN positions, at fixed multiples: by turns of all splits' warps
    int split, round;
    __device__ int first(int i) const {
        const int run = ((round + i / EACH) * WARPS + (threadIdx.x >> 5)) * SPLITS + split;
        return run * SPAN + i % EACH * ABREAST;
    }
    __device__ int count(int last) const { return (last / ROUND - round + 1) * EACH; }
    static constexpr int SPAN = DEEP * most(ABREAST, 4), EACH = SPAN / ABREAST, ROUND = SPAN * WARPS * SPLITS;
};

// Attention of Q heads over positions from `begin` to `position`, which itself comes from shared memory.
template <int Q, class Positions> struct Attention {
    const u16 *keys, *values;  // of the key/value head
    int begin, position;
    Positions positions;
    uint4 k[DEEP], v[DEEP];
    float peak[Q], total[Q], y[Q][8];

    __device__ __forceinline__ Attention(const Step& S, const Layer& L, int kv, int begin, int position, Positions positions)
        : keys(L.k + kv * S.length * HEAD_DIM), values(L.v + kv * S.length * HEAD_DIM), begin(begin), position(position),
          positions(positions) {
        load(keys, k, 0), load(values, v, 0);
    }

    __device__ __forceinline__ int place(int i) const { return positions.first(i) + threadIdx.x % 32 / ACROSS; }
    __device__ __forceinline__ bool seen(int p) const { return begin <= p && p <= position; }

    // The past of iterations i … i + DEEP - 1.
    __device__ __forceinline__ void load(const u16* from, uint4* to, int i) const {
#pragma unroll
        for (int u = 0; u < DEEP; u++)
            if (const int p = place(i + u); begin <= p && p < position)
                to[u] = __ldcg((const uint4*)(from + (i64)p * HEAD_DIM + threadIdx.x % ACROSS * 8));
    }
    __device__ __forceinline__ void row(const uint4& from, const float* own, int p, float* x) const {
        if (p < position) widen(from, x);
        else
#pragma unroll
            for (int i = 0; i < 8; i++) x[i] = own[threadIdx.x % ACROSS * 8 + i];
    }

    __device__ __forceinline__ void compute(const Shared& s) {
        const int d = threadIdx.x % ACROSS * 8, count = positions.count(position);
#pragma unroll
        for (int j = 0; j < Q; j++) {
            peak[j] = -1e30f, total[j] = 0;
#pragma unroll
            for (int i = 0; i < 8; i++) y[j][i] = 0;
        }
#pragma unroll 1
        for (int i = 0; i < count; i += DEEP) {
            if (positions.first(i) > position) continue;  // the same in a warp
            float score[Q][DEEP], x[8];
#pragma unroll
            for (int u = 0; u < DEEP; u++) {
                row(k[u], s.k, place(i + u), x);
#pragma unroll
                for (int j = 0; j < Q; j++) {
                    const float4 a = *(const float4*)&s.q[j * HEAD_DIM + d], b = *(const float4*)&s.q[j * HEAD_DIM + d + 4];
                    score[j][u] = a.x * x[0] + a.y * x[1] + a.z * x[2] + a.w * x[3] + b.x * x[4] + b.y * x[5] + b.z * x[6] + b.w * x[7];
                }
            }
            load(keys, k, i + DEEP);
#pragma unroll
            for (int j = 0; j < Q; j++) {
                float now = peak[j];
#pragma unroll
                for (int u = 0; u < DEEP; u++) {
                    score[j][u] = across(score[j][u], add, 1, ACROSS);
                    if (seen(place(i + u))) now = fmaxf(now, score[j][u]);
                }
                const float fade = __expf(peak[j] - now);
                peak[j] = now, total[j] *= fade;
#pragma unroll
                for (int e = 0; e < 8; e++) y[j][e] *= fade;
#pragma unroll
                for (int u = 0; u < DEEP; u++) {
                    score[j][u] = seen(place(i + u)) ? __expf(score[j][u] - now) : 0;
                    total[j] += score[j][u];
                }
            }
#pragma unroll
            for (int u = 0; u < DEEP; u++) {
                if (!seen(place(i + u))) continue;  // what was not loaded may be NaN
                row(v[u], s.v, place(i + u), x);
#pragma unroll
                for (int j = 0; j < Q; j++)
#pragma unroll
                    for (int e = 0; e < 8; e++) y[j][e] += score[j][u] * x[e];
            }
            load(values, v, i + DEEP);
        }
    }

    // The CTA's result of query j in thread d < HEAD_DIM: sums of values, the largest score, sums of exponentials.
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
            if (lane == 0) s.peak[j * WARPS + warp] = top, s.total[j * WARPS + warp] = total[j];
        }
        __syncthreads();
        if (t >= HEAD_DIM) return;
#pragma unroll
        for (int j = 0; j < Q; j++) {
            float top = -1e30f, a = 0, z = 0;
#pragma unroll
            for (int i = 0; i < WARPS; i++) top = fmaxf(top, s.peak[j * WARPS + i]);
#pragma unroll
            for (int i = 0; i < WARPS; i++) {
                const float fade = __expf(s.peak[j * WARPS + i] - top);
                a += fade * ((float*)s.part)[(j * WARPS + i) * HEAD_DIM + t], z += fade * s.total[j * WARPS + i];
            }
            sums[j] = a, largest[j] = top, exponentials[j] = z;
        }
    }
};

// A head's output in threads d < HEAD_DIM from what all splits found; a barrier is in it.
__device__ __forceinline__ float merge(Shared& s, const Step& S, int head) {
    constexpr int TEAMS = THREADS / HEAD_DIM;
    const int t = threadIdx.x, d = t % HEAD_DIM, team = t / HEAD_DIM;
    const float* from = S.partial + (i64)head * SPLITS * RESULT;
    float top = -1e30f, a = 0, z = 0;
#pragma unroll
    for (int c = t & 31; c < cdiv(SPLITS, 32) * 32; c += 32)
        if (c < SPLITS) top = fmaxf(top, __ldcg(from + c * RESULT + HEAD_DIM));
    top = across(top, larger, 1, 32);
#pragma unroll 4
    for (int c = team; c < SPLITS; c += TEAMS) {
        const float fade = __expf(__ldcg(from + c * RESULT + HEAD_DIM) - top);
        a += fade * __ldcg(from + c * RESULT + d), z += fade * __ldcg(from + c * RESULT + HEAD_DIM + 1);
    }
    s.some[t] = make_float4(a, z, 0, 0);
    __syncthreads();
    for (int i = 1; i < TEAMS; i++) a += s.some[i * HEAD_DIM + d].x, z += s.some[i * HEAD_DIM + d].y;  // of team 0
    return a / z;
}
