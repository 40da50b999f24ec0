// Attention of one token over the cache: rotary embedding, scores and values in one pass (online softmax), and what its
// partial results add up to. A warp takes RUN positions at a time, by matrix instructions with up to eight heads as rows.
#pragma once
#include "stages_list.cuh"

constexpr int HALF = HEAD_DIM / 2, RUN = 16, RESULT = HEAD_DIM + 2;
constexpr int EACH = least(8, HEAD_DIM / 8), CHUNKS = HEAD_DIM / 8 / EACH;  // entries of values a thread loads at once

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
            if (j < Q) s.q[j * HEAD_DIM + d] = half_bits(x * root), s.q[j * HEAD_DIM + d + HALF] = half_bits(y * root);
            else if (i < PAIRS) s.k[d] = half_bits(x), s.k[d + HALF] = half_bits(y);
            else if (i < PAIRS + HEAD_DIM) s.v[i - PAIRS] = half_bits(a[e]);
        }
        __syncthreads();
    }
};

// The token's own key and value go to the cache from shared memory.
__device__ __forceinline__ void remember(const Shared& s, const Step& S, const Layer& L, int kv, i64 position) {
    const int t = threadIdx.x;
    if (t >= HEAD_DIM || position >= S.length) return;
    const i64 at = (kv * S.length + position) * HEAD_DIM + t;
    L.k[at] = s.k[t], L.v[at] = s.v[t];
}

// Which positions a warp's iteration i begins with.
struct Whole {  // all from `begin` on, by one CTA
    int begin;
    __device__ int first(int i) const { return begin + (i * WARPS + (threadIdx.x >> 5)) * RUN; }
};
struct Split {  // runs at fixed multiples, by turns of all splits' warps
    static constexpr int ROUND = RUN * WARPS * SPLITS;
    int split, round;
    __device__ int first(int i) const { return (round + i) * ROUND + ((threadIdx.x >> 5) * SPLITS + split) * RUN; }
};

template <int N> struct Vector { typedef uint4 type; };
template <> struct Vector<4> { typedef uint2 type; };
typedef Vector<EACH>::type Entries;  // EACH of 16 bits
__device__ __forceinline__ u32 word(uint4 v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }
__device__ __forceinline__ u32 word(uint2 v, int i) { return i == 0 ? v.x : v.y; }

// Attention of Q heads over the past, from `begin` to before `position`; the token itself joins in `gather`.
template <int Q, class Positions> struct Attention {
    const u16 *keys, *values;  // of the key/value head
    int begin, position;
    Positions positions;
    uint4 k[2][HEAD_DIM / 32];     // of position lane / 4 of eight: eights of its entries, by turns of four lanes
    Entries v[4][CHUNKS];          // of positions 2 (lane % 4) and the next, and these plus 8: EACH entries from EACH (lane / 4)
    float peak, total;             // of head lane / 4
    float y[CHUNKS][EACH / 2][4];  // of heads 2 (lane % 4) and the next: two entries of the value, by turns

    __device__ __forceinline__ Attention(const Step& S, const Layer& L, int kv, int begin, int position, Positions positions)
        : keys(L.k + kv * S.length * HEAD_DIM), values(L.v + kv * S.length * HEAD_DIM), begin(begin), position(position),
          positions(positions) {
        load_keys(0), load_values(0);
    }

    __device__ __forceinline__ bool seen(int p) const { return begin <= p && p < position; }

    __device__ __forceinline__ void load_keys(int i) {
        const int lane = threadIdx.x & 31, first = positions.first(i) + lane / 4;
        const u16* from = keys + (i64)first * HEAD_DIM + lane % 4 * 8;
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int c = 0; c < HEAD_DIM / 32; c++)
                k[m][c] = seen(first + 8 * m) ? __ldcg((const uint4*)(from + 8 * m * HEAD_DIM + 32 * c)) : make_uint4(0, 0, 0, 0);
    }
    __device__ __forceinline__ void load_values(int i) {
        const int lane = threadIdx.x & 31, first = positions.first(i) + lane % 4 * 2;
        const u16* from = values + (i64)first * HEAD_DIM + lane / 4 * EACH;
#pragma unroll
        for (int m = 0; m < 4; m++)
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) {
                const int p = 8 * (m / 2) + m % 2, at = p * HEAD_DIM + 8 * c * EACH;
                v[m][c] = seen(first + p) ? __ldcg((const Entries*)(from + at)) : Entries{};
            }
    }

    __device__ __forceinline__ void compute(const Shared& s) {
        const int lane = threadIdx.x & 31, head = lane / 4;
        peak = -1e30f, total = 0;
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 4; i++) y[i / 4 / (EACH / 2)][i / 4 % (EACH / 2)][i % 4] = 0;
        const uint4* q = (const uint4*)&s.q[least(head, Q - 1) * HEAD_DIM + lane % 4 * 8];  // rows from Q on: not used
#pragma unroll 1
        for (int i = 0; positions.first(i) < position; i++) {
            float score[2][4] = {}, now = peak;  // of head lane / 4: positions 2 (lane % 4), the next, and these plus 8
#pragma unroll
            for (int m = 0; m < 2; m++)
#pragma unroll
                for (int c = 0; c < HEAD_DIM / 32; c++) {
                    const uint4 a = q[4 * c];
                    multiply(score[m], a.x, 0, a.y, 0, k[m][c].x, k[m][c].y);
                    multiply(score[m], a.z, 0, a.w, 0, k[m][c].z, k[m][c].w);
                }
            load_keys(i + 1);
#pragma unroll
            for (int m = 0; m < 4; m++) {
                if (!seen(positions.first(i) + 8 * (m / 2) + lane % 4 * 2 + m % 2)) score[m / 2][m % 2] = -1e30f;
                now = fmaxf(now, score[m / 2][m % 2]);
            }
            now = across(now, larger, 1, 4);
            const float fade = __expf(peak - now);
            peak = now, total *= fade;
#pragma unroll
            for (int m = 0; m < 4; m++) {
                float& e = score[m / 2][m % 2];
                e = e > -1e30f ? __expf(e - now) : 0;
                total += e;
            }
            const u32 b0 = both(score[0][0], score[0][1]), b1 = both(score[1][0], score[1][1]);
            const float fades[2] = {__shfl_sync(~0u, fade, lane % 4 * 8), __shfl_sync(~0u, fade, lane % 4 * 8 + 4)};
#pragma unroll
            for (int c = 0; c < CHUNKS; c++)
#pragma unroll
                for (int e = 0; e < EACH / 2; e++) {
                    const u32 v0 = word(v[0][c], e), v1 = word(v[1][c], e), v2 = word(v[2][c], e), v3 = word(v[3][c], e);
#pragma unroll
                    for (int r = 0; r < 4; r++) y[c][e][r] *= fades[r % 2];
                    multiply(y[c][e], __byte_perm(v0, v1, 0x5410), __byte_perm(v0, v1, 0x7632), __byte_perm(v2, v3, 0x5410),
                             __byte_perm(v2, v3, 0x7632), b0, b1);
                }
            load_values(i + 1);
        }
    }

    // The CTA's result of query j in thread d < HEAD_DIM, with the token's own if it is to join: sums of values, the largest
    // score, sums of exponentials.
    __device__ __forceinline__ void gather(Shared& s, bool join, float* sums, float* largest, float* exponentials) {
        const int t = threadIdx.x, lane = t & 31, warp = t >> 5, head = lane / 4;
        if (warp < Q) {
            float score = 0;
            for (int d = lane; d < HEAD_DIM; d += 32) score += low(s.q[warp * HEAD_DIM + d]) * low(s.k[d]);
            score = across(score, add, 1, 32);
            if (lane == 0) s.own[warp] = join ? score : -1e30f;
        }
        total = across(total, add, 1, 4);
        if (head < Q && lane % 4 == 0) s.peak[head * WARPS + warp] = peak, s.total[head * WARPS + warp] = total;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++)
#pragma unroll
            for (int e = 0; e < EACH / 2; e++)
#pragma unroll
                for (int r = 0; r < 4; r++)
                    if (const int j = lane % 4 * 2 + r % 2; j < Q)
                        ((float*)s.part)[(j * WARPS + warp) * HEAD_DIM + (8 * c + lane / 4) * EACH + 2 * e + r / 2] = y[c][e][r];
        __syncthreads();
        if (t >= HEAD_DIM) return;
#pragma unroll
        for (int j = 0; j < Q; j++) {
            float top = s.own[j];
#pragma unroll
            for (int i = 0; i < WARPS; i++) top = fmaxf(top, s.peak[j * WARPS + i]);
            float z = __expf(s.own[j] - top), a = z * low(s.v[t]);
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
