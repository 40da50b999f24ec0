// What the kernels of three_stages.cu share: the model's constants, 16-bit floats, loads, sums on grids, launches.
// kernels/decode_stages.py defines the constants: DIM, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB; HALF_IS_FP16; BITS_A and
// BITS_M, of attention's weights and the MLP's, and GROUP, of four-bit scales; OUTPUT_BITS; QK_NORM; how launches are cut
// (CTAS_QKV, CTAS_O, CTAS_MLP, SHARERS, CHANNELS, SPLITS) and unrolled (UNROLL_A, UNROLL_M); ADDENDS_QKV, …, how many CTAs
// at most add to a column; RANKS, the GPUs that a model is cut over, HEADS, KV_HEADS and FFN being one's share; DELAY, for
// tests: microseconds that some CTAs come late. Structures are as StageLayer and StageStep there. No header of CUDA's is included: NVRTC alone is enough to compile this.
#pragma once
#include "halves.cuh"

#define STAGE extern "C" __global__ void __launch_bounds__(THREADS, 1)  // one CTA a multiprocessor

constexpr int THREADS = 512, WARPS = 16;
constexpr int QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM;
constexpr int PIECE = 16, SEGMENT = 32 * PIECE;  // bytes that a thread and a warp load at once
constexpr int SHORT = 512;  // positions that the attention of stage_o takes itself; of more, stage_attention
constexpr int TOLD = 8;     // answers that the host may be behind
constexpr int MOST_RANKS = 8, SHARE = cdiv(VOCAB, RANKS);  // tokens of whose logits a rank computes, the last one perhaps fewer
constexpr float LEVELS = 32767;          // of fixed point in 16 bits
constexpr float BEYOND = 64, HELD = 16;  // as kernels/outliers.py has RARE and HELD
constexpr float ROUNDING = 12582912;     // 1.5 * 2^23: added to |x| < 2^22 it leaves the whole number in the low bits

constexpr int columns(int bits) { return 8 * PIECE / bits; }  // values that a thread loads at once

struct Layer {
    const u8 *wqkv, *wo, *w13, *w2;  // rows of input channels
    const float *qkv_scale, *o_scale, *gate_up_scale, *down_scale;  // of outputs; null in 16 bits
    const u16* gate_up_groups;       // four bits: bf16 [2 FFN / GROUP][DIM], the rows' scales, turned
    const u16 *attention_norm, *ffn_norm, *q_norm, *k_norm;
    const u16 *qkv_bias, *o_bias, *gate_up_bias, *down_bias;  // or null
    const float *qkv_threshold, *o_threshold, *gate_up_threshold, *down_threshold;
    const float *qkv_grid, *o_grid, *down_grid;  // 1.5 * 2^23 times a column's grid
    u16 *k, *v;                      // [KV_HEADS][length][HEAD_DIM]
    i64 window;                      // 0: all positions
};

struct Step {
    float *residual[2], *o_update[2];  // by turns; the residual before a layer's attention, and what o adds to it
    float *mlp_update, *qkv;           // updates and qkv are zero when their layer begins to add to them
    float* partial;                    // [HEADS][SPLITS][RESULT], of stage_attention
    const u16* embedding;
    i64 *token, *position;
    const float* frequencies;
    const u8* output;
    const float* output_scale;
    const u16* norm;
    float *logits, *largest;
    u64* best;
    u32 *arrived, *beyond;  // beyond: how many addends left their grid
    i64* told;              // in the host's memory: a token and its logit's bits, by turns of TOLD positions
    const struct Sampling* sampling;  // how tokens are drawn (stages_draw.cuh)
    i64 length;
    u64* words[MOST_RANKS];  // in each rank's memory: what ranks send it (stages_ranks.cuh)
    u32 *calls, *lost;       // how often they have sent so far; whether one was waited for in vain
    i64 rank;
    float eps;
};

static_assert(sizeof(Layer) == LAYER_BYTES && sizeof(Step) == STEP_BYTES, "the structures of kernels/decode_stages.py");

// ---- memory ----
// To shared memory, without waiting for it: copies_arrive() does, and a barrier then shows it to other threads.
template <int BYTES = 16> __device__ __forceinline__ void copy(void* to, const void* from) {
    const u32 at = (u32)__cvta_generic_to_shared(to);
    if constexpr (BYTES == 2) *(u16*)to = __ldg((const u16*)from);
    else asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" :: "r"(at), "l"(from), "n"(BYTES) : "memory");
}
__device__ __forceinline__ void copies_arrive() { asm volatile("cp.async.wait_all;" ::: "memory"); }
__device__ __forceinline__ void add_to(float* p, float4 v) {
    asm volatile("red.global.add.v4.f32 [%0], {%1,%2,%3,%4};"
                 :: "l"(p), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
// Addends that are rounded to their column's grid have the same sum in any order, while all partial sums are below 2^24
// grids: as many of them as there may be. Reproducible summation by rounding before it: Demmel and Nguyen, ARITH 2013.
__device__ __forceinline__ float on_grid(float v, float c) { return __fadd_rn(__fadd_rn(v, c), -c); }
template <int ADDENDS> __device__ __forceinline__ void add_on_grid(float* p, float4 v, float4 c, u32* beyond) {
    constexpr float EXACT = 4.f / (3 * most(ADDENDS, 4));  // 2^24 grids by ADDENDS, of 1.5 * 2^23
    const bool inside = fabsf(v.x) <= c.x * EXACT && fabsf(v.y) <= c.y * EXACT && fabsf(v.z) <= c.z * EXACT &&
                        fabsf(v.w) <= c.w * EXACT;
    if (!inside) atomicAdd(beyond, 1u);
    add_to(p, make_float4(on_grid(v.x, c.x), on_grid(v.y, c.y), on_grid(v.z, c.z), on_grid(v.w, c.w)));
}
// ---- dependent launches: a kernel starts early, and waits before it touches what those before it made ----
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void wait_for_producers() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
    if (DELAY && blockIdx.x % 5 == 0)
        for (int i = 0; i < DELAY; i++) asm volatile("nanosleep.u32 1000;");
}

// ---- warps ----
template <class F> __device__ __forceinline__ float across(float x, F f, int from, int below) {
#pragma unroll
    for (int o = from; o < below; o <<= 1) x = f(x, __shfl_xor_sync(~0u, x, o));
    return x;
}
__device__ __forceinline__ float add(float a, float b) { return a + b; }
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ float smaller(float a, float b) { return fminf(a, b); }
