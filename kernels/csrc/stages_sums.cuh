// Rows of DIM columns summed up: over the warps of a CTA, over a cluster in shared memory, then into a vector, on its grid.
#pragma once
#include "stages_list.cuh"

// What the sums of o and down are given beforehand: of the columns that this thread adds in the end.
struct Columns {
    static constexpr int OWN = cdiv(OUT, CLUSTER);                    // float4s a CTA of a cluster adds
    static constexpr int TOGETHER = most(32, power(OWN)), TEAMS = least(CLUSTER, THREADS / TOGETHER);
    float4 scale, bias, grid;
    int column;  // -1: none

    __device__ __forceinline__ void prepare(const float* scales, const u16* biases, const float* grids) {
        const int own = threadIdx.x, at = blockIdx.x % CLUSTER * OWN + own;
        column = own < OWN && at < OUT ? 4 * at : -1;
        if (column < 0) return;
        scale = scales ? load4(scales + column) : make_float4(1, 1, 1, 1);
        bias = biases && blockIdx.x < CLUSTER ? bias4(biases + column) : make_float4(0, 0, 0, 0);  // once
        grid = load4(grids + column);
    }
};

// Where float4 number q of a row lies among a turn's sums.
template <int BITS> __device__ __forceinline__ int spot(int q) {
    constexpr int EACH = columns(BITS) / 4, WHOLE = 32 * EACH;  // float4s of a thread, of a segment
    const int in = q % WHOLE;
    return q / WHOLE * Out<BITS>::PITCH + in % EACH * 33 + in / EACH;
}

// The list's n entries, this CTA's share of them, times rows from `base` on, added to `to`. All CTAs of a cluster call it.
template <int BITS, int UNROLL, int ROW, int STRIDE>
__device__ __forceinline__ void add_rows(
    Shared& s, int n, int share, int shares, const Fixed& fixed, const u8* base, const u16* scales, const Columns& own,
    float* to, u32* beyond) {
    typedef Out<BITS> O;
    const int t = threadIdx.x, lane = t & 31, warp = t >> 5, turn = warp / O::SEGMENTS;
#pragma unroll 1
    for (int round = 0; round < O::ROUNDS; round++) {
        const int segment = O::ROUNDS == 1 ? warp % O::SEGMENTS : round * WARPS + warp, byte = segment * SEGMENT + lane * PIECE;
        const bool mine = turn < O::TURNS && segment < O::SEGMENTS;
        const int rows = mine && byte < DIM * BITS / 8 ? n : 0;
        const u16* own_scales = BITS == 4 ? scales + byte / PIECE * O::C / most(GROUP, 1) : nullptr;
        const int first = share * O::TURNS + (O::ROUNDS == 1 ? turn : 0);
        Sum<BITS> y;
        walk<UNROLL, ROW, STRIDE>(y, s.list, rows, first, shares * O::TURNS, base + byte, own_scales);
        if (!mine) continue;
        float4* sums = s.part + ((O::ROUNDS == 1 ? turn : 0) * O::SEGMENTS + segment) * O::PITCH + lane;
        store(y, sums, 33, fixed.unit);
        if constexpr (BITS <= 8)
            if (fixed.outliers && first == 0) add_outliers<BITS, ROW, STRIDE>(sums, 33, s.list, rows, base + byte, own_scales);
    }
    if (O::TURNS > 1) {
        __syncthreads();
        for (int q = t; q < OUT; q += THREADS) {
            float4* sum = s.part + spot<BITS>(q);
            float4 a = *sum;
#pragma unroll
            for (int i = 1; i < O::TURNS; i++) a = plus(a, sum[i * O::SEGMENTS * O::PITCH]);
            *sum = a;
        }
    }
    cluster_arrive(), cluster_wait();
    constexpr int EACH = CLUSTER / Columns::TEAMS;
    const int member = t % Columns::TOGETHER, team = t / Columns::TOGETHER, q = blockIdx.x % CLUSTER * Columns::OWN + member;
    float4 a = make_float4(0, 0, 0, 0);
    if (member < Columns::OWN && q < OUT && team < Columns::TEAMS)
#pragma unroll
        for (int i = 0; i < EACH; i++) a = plus(a, load_remote(s.part + spot<BITS>(q), team * EACH + i));
    s.some[t] = a;
    __syncthreads();
    cluster_arrive();
    if (own.column >= 0) {
#pragma unroll
        for (int i = 1; i < Columns::TEAMS; i++) a = plus(a, s.some[i * Columns::TOGETHER + t]);
        if (BITS <= 8) a = times(a, own.scale);
        add_on_grid(to + own.column, plus(a, own.bias), own.grid, beyond);
    }
    cluster_wait();  // no CTA leaves while another reads its sums
}
