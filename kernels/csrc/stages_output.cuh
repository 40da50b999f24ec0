// The output layer, and the likeliest token: the largest logit, of equal ones the first; NaN is larger than all.
#pragma once
#include "stages_list.cuh"

// Keys sort as logits do, and of equal ones as the lowest number.
__device__ __forceinline__ u64 key_of(float logit, int number) {
    const u32 bits = bits_of(logit);
    const u32 order = logit != logit ? ~0u : bits >> 31 ? ~bits : bits | 0x80000000u;
    return (u64)order << 32 | (u32)(~number);
}
__device__ __forceinline__ float logit_of(u64 key) {
    const u32 order = (u32)(key >> 32);
    return __uint_as_float(order >> 31 ? (order == ~0u ? order : order & 0x7fffffffu) : ~order);
}
__device__ __forceinline__ u64 larger_key(u64 a, u64 b) { return a > b ? a : b; }

// The last CTA to arrive writes the token, its logit and the next position. calls: how often ranks have sent for it.
__device__ __forceinline__ void find_best(Shared& s, const Step& S, u64 best, int calls = 0) {
    u64* keys = (u64*)s.some;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
    for (int o = 16; o; o >>= 1) best = larger_key(best, __shfl_xor_sync(~0u, best, o));
    if (lane == 0) keys[warp] = best;
    __syncthreads();
    if (threadIdx.x) return;
    for (int i = 1; i < WARPS; i++) best = larger_key(best, keys[i]);
    atomicMax(S.best, best);
    __threadfence();
    if (atomicAdd(S.arrived, 1u) != gridDim.x - 1) return;
    __threadfence();
    best = atomicExch(S.best, 0ull);
    const i64 position = __ldcg(S.position);
    i64* told = S.told + position % TOLD * 2;
    *S.token = told[0] = (u32)(~best);
    *S.largest = logit_of(best);
    told[1] = bits_of(logit_of(best));
    *S.position = position + 1;
    *S.arrived = 0;
    if constexpr (RANKS > 1) *S.calls += calls;
}

// Logits of this rank's tokens. Without other ranks, also the likeliest one, which with its position becomes the next
// step's. A warp has a run of rows.
STAGE stage_output(const __grid_constant__ Step S, const int number) {
    constexpr int C = columns(OUTPUT_BITS), ROW = DIM * OUTPUT_BITS / 8, PIECES = cdiv(ROW, SEGMENT), ROWS = 4, DEPTH = 4;
    Shared& s = shared();
    const int t = threadIdx.x, lane = t & 31, warp = t >> 5;
    const i64 warps = (i64)gridDim.x * WARPS, mine = (i64)blockIdx.x * WARPS + warp;
    const int before = (int)S.rank * SHARE, rows = least(SHARE, VOCAB - before);
    const int begin = (int)(rows * mine / warps), end = (int)(rows * (mine + 1) / warps);
    launch_dependents();
    Norm norm;
    norm.prepare(S.norm, nullptr);
    for (int i = DIM + t; i < PIECES * 32 * C; i += THREADS) ((u16*)s.part)[i] = 0;
    wait_for_producers();
    norm.compute(s, [&](int k, float* x) {
        add_updates(S.residual[number & 1], S.o_update[~number & 1], S.mlp_update, k, x);
    }, S.eps);
    const float unit = norm.peak / LEVELS, inverse = norm.peak > 1e-30f ? LEVELS / norm.peak : 0;
#pragma unroll
    for (int p = 0; p < NORM; p++)
        if (const int k = Norm::channel(p); k < DIM)
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const float x = norm.x[p][i];
                ((u16*)s.part)[k + i] = OUTPUT_BITS == 16 ? half_bits(x) : (u16)bits_of(x * inverse + ROUNDING);
            }
    __syncthreads();
    u64 best = 0;
    for (int row = begin; row < end; row += ROWS) {
        float sums[ROWS] = {};
        int whole[ROWS] = {};
#pragma unroll 1
        for (int piece = 0; piece < PIECES; piece += DEPTH) {
            uint4 w[ROWS][DEPTH];
#pragma unroll
            for (int r = 0; r < ROWS; r++)
#pragma unroll
                for (int u = 0; u < DEPTH; u++) {
                    const int byte = (piece + u) * SEGMENT + lane * PIECE;
                    w[r][u] = row + r < end && byte < ROW ? load_weights(S.output + (i64)(row + r) * ROW + byte) : make_uint4(0, 0, 0, 0);
                }
#pragma unroll
            for (int u = 0; u < DEPTH; u++) {
                if (piece + u >= PIECES) break;
                const uint4* x = (const uint4*)s.part + ((piece + u) * 32 + lane) * C / 8;
                if constexpr (OUTPUT_BITS == 16) {
                    float v[8];
                    widen(x[0], v);
#pragma unroll
                    for (int r = 0; r < ROWS; r++) {
                        float y[8];
                        widen(w[r][u], y);
#pragma unroll
                        for (int i = 0; i < 8; i++) sums[r] += v[i] * y[i];
                    }
                } else {
                    const uint4 a = x[0], b = x[1];
#pragma unroll
                    for (int r = 0; r < ROWS; r++) {
                        const uint4 y = w[r][u];
                        whole[r] = dot_high(a.y, y.x, dot_low(a.x, y.x, whole[r]));
                        whole[r] = dot_high(a.w, y.y, dot_low(a.z, y.y, whole[r]));
                        whole[r] = dot_high(b.y, y.z, dot_low(b.x, y.z, whole[r]));
                        whole[r] = dot_high(b.w, y.w, dot_low(b.z, y.w, whole[r]));
                    }
                }
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float sum = across(OUTPUT_BITS == 16 ? sums[r] : whole[r] * unit, add, 1, 32);
            if (lane == r) sums[0] = sum;
        }
        if (lane < ROWS && row + lane < end) {
            const float y = OUTPUT_BITS == 16 ? sums[0] : sums[0] * __ldg(S.output_scale + row + lane);
            S.logits[before + row + lane] = y;
            best = larger_key(best, key_of(y, row + lane));
        }
    }
    if constexpr (RANKS == 1) find_best(s, S, best);
}
