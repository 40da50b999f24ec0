// y [M, N] = x [M, K] times a weight [K, N] in x's type, int8 or four bits, of up to 8 TILES tokens: see
// kernels/few_token_gemm.py, which defines BITS, GROUP and SCALES (of four bits), HALF_IS_FP16, TILES and STAGES.
//
// A CTA has COLUMNS outputs; the CTAs of a cluster share the channels. One thread keeps a ring in shared memory full by
// tensor maps: blocks of ROWS channels of weights, scales and x. Under dependent launch it begins with the weights while
// the launch before still writes x.
// A warp has 32 outputs and a half of each block. A matrix instruction takes 16 outputs, 16 channels and 8 tokens. ldmatrix
// brings channels next to each other; bytes and half bytes come as columns side by side, which are then told apart.
// A token's sums are its own, so that it has the same bits among others as alone.
#include "halves.cuh"

constexpr int ROWS = 64, HALF = 32, COLUMNS = 256;     // channels of a block and of the half that a warp takes; outputs
constexpr int WARPS = 8, THREADS = 2 * WARPS * 32;     // that multiply, WARPS for each half; one more warp copies
constexpr int WIDTH = COLUMNS * BITS / 8, BOX = 128;   // bytes of a row: that a CTA reads, that lie in a row of the ring
constexpr int RUNS = WIDTH / WARPS / 16;               // of 16 bytes, that a warp reads of a row: 4, 2 or 1
constexpr int SUMS = COLUMNS / WARPS / 16;             // matrix instructions of a warp for 16 channels and 8 tokens
constexpr int X_AT = ROWS * WIDTH, SCALES_AT = X_AT + TILES * 8 * 2 * ROWS, BLOCK = SCALES_AT + ROWS * SCALES;
constexpr int BARRIERS_AT = STAGES * BLOCK, SUMS_AT = BARRIERS_AT + cdiv(STAGES, 8) * 128;
constexpr int FOURS = WARPS * TILES * SUMS * 32;       // float4s that a half's sums are
constexpr int EACH = cdiv(FOURS, THREADS);             // of them that a thread stores
constexpr int MOST_SPLITS = 6;                         // CTAs of a cluster
static_assert(BLOCK % 1024 == 0, "boxes are swizzled by addresses");

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
    int M, K, N, splits, zero;  // zero: 0, see `release`
};

// ---- numbers ----
// Small whole numbers in the low eight bits of a half are a 16-bit float's smallest ones, of exponents 0 and 1, which go
// up evenly: UP times that is UNIT times the number, without a shift. What numbers are too large by goes in the same step.
constexpr u32 UP = HALF_IS_FP16 ? 0x78007800u : 0x7f007f00u;  // 2^15, 2^127
constexpr float UNIT = HALF_IS_FP16 ? 1 / 512.f : 1 / 64.f;
constexpr u32 MINUS_8 = HALF_IS_FP16 ? 0xa400a400u : 0xbe00be00u, MINUS_128 = HALF_IS_FP16 ? 0xb400b400u : 0xc000c000u;
__device__ __forceinline__ u32 bytes_as_halves(u32 v) {  // the low bytes of both halves of v, which are signed
    return multiply_add((v ^ 0x00800080u) & 0x00ff00ffu, UP, MINUS_128);
}
// The low four bits of those bytes, less 8; or the high ones, less 8, times 16.
__device__ __forceinline__ u32 codes_as_halves(u32 v, bool high) {
    return high ? multiply_add(v & 0x00f000f0u, UP, MINUS_128) : multiply_add(v & 0x000f000fu, UP, MINUS_8);
}
// What the sums of a matrix instruction, one of SUMS, are to be multiplied by. Of four bits the second has the high codes.
__device__ __forceinline__ float unit(int sum) { return BITS == 16 ? 1 : BITS == 4 && sum ? 1 / (16 * UNIT) : 1 / UNIT; }
__device__ __forceinline__ u32 scales_as_halves(u32 v) {  // they are stored in bf16
    return HALF_IS_FP16 ? both(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u)) : v;
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
// ---- clusters ----
__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
__device__ __forceinline__ float4 from_cluster(const float4* p, int cta) {  // what lies there in that CTA's shared memory
    u32 at = address(p);
    float4 v;
    asm volatile("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(at) : "r"(cta));
    asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(at));
    return v;
}

// Bytes from a row's first scale to where a CTA's box begins, which must be whole 16 bytes: at or before its first scale.
__device__ __forceinline__ int scales_from(int tile) { return tile * COLUMNS / most(GROUP, 1) * 2 & ~15; }

// STAGES blocks, then two barriers for each: that it is full, and that all warps have read it.
struct Ring {
    u32 memory;
    __device__ __forceinline__ u32 block(int i) const { return memory + i % STAGES * BLOCK; }
    __device__ __forceinline__ u32 full(int i) const { return memory + BARRIERS_AT + i % STAGES * 16; }
    __device__ __forceinline__ u32 empty(int i) const { return full(i) + 8; }
};

// What the copying thread does for `count` blocks from `first` on.
__device__ __forceinline__ void fill(const Ring& ring, const Maps& maps, int tile, int first, int count) {
    auto weights = [&](int i) {
        const int row = (first + i) * ROWS;
        expect(ring.full(i), BLOCK);
#pragma unroll
        for (int b = 0; b < WIDTH / BOX; b++)
            copy_box(ring.block(i) + b * ROWS * BOX, &maps.weight, tile * WIDTH + b * BOX, row, ring.full(i));
        if (BITS == 4) copy_box(ring.block(i) + SCALES_AT, &maps.scales, scales_from(tile), row, ring.full(i));
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

// The weights of a matrix instruction, one of SUMS, from the warp's runs w; w[.][h]: of 8 channels, and of the next 8.
__device__ __forceinline__ void fragment(u32* a, const u32 w[RUNS][2], int sum) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        if constexpr (BITS == 16) a[2 * h] = w[2 * sum][h], a[2 * h + 1] = w[2 * sum + 1][h];
        if constexpr (BITS == 8) a[2 * h] = bytes_as_halves(w[sum][h]), a[2 * h + 1] = bytes_as_halves(w[sum][h] >> 8);
        if constexpr (BITS == 4) a[2 * h] = codes_as_halves(w[0][h], sum), a[2 * h + 1] = codes_as_halves(w[0][h] >> 8, sum);
    }
}

// What a warp has of a block in registers.
struct Fragments {
    u32 w[2][RUNS][2], x[TILES][4], by[4];  // weights of 16 channels, runs, 8 channels; x and scales of 8 channels each
};

// The warp's sums over `count` blocks, into shared memory. A block is loaded while the one before is multiplied.
__device__ __forceinline__ void multiply_blocks(const Ring& ring, int tile, int count, u32 zero, float4* sums) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32 % WARPS, half = threadIdx.x / 32 / WARPS;
    // Each lane names a row of an ldmatrix: they are two runs of 16 channels, or one of 32; of x four runs of 8 tokens.
    const int row = RUNS == 1 ? lane : lane % 16, run = warp * RUNS % 8 + (RUNS == 1 ? 0 : lane / 16);
    const u32 weights = (warp * RUNS / 8 * ROWS + half * HALF + row) * BOX + (run ^ row % 8) * 16;
    const u32 xs = X_AT + lane % 8 * BOX + (4 * half + lane / 8 ^ lane % 8) * 16;
    // The warp's scale in a row of the box, in bytes: its 32 outputs are of one group.
    const int scale = BITS == 4 ? (tile * COLUMNS + warp * COLUMNS / WARPS) / most(GROUP, 1) * 2 - scales_from(tile) : 0;
    const u32 scales = SCALES_AT + (half * HALF + lane) * SCALES + (scale & ~15);
    u32 block = ring.block(0), full = ring.full(0), parity = 0, stage = 0;
    float total[TILES][SUMS][4] = {};

    auto load = [&](Fragments& f) {
        wait(full, parity);
        if constexpr (BITS == 4) load_transposed(f.by, block + scales);
#pragma unroll
        for (int t = 0; t < TILES; t++) load_matrices(f.x[t], block + xs + t * 8 * BOX);
        if constexpr (RUNS == 1) load_transposed(f.w[0][0], block + weights);
        else
#pragma unroll
            for (int s = 0; s < 2; s++)
#pragma unroll
                for (int r = 0; r < RUNS; r += 2) load_transposed(f.w[s][r], (block + weights + s * 16 * BOX) ^ r * 16);
    };
    // Lets the block be overwritten, and goes on to the next. An arrival alone does not wait for loads before it, which may
    // still be on their way: so it takes a value of each, times a zero that the compiler does not know.
    auto release = [&](const Fragments& f) {
        u32 loaded = BITS == 4 ? f.by[0] : 0;
#pragma unroll
        for (int t = 0; t < TILES; t++) loaded |= f.x[t][0];
#pragma unroll
        for (int r = 0; r < RUNS; r += 2) loaded |= f.w[0][r][0] | f.w[1][r][0];
        if ((loaded & zero | lane) == 0) arrive(full + 8);
        stage++, block += BLOCK, full += 16;
        if (stage == STAGES) stage = 0, block -= STAGES * BLOCK, full -= STAGES * 16, parity ^= 1;
    };
    auto multiply_block = [&](const Fragments& f) {
        u32 x[TILES][4];
#pragma unroll
        for (int v = 0; v < 4; v++) {  // of 8 channels
            const u32 own = BITS == 4 ? scales_as_halves(__shfl_sync(0xffffffff, f.by[v], scale % 16 * 2 + lane % 4)) : 0;
#pragma unroll
            for (int t = 0; t < TILES; t++) x[t][v] = BITS == 4 ? multiply_add(f.x[t][v], own, 0x80008000u) : f.x[t][v];
        }
#pragma unroll
        for (int s = 0; s < 2; s++) {
#pragma unroll
            for (int v = 0; v < SUMS; v++) {
                u32 a[4];
                fragment(a, f.w[s], v);
#pragma unroll
                for (int t = 0; t < TILES; t++) multiply(total[t][v], a[0], a[1], a[2], a[3], x[t][2 * s], x[t][2 * s + 1]);
            }
        }
    };
    Fragments even, odd;
    load(even), release(even);
    int i = 1;
#pragma unroll 1
    for (; i + 1 < count; i += 2) {
        load(odd), multiply_block(even), release(odd);
        load(even), multiply_block(odd), release(even);
    }
    if (i < count) load(odd), multiply_block(even), release(odd), multiply_block(odd);
    else multiply_block(even);
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int v = 0; v < SUMS; v++) {
            const float *a = total[t][v], u = unit(v);
            sums[half * FOURS + ((warp * TILES + t) * SUMS + v) * 32 + lane] = make_float4(a[0] * u, a[1] * u, a[2] * u, a[3] * u);
        }
}

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1) few_token_gemm(
    const __grid_constant__ Maps maps, const __grid_constant__ Product p) {
    extern __shared__ __align__(1024) u8 memory[];
    const Ring ring{address(memory)};
    float4* const sums = (float4*)(memory + SUMS_AT);
    const int tile = blockIdx.x / p.splits, split = blockIdx.x % p.splits;
    const int blocks = cdiv(p.K, ROWS), first = blocks * split / p.splits, count = blocks * (split + 1) / p.splits - first;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) barrier_init(ring.full(i), 1), barrier_init(ring.empty(i), 2 * WARPS);
        asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    if (threadIdx.x >= THREADS) {
        if (threadIdx.x == THREADS) fill(ring, maps, tile, first, count);
        return;
    }
    // What a thread will store: outputs n and next of two tokens, for each of its float4s.
    const int threads = p.splits * THREADS, begin = split * THREADS + threadIdx.x, next = BITS == 16 ? 8 : 1;
    int n[EACH];
    float2 scale[EACH], bias[EACH];
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        const int i = begin + j * threads, group = i % 32 / 4;
        n[j] = tile * COLUMNS + i / (32 * SUMS * TILES) * 16 * SUMS + i / 32 % SUMS * 16 + (BITS == 16 ? group : 2 * group);
        const bool stores = i < FOURS && n[j] < p.N;
        if (!stores) n[j] = -1;
        scale[j] = stores && p.scale ? make_float2(__ldg(p.scale + n[j]), __ldg(p.scale + n[j] + next)) : make_float2(1, 1);
        bias[j] = stores && p.bias ? make_float2(half_at(p.bias, n[j]), half_at(p.bias, n[j] + next)) : make_float2(0, 0);
    }
    multiply_blocks(ring, tile, count, p.zero, sums);
    if (p.splits > 1) cluster_barrier();
    else asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        const int i = begin + j * threads;
        if (n[j] < 0) continue;
        float4 part[MOST_SPLITS][2], sum = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int s = 0; s < MOST_SPLITS; s++)
#pragma unroll
            for (int h = 0; h < 2 && s < p.splits; h++)
                part[s][h] = p.splits == 1 ? sums[h * FOURS + i] : from_cluster(sums + h * FOURS + i, s);
#pragma unroll
        for (int s = 0; s < MOST_SPLITS; s++)
#pragma unroll
            for (int h = 0; h < 2 && s < p.splits; h++) sum = plus(sum, part[s][h]);
        const int token = i / (32 * SUMS) % TILES * 8 + i % 4 * 2;
        u16* const to = p.y + (i64)token * p.N + n[j];
        const float2 a = scale[j], b = bias[j];
        if (token < p.M) to[0] = half_bits(sum.x * a.x + b.x), to[next] = half_bits(sum.z * a.y + b.y);
        if (token + 1 < p.M) to[p.N] = half_bits(sum.y * a.x + b.x), to[p.N + next] = half_bits(sum.w * a.y + b.y);
    }
    if (p.splits > 1) cluster_barrier();  // a CTA must not end while others read its sums
}
