// y [M, N] = x [M, K] times a weight [K, N] in x's type, int8 or four bits, of up to 8 TILES tokens: see
// kernels/few_token_gemm.py, which defines BITS, GROUP (of four bits), HALF_IS_FP16, TILES, WORDS and SPLITS.
//
// Matrix instructions of 16 outputs, 16 channels and 8 tokens. A lane loads 4 WORDS bytes of four rows, that is, values of
// outputs of its own, so that no value has to cross lanes: which outputs and channels an instruction means is arbitrary, if
// x is loaded alike. A CTA has a run of columns; its warps, and the SPLITS CTAs of its cluster, share the channels at fixed
// places. A token's sums are its own, so that it has the same bits among others as alone.
//
// Under dependent launch the first weights are on their way while the launch before still writes x.
#include "halves.cuh"

constexpr int WARPS = 8, ROWS = 16;                   // channels of a step
constexpr int BYTES = 4 * WORDS;                      // of a row that a lane loads
constexpr int PAIRS = 4 * BYTES / BITS;               // instructions a step: each takes two outputs of a lane
constexpr int COLUMNS = 8 * 2 * PAIRS;                // outputs of a CTA

constexpr int DEPTH = BITS == 16 ? 4 : 2;             // steps that are read ahead; of quantized weights 3 and 4 are slower
constexpr int FOURS = TILES * PAIRS * 32;             // float4s that a CTA's sums are
extern "C" { __device__ char shared_bytes[16 * WARPS * FOURS]; }  // for its size, which the host asks for

struct Weight {
    const u8* packed;
    const float* scale;  // [N], null for 1
    i64 row;             // bytes
    int K, N;
};

constexpr u32 ONES = HALF_IS_FP16 ? 0x3c003c00u : 0x3f803f80u;
__device__ __forceinline__ u32 and_or(u32 a, u32 b, u32 c) {  // the compiler makes two instructions of two constants
    u32 y;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
    return y;
}
// The low bytes of both halves of v, which are signed, as 16-bit floats.
__device__ __forceinline__ u32 bytes_as_halves(u32 v) {
#if HALF_IS_FP16  // 1024 + 128 + it, less those: v's bytes are 128 too large
    return multiply_add(and_or(v ^ 0x80808080u, 0x00ff00ffu, 0x64006400u), ONES, 0xe480e480u);
#else  // 128 + seven bits, less 128, or less 256 where the eighth is set
    return multiply_add(and_or(v, 0x007f007fu, 0x43004300u), ONES, and_or(v, 0x00800080u, 0xc300c300u));
#endif
}
// Four-bit codes, from bit `at` of each half of v on, less 8, times the halves of `by`, and by UNIT.
#if HALF_IS_FP16
constexpr float UNIT = 1;
__device__ __forceinline__ u32 nibbles_as_halves(u32 v, int at, u32 by) {
    return multiply_add(multiply_add(and_or(v >> at, 0x000f000fu, 0x64006400u), ONES, 0xe408e408u), by, 0x80008000u);
}
#else  // a code in the upper four of seven bits is code 2^-130: times 2^127 that is an eighth of it
constexpr float UNIT = 0.125f;
__device__ __forceinline__ u32 nibbles_as_halves(u32 v, int at, u32 by) {
    const u32 codes = (at < 3 ? v << (3 - at) : v >> (at - 3)) & 0x00780078u;
    return multiply_add(codes, multiply_add(by, 0x7f007f00u, 0x80008000u), by ^ 0x80008000u);
}
#endif
__device__ __forceinline__ u32 scales_as_halves(u16 a, u16 b) {  // they are stored in bf16
    return HALF_IS_FP16 ? both(__uint_as_float((u32)a << 16), __uint_as_float((u32)b << 16)) : a | (u32)b << 16;
}

// ---- clusters ----
__device__ __forceinline__ void cluster_barrier() {
    if (SPLITS == 1) __syncthreads();
    else asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
__device__ __forceinline__ float4 from_cluster(const float4* p, int cta) {  // what lies there in that CTA's shared memory
    if (SPLITS == 1) return *p;
    u32 at = (u32)__cvta_generic_to_shared(p);
    float4 v;
    asm volatile("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(at) : "r"(cta));
    asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(at));
    return v;
}

struct Step {  // what a lane reads: of rows 4 (lane % 4) to 4 (lane % 4) + 3
    u32 word[4][WORDS];
    u16 scale[4];     // of four bits
    uint2 x[TILES];   // these channels of token lane / 4 of each eight
};

// Where a lane reads its next step.
struct Source {
    const u8 *packed, *scales;
    const u16* x;
    const i64 row, stride;  // bytes from row to row and step to step
    const int K, tokens;    // tokens: from the lane's on
    const bool inside;      // whether it has columns at all
    int left, x_left;       // steps

    __device__ __forceinline__ void read_weights(Step& to) {
        const bool reads = inside && left > 0;
#pragma unroll
        for (int r = 0; r < 4; r++) {
            if constexpr (WORDS == 4) {
                uint4 v = make_uint4(0, 0, 0, 0);
                if (reads) v = load_weights(packed + r * row);
                to.word[r][0] = v.x, to.word[r][1] = v.y, to.word[r][2] = v.z, to.word[r][3] = v.w;
            } else {
                uint2 v = make_uint2(0, 0);
                if (reads) v = load_weights_8(packed + r * row);
                to.word[r][0] = v.x, to.word[r][1] = v.y;
            }
            if (BITS == 4) to.scale[r] = reads ? __ldg((const u16*)(scales + r * row)) : 0;
        }
        packed += stride, left--;
        if (BITS == 4) scales += stride;
    }
    __device__ __forceinline__ void read_x(Step& to) {
#pragma unroll
        for (int t = 0; t < TILES; t++)
            to.x[t] = x_left > 0 && 8 * t < tokens ? __ldcg((const uint2*)(x + (i64)8 * t * K)) : make_uint2(0, 0);
        x += WARPS * ROWS, x_left--;
    }
};

__device__ __forceinline__ void add(float total[TILES][PAIRS][4], const Step& s) {
    u32 by[2];
    if (BITS == 4) by[0] = scales_as_halves(s.scale[0], s.scale[1]), by[1] = scales_as_halves(s.scale[2], s.scale[3]);
#pragma unroll
    for (int q = 0; q < 2 * WORDS; q++) {  // two bytes of each row at once, or all four
        if constexpr (BITS == 16) {
            if (q >= WORDS) break;
            const u32 a0 = __byte_perm(s.word[0][q], s.word[1][q], 0x5410), a1 = __byte_perm(s.word[0][q], s.word[1][q], 0x7632);
            const u32 b0 = __byte_perm(s.word[2][q], s.word[3][q], 0x5410), b1 = __byte_perm(s.word[2][q], s.word[3][q], 0x7632);
#pragma unroll
            for (int t = 0; t < TILES; t++) multiply(total[t][q], a0, a1, b0, b1, s.x[t].x, s.x[t].y);
            continue;
        }
        const u32 select = q % 2 ? 0x7632 : 0x5410;
        const u32 a = __byte_perm(s.word[0][q / 2], s.word[1][q / 2], select);
        const u32 b = __byte_perm(s.word[2][q / 2], s.word[3][q / 2], select);
        if constexpr (BITS == 8) {
            const u32 a0 = bytes_as_halves(a), a1 = bytes_as_halves(a >> 8), b0 = bytes_as_halves(b), b1 = bytes_as_halves(b >> 8);
#pragma unroll
            for (int t = 0; t < TILES; t++) multiply(total[t][q], a0, a1, b0, b1, s.x[t].x, s.x[t].y);
        } else {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const u32 a0 = nibbles_as_halves(a, 8 * i, by[0]), a1 = nibbles_as_halves(a, 8 * i + 4, by[0]);
                const u32 b0 = nibbles_as_halves(b, 8 * i, by[1]), b1 = nibbles_as_halves(b, 8 * i + 4, by[1]);
#pragma unroll
                for (int t = 0; t < TILES; t++) multiply(total[t][2 * q + i], a0, a1, b0, b1, s.x[t].x, s.x[t].y);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 2) few_token_gemm(
    const u16* __restrict__ x, const __grid_constant__ Weight w, const u16* __restrict__ bias, u16* __restrict__ y, int M) {
    extern __shared__ float4 memory[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, group = lane / 4, quarter = lane % 4;
    const int tile = blockIdx.x / SPLITS, split = blockIdx.x % SPLITS;
    const int byte = tile * (COLUMNS * BITS / 8) + group * BYTES;
    const bool inside = byte < w.N * BITS / 8;
    const int steps = w.K / ROWS, begin = (int)((i64)steps * split / SPLITS), end = (int)((i64)steps * (split + 1) / SPLITS);
    const int count = cdiv(end - begin - warp, WARPS), channel = (begin + warp) * ROWS + 4 * quarter;  // of this warp
    const u8* from = w.packed + channel * w.row;
    Source source{from + byte, from + w.N / 2 + byte / 16 * 32 / most(GROUP, 1) * 2, x + (i64)group * w.K + channel,
                  w.row, WARPS * ROWS * w.row, w.K, M - group, inside, count, count};
    float total[TILES][PAIRS][4] = {};
    Step ahead[DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; d++) source.read_weights(ahead[d]);
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#pragma unroll
    for (int d = 0; d < DEPTH; d++) source.read_x(ahead[d]);
#pragma unroll 1
    for (int step = 0; step < count; step += DEPTH)
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            add(total, ahead[d]);  // zeros beyond the last
            source.read_weights(ahead[d]);
            source.read_x(ahead[d]);
        }
    __syncthreads();
    float4* const sums = memory;  // [WARPS][TILES][PAIRS][32]
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int p = 0; p < PAIRS; p++)
            sums[((warp * TILES + t) * PAIRS + p) * 32 + lane] = make_float4(total[t][p][0], total[t][p][1], total[t][p][2], total[t][p][3]);
    __syncthreads();
#pragma unroll
    for (int i = threadIdx.x; i < FOURS; i += 32 * WARPS) {
        float4 sum = sums[i];
#pragma unroll
        for (int v = 1; v < WARPS; v++) sum = plus(sum, sums[v * FOURS + i]);
        sums[i] = sum;
    }
    cluster_barrier();
    for (int i = split * 32 * WARPS + threadIdx.x; i < FOURS; i += SPLITS * 32 * WARPS) {
        float4 part[SPLITS];
#pragma unroll
        for (int s = 0; s < SPLITS; s++) part[s] = from_cluster(sums + i, s);
        float4 sum = part[0];
#pragma unroll
        for (int s = 1; s < SPLITS; s++) sum = plus(sum, part[s]);
        // Outputs 2 p and 2 p + 1 of a lane. Of four bits: a byte's halves, which are 16 outputs apart.
        const int p = i / 32 % PAIRS, token = i / 32 / PAIRS * 8 + i % 4 * 2, at = i % 32 / 4 * BYTES + p;
        const int n = tile * COLUMNS + (BITS == 4 ? at / 16 * 32 + at % 16 : i % 32 / 4 * 2 * PAIRS + 2 * p), next = BITS == 4 ? 16 : 1;
        if (n >= w.N) continue;
        const float unit = BITS == 4 ? UNIT : 1, a = BITS == 16 ? 1 : __ldg(w.scale + n) / unit, b = BITS == 16 ? 1 : __ldg(w.scale + n + next) / unit;
        const float c = bias ? half_at(bias, n) : 0, d = bias ? half_at(bias, n + next) : 0;
        u16* to = y + (i64)token * w.N + n;
        if (token < M) to[0] = half_bits(sum.x * a + c), to[next] = half_bits(sum.z * b + d);
        if (token + 1 < M) to[w.N] = half_bits(sum.y * a + c), to[w.N + next] = half_bits(sum.w * b + d);
    }
    cluster_barrier();  // a CTA must not end while others read its sums
}
