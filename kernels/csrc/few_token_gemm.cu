// y [M, N] = x [M, K] times a weight [K, N] in x's type, int8 or four bits, of up to 8 TILES tokens: see
// kernels/few_token_gemm.py, which defines BITS, GROUP and SCALES (of four bits), HALF_IS_FP16, TILES, COLUMNS and STAGES.
//
// A CTA has COLUMNS outputs and every channel of its split. One thread keeps a ring in shared memory full by tensor maps:
// blocks of ROWS channels of weights, scales and x. It begins with the weights before the launch ahead of it has ended.
// A warp has outputs of its own. Matrix instructions take 16 outputs, 16 channels and 8 tokens; ldmatrix brings channels
// next to each other, for bytes and half bytes as pairs of columns, whose values are then told apart.
// The last warp of a column's splits to finish adds up what all found, in the order of the splits. A token's sums are its
// own, so that it has the same bits among others as alone.
#include "halves.cuh"

constexpr int ROWS = 64, WARPS = 8;                    // channels of a block; warps that share the columns
constexpr int THREADS = 32 * WARPS * SHARES;           // that multiply: SHARES warps have the same columns, of half a block each
constexpr int WIDTH = COLUMNS * BITS / 8;              // bytes of a row that a CTA reads
constexpr int BOX = 128;                               // of them in a row of shared memory
constexpr int QUADS = WIDTH / WARPS / 32;              // ldmatrix instructions of a warp for 16 channels
constexpr int EACH = 16 / BITS, SUMS = QUADS * EACH;   // matrix instructions for one of them; for all
constexpr int OUTPUTS = 16 * EACH;                     // of one ldmatrix
constexpr int X_AT = ROWS * WIDTH, SCALES_AT = X_AT + TILES * 8 * 2 * ROWS, BLOCK = SCALES_AT + ROWS * SCALES;
static_assert(QUADS >= 1 && WIDTH % BOX == 0 && BLOCK % 1024 == 0, "what a CTA reads falls into whole boxes");
constexpr int ENDS_AT = STAGES * (BLOCK + 16);          // COLUMNS scales and biases
extern "C" { __device__ char shared_bytes[ENDS_AT + 8 * COLUMNS]; }  // for its size, which the host asks for

struct alignas(64) TensorMap {
    u64 opaque[16];
};
struct Maps {
    TensorMap weight, scales, x;
};
struct Product {
    const float* scale;  // [N], null for 1
    const u16* bias;     // [N] or null
    u16* y;
    float4* partial;     // [N / COLUMNS, WARPS, splits, TILES SUMS, 32]
    int* arrived;        // [N / COLUMNS, WARPS], zero
    int M, K, N, splits;
};

// ---- numbers ----
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
// 16 + four-bit codes, from bit `at` of each half of v on: their place is where a 16-bit float has its ones.
constexpr int PLACE = HALF_IS_FP16 ? 6 : 3;
constexpr u32 SIXTEEN = HALF_IS_FP16 ? 0x4c004c00u : 0x41804180u, MINUS_24 = HALF_IS_FP16 ? 0xce00ce00u : 0xc1c0c1c0u;
__device__ __forceinline__ u32 codes_as_halves(u32 v, int at) {
    return and_or(at < PLACE ? v << (PLACE - at) : v >> (at - PLACE), 0x000f000fu << PLACE, SIXTEEN);
}
__device__ __forceinline__ u32 scales_as_halves(u16 a, u16 b) {  // they are stored in bf16
    return HALF_IS_FP16 ? both(__uint_as_float((u32)a << 16), __uint_as_float((u32)b << 16)) : a | (u32)b << 16;
}

// ---- shared memory ----
__device__ __forceinline__ u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void barrier_init(u32 barrier, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}
__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void expect(u32 barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n@!done bra AGAIN;\n}"
        ::"r"(barrier), "r"(parity) : "memory");
}
__device__ __forceinline__ void copy_box(u32 to, const TensorMap* map, int column, int row, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
        ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier) : "memory");
}
__device__ __forceinline__ void load_matrices(u32* to, u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at) : "memory");
}
__device__ __forceinline__ void load_transposed(u32* to, u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at) : "memory");
}
__device__ __forceinline__ u16 load_half(u32 at) {
    u16 y;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(y) : "r"(at) : "memory");
    return y;
}

// Bytes from a row's first scale to the first that a CTA reads: maps begin at whole 16 bytes.
__device__ __forceinline__ int scales_from(int tile) { return tile * COLUMNS / most(GROUP, 1) * 2 & ~15; }

struct Ring {
    u32 memory;
    __device__ __forceinline__ u32 block(int i) const { return memory + i % STAGES * BLOCK; }
    __device__ __forceinline__ u32 full(int i) const { return memory + STAGES * BLOCK + i % STAGES * 16; }
    __device__ __forceinline__ u32 empty(int i) const { return full(i) + 8; }
};

__device__ __forceinline__ void fill(const Ring& ring, const Maps& maps, int tile, int first, int count) {
    auto weights = [&](int i) {
        expect(ring.full(i), BLOCK);
        const int row = (first + i) * ROWS;
#pragma unroll
        for (int b = 0; b < WIDTH / BOX; b++)
            copy_box(ring.block(i) + b * ROWS * BOX, &maps.weight, tile * WIDTH + b * BOX, row, ring.full(i));
        if (BITS == 4)
            copy_box(ring.block(i) + SCALES_AT, &maps.scales, scales_from(tile), row, ring.full(i));
    };
    auto x = [&](int i) { copy_box(ring.block(i) + X_AT, &maps.x, (first + i) * ROWS, 0, ring.full(i)); };
    const int ahead = least(count, STAGES);
    for (int i = 0; i < ahead; i++) weights(i);
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    for (int i = 0; i < ahead; i++) x(i);
    for (int i = ahead; i < count; i++) {
        wait(ring.empty(i), (i / STAGES - 1) & 1);
        weights(i), x(i);
    }
}

typedef float Sums[TILES][SUMS][4];

// What a warp's outputs get of 16 channels, x being theirs.
__device__ __forceinline__ void add(Sums sum, float rest[TILES][QUADS][4], u32 weights, u32 scales, u32 x[TILES][2]) {
#pragma unroll
    for (int j = 0; j < QUADS; j++) {
        u32 w[4], by[2], scaled[TILES][2];
        load_transposed(w, weights ^ (j * 32));  // lanes' rows do not change: what follows swizzling is an exclusive or
        if (BITS == 4) {
            const u32 at = scales;
            by[0] = scales_as_halves(load_half(at), load_half(at + SCALES));
            by[1] = scales_as_halves(load_half(at + 8 * SCALES), load_half(at + 9 * SCALES));
        }
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
            for (int h = 0; h < 2; h++) scaled[t][h] = BITS == 4 ? multiply_add(x[t][h], by[h], 0x80008000u) : x[t][h];
        if (BITS == 4)
#pragma unroll
            for (int t = 0; t < TILES; t++)
                multiply(rest[t][j], MINUS_24, MINUS_24, MINUS_24, MINUS_24, scaled[t][0], scaled[t][1]);
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            u32 a[4];
            if (BITS == 16) a[0] = w[0], a[1] = w[2], a[2] = w[1], a[3] = w[3];
#pragma unroll
            for (int h = 0; h < 2; h++) {  // eight channels each
                if (BITS == 8) a[2 * h] = bytes_as_halves(w[2 * e % 4 + h]), a[2 * h + 1] = bytes_as_halves(w[2 * e % 4 + h] >> 8);
                if (BITS == 4)
                    a[2 * h] = codes_as_halves(w[e / 2 * 2 + h], e % 2 * 4), a[2 * h + 1] = codes_as_halves(w[e / 2 * 2 + h], e % 2 * 4 + 8);
            }
#pragma unroll
            for (int t = 0; t < TILES; t++) multiply(sum[t][j * EACH + e], a[0], a[1], a[2], a[3], scaled[t][0], scaled[t][1]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS + 32, TILES == 1 ? SHARES == 1 ? 3 : 2 : 1) few_token_gemm(
    const __grid_constant__ Maps maps, const __grid_constant__ Product p) {
    extern __shared__ __align__(1024) u8 memory[];
    const Ring ring{address(memory)};
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32 % WARPS, share = threadIdx.x / 32 / WARPS;
    const int group = lane / 4, quarter = lane % 4;
    const int tile = blockIdx.x / p.splits, split = blockIdx.x % p.splits;
    const int blocks = cdiv(p.K, ROWS), first = (int)((i64)blocks * split / p.splits);
    const int count = (int)((i64)blocks * (split + 1) / p.splits) - first;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) barrier_init(ring.full(i), 1), barrier_init(ring.empty(i), WARPS * SHARES);
        asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    if (share == SHARES) {
        if (lane == 0) fill(ring, maps, tile, first, count);
        return;
    }
    const int column = tile * COLUMNS + warp * QUADS * OUTPUTS;  // the warp's first
    float* const unit = (float*)(memory + ENDS_AT) + warp * QUADS * OUTPUTS;
    for (int i = lane; share == 0 && i < QUADS * OUTPUTS; i += 32) {
        const int n = column + i;
        unit[i] = p.scale && n < p.N ? __ldg(p.scale + n) : 1;
        unit[COLUMNS + i] = p.bias && n < p.N ? half_at(p.bias, n) : 0;
    }
    // Rows of an ldmatrix are a lane's: of 16 channels and two runs of 16 bytes; of x 8 tokens and four runs.
    const int byte = warp * QUADS * 32, row = lane % 16;
    const u32 weights = byte / BOX * ROWS * BOX + row * BOX + ((byte % BOX / 16 + lane / 16) ^ (row % 8)) * 16;
    const u32 scales = SCALES_AT + 2 * quarter * SCALES + (BITS == 4 ? column / most(GROUP, 1) * 2 - scales_from(tile) : 0);
    Sums sum = {};
    float rest[TILES][QUADS][4] = {};
#pragma unroll 1
    for (int i = 0; i < count; i++) {
        wait(ring.full(i), i / STAGES & 1);
        const u32 block = ring.block(i);
#pragma unroll
        for (int h = 0; h < 2 / SHARES; h++) {
            const int half = h + share;
            u32 x[TILES][4];
#pragma unroll
            for (int t = 0; t < TILES; t++)
                load_matrices(x[t], block + X_AT + (8 * t + lane % 8) * BOX + ((4 * half + lane / 8) ^ lane % 8) * 16);
#pragma unroll
            for (int s = 0; s < 2; s++) {
                u32 part[TILES][2];
#pragma unroll
                for (int t = 0; t < TILES; t++) part[t][0] = x[t][2 * s], part[t][1] = x[t][2 * s + 1];
                const int step = 2 * half + s;
#ifdef ORACLE
                if (p.M > 1000)
#endif
                add(sum, rest, block + weights + step * 16 * BOX, block + scales + step * 16 * SCALES, part);
            }
        }
        __syncwarp();
        if (lane == 0) arrive(ring.empty(i));
    }
    float4 total[TILES * SUMS];
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int s = 0; s < SUMS; s++) {
            const float *a = sum[t][s], *b = rest[t][s / EACH];
            total[t * SUMS + s] = make_float4(a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]);
        }
    if (SHARES == 2) {
        float4* const theirs = (float4*)memory + warp * TILES * SUMS * 32 + lane;
        asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
        if (share == 1)
#pragma unroll
            for (int v = 0; v < TILES * SUMS; v++) theirs[v * 32] = total[v];
        asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
        if (share == 1) return;
#pragma unroll
        for (int v = 0; v < TILES * SUMS; v++) total[v] = plus(total[v], theirs[v * 32]);
    }
    if (p.splits > 1) {
        const int strip = tile * WARPS + warp;
        float4* const partial = p.partial + (i64)strip * p.splits * TILES * SUMS * 32 + lane;
#pragma unroll
        for (int v = 0; v < TILES * SUMS; v++) __stcg(partial + (split * TILES * SUMS + v) * 32, total[v]);
        __threadfence();
        __syncwarp();
        int before = 0;
        if (lane == 0) before = atomicAdd(p.arrived + strip, 1);
        if (__shfl_sync(0xffffffff, before, 0) != p.splits - 1) return;
        if (lane == 0) p.arrived[strip] = 0;
        __threadfence();
#pragma unroll
        for (int v = 0; v < TILES * SUMS; v++) total[v] = make_float4(0, 0, 0, 0);
#pragma unroll (TILES * SUMS > 2 ? 2 : 4)
        for (int s = 0; s < p.splits; s++)
#pragma unroll
            for (int v = 0; v < TILES * SUMS; v++) total[v] = plus(total[v], __ldcg(partial + (s * TILES * SUMS + v) * 32));
    }
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int s = 0; s < SUMS; s++) {
            const float4 v = total[t * SUMS + s];
            const int token = 8 * t + 2 * quarter, at = 16 * s + (BITS == 16 ? group : 2 * group), n = column + at, next = BITS == 16 ? 8 : 1;
            const float a = unit[at], b = unit[at + next], c = unit[COLUMNS + at], d = unit[COLUMNS + at + next];
            u16* const to = p.y + (i64)token * p.N + n;
            if (n >= p.N) continue;
            if (token < p.M) to[0] = half_bits(v.x * a + c), to[next] = half_bits(v.z * b + d);
            if (token + 1 < p.M) to[p.N] = half_bits(v.y * a + c), to[p.N + next] = half_bits(v.w * b + d);
        }
}
