// Rows of DIM columns summed up: over the warps of a CTA in shared memory, then added to a vector, on its columns' grids.
#pragma once
#include "stages_list.cuh"

// What o and down know of their columns beforehand: scales of quantized rows, a bias, or none, and the grids.
struct Columns {
    const float* scale;
    const u16* bias;
    const float* grid;

    __device__ __forceinline__ void prepare(Shared& s) const {
        if (AHEAD)
            for (int q = threadIdx.x; q < OUT; q += THREADS) {
                copy(&s.grid[q], grid + 4 * q);
                if (BITS_A <= 8) copy(&s.scale[q], scale + 4 * q);
            }
    }
};

// Where float4 number q of a row lies among a turn's sums.
template <int BITS> __device__ __forceinline__ int spot(int q) {
    constexpr int EACH = columns(BITS) / 4, WHOLE = 32 * EACH;  // float4s of a thread, of a segment
    const int in = q % WHOLE;
    return q / WHOLE * Out<BITS>::PITCH + in % EACH * 33 + in / EACH;
}

// The list's n entries, this CTA's share of them, times rows from `base` on, added to `to`.
template <int BITS, int UNROLL, int ROW, int ADDENDS, int STRIDE = 0>
__device__ __forceinline__ void add_rows(
    Shared& s, int n, int share, int shares, const Fixed& fixed, const u8* base, const u16* scales,
    const Columns& columns, float* to, u32* beyond) {
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
            if (first == 0 && byte < DIM * BITS / 8)
                add_outliers<BITS, ROW, STRIDE>(sums, 33, s.list + n + 1, fixed.apart, base + byte, own_scales);
    }
    copies_arrive();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < cdiv(OUT, THREADS); i++) {
        if (i * THREADS + t >= OUT) break;
        const int q = (i * THREADS + t + blockIdx.x * 32) % OUT;  // CTAs begin in different places
        const float4* sum = s.part + spot<BITS>(q);
        float4 a = *sum;
#pragma unroll
        for (int j = 1; j < O::TURNS; j++) a = plus(a, sum[j * O::SEGMENTS * O::PITCH]);
        if (BITS <= 8) a = times(a, AHEAD ? s.scale[q] : load4(columns.scale + 4 * q));
        if (columns.bias && blockIdx.x == 0) a = plus(a, bias4(columns.bias + 4 * q));  // once
        add_on_grid<ADDENDS>(to + 4 * q, a, AHEAD ? s.grid[q] : load4(columns.grid + 4 * q), beyond);
    }
}
