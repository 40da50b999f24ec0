// Drawing the next token as engine/sampling.py has it (temperature, top-k, top-p, min-p), by one cluster of CTAs.
//
// A token is drawn by the largest of weight / noise, the noise of each being from an exponential distribution. What the
// filters leave need not be known for it. One is drawn of all, and stays if fewer than top_k tokens go before it and those
// weigh less than top_p; else neither it nor what comes behind it is left, and the next is drawn of what goes before. So the
// first one that stays is distributed as one drawn of what the filters leave (sampling by rejection, as FlashInfer does).
// Tokens go by their logits, equal ones by their numbers. Sums have a fixed order, and noise is a function of the seed, the
// position and the token alone: a seed gives the same tokens each time, on all ranks.
#pragma once
#include "stages_output.cuh"

constexpr int DRAWERS = 8;                           // CTAs, in a cluster
constexpr int OWN = cdiv(VOCAB, DRAWERS * THREADS);  // logits of a thread

struct Sampling {
    float inverse;       // log2(e) by the temperature
    float top_p, min_p;  // top_p from 1 on keeps all
    int top_k;           // from VOCAB on keeps all
    u64 seed;
};

__device__ __forceinline__ u32 mix(u32 h) {  // MurmurHash3's finalizer, and below SplitMix64
    h = (h ^ h >> 16) * 0x85ebca6bu;
    h = (h ^ h >> 13) * 0xc2b2ae35u;
    return h ^ h >> 16;
}
__device__ __forceinline__ u64 mix(u64 h) {
    h += 0x9e3779b97f4a7c15ull;
    h = (h ^ h >> 30) * 0xbf58476d1ce4e5b9ull;
    h = (h ^ h >> 27) * 0x94d049bb133111ebull;
    return h ^ h >> 31;
}

// -log(1 - uniform), with small ones by its series; log1pf has many instructions, and a thread many tokens.
__device__ __forceinline__ float exponential(float uniform) {
    const float series = uniform * (1 + uniform * (.5f + uniform * (1.f / 3)));
    return uniform < 0x1p-8f ? series : -__logf(1 - uniform);
}

struct Found {  // of some tokens: how many, and what they weigh
    float weight;
    u32 count;
};

struct Drawers {
    u64 (*slots)[DRAWERS * WARPS];  // by turns
    const Sampling how;
    const float largest;
    float logits[OWN];
    int turn;

    static __device__ __forceinline__ int number(int j) { return (j * DRAWERS + blockIdx.x) * THREADS + threadIdx.x; }
    __device__ __forceinline__ float weigh(float logit) const {
        float y;
        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"((logit - largest) * how.inverse));
        return y;
    }
    __device__ __forceinline__ bool before(int j, float logit, int token) const {
        return logits[j] > logit || (logits[j] == logit && number(j) < token);
    }

    // A function of what all threads of the cluster have, for all of them.
    template <class F> __device__ __forceinline__ u64 together(u64 mine, F f) {
        const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
        for (int o = 16; o; o >>= 1) mine = f(mine, __shfl_xor_sync(~0u, mine, o));
        u64* to = slots[turn] + blockIdx.x * WARPS + warp;
        if (lane < DRAWERS) {
            u32 at = (u32)__cvta_generic_to_shared(to);
            asm volatile("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(at) : "r"(lane));
            asm volatile("st.shared::cluster.u64 [%0], %1;" :: "r"(at), "l"(mine) : "memory");
        }
        meet();  // who writes the same slots again has met all others once more, and so they have read these
        u64 all = slots[turn][lane];
#pragma unroll
        for (int i = 1; i < DRAWERS * WARPS / 32; i++) all = f(all, slots[turn][lane + 32 * i]);
#pragma unroll
        for (int o = 16; o; o >>= 1) all = f(all, __shfl_xor_sync(~0u, all, o));
        turn ^= 1;
        return all;
    }
    static __device__ __forceinline__ void meet() {
        asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
    }

    // The tokens that go before this one.
    __device__ __forceinline__ Found leading(float logit, int token) {
        float weight = 0;
        u32 count = 0;
#pragma unroll
        for (int j = 0; j < OWN; j++)
            if (before(j, logit, token)) weight += weigh(logits[j]), count++;
        const u64 all = together((u64)bits_of(weight) << 32 | count, [](u64 a, u64 b) {
            const float sum = __uint_as_float((u32)(a >> 32)) + __uint_as_float((u32)(b >> 32));
            return (u64)bits_of(sum) << 32 | (u32)a + (u32)b;
        });
        return {__uint_as_float((u32)(all >> 32)), (u32)all};
    }

    // What the top_k likeliest weigh: a logit is looked for that just as many are not below.
    __device__ __forceinline__ float top_weight() {
        const u32 wanted = how.top_k;
        float low = largest, high = largest, step = 1 / how.inverse;
        Found above{}, found = leading(low, VOCAB);
        while (found.count < wanted) {
            if (step * how.inverse > 200) return found.weight;  // what is below weighs nothing
            above = found, high = low, low = largest - step, step *= 2;
            found = leading(low, VOCAB);
        }
        while (found.count > wanted && (high - low) * how.inverse > 1e-6f) {
            const float middle = low + (high - low) / 2;
            if (!(low < middle && middle < high)) break;
            const Found there = leading(middle, VOCAB);
            if (there.count < wanted) above = there, high = middle;
            else found = there, low = middle;
        }
        return found.count == wanted ? found.weight : above.weight + (wanted - above.count) * weigh(low);
    }

    // The likeliest to be drawn of the tokens that go before this one.
    __device__ __forceinline__ int draw(float logit, int token, u64 seed) {
        const u32 low = (u32)seed, high = (u32)(seed >> 32);
        u64 best = 0;
#pragma unroll
        for (int j = 0; j < OWN; j++) {
            const float weight = weigh(logits[j]);
            if (!before(j, logit, token) || weight < how.min_p) continue;
            const float uniform = (mix(mix(number(j) ^ low) + high) + .5f) * 0x1p-32f;
            best = larger_key(best, (u64)bits_of(__fdividef(weight, exponential(uniform))) << 32 | (u32)(~number(j)));
        }
        return (int)~(u32)together(best, larger_key);
    }
};

// In the likeliest token's place, one that is drawn. Logits that are not finite leave the likeliest.
STAGE stage_draw(const __grid_constant__ Step S) {
    __shared__ u64 slots[2][DRAWERS * WARPS];
    const Sampling how = *S.sampling;
    wait_for_producers();
    Drawers drawers{slots, how, __ldcg(S.largest)};
    if (!(fabsf(drawers.largest) < __int_as_float(0x7f800000))) return;
    const i64 position = __ldcg(S.position) - 1;  // find_best has counted it
#pragma unroll
    for (int j = 0; j < OWN; j++) {
        const int token = Drawers::number(j);
        drawers.logits[j] = token < VOCAB ? __ldcg(S.logits + token) : -__int_as_float(0x7f800000);
    }
    Drawers::meet();  // all have begun, so that their memory is there
    const bool all = how.top_k >= VOCAB && how.top_p >= 1;
    float weight = 0;
    if (how.top_p < 1) weight = how.top_k < VOCAB ? drawers.top_weight() : drawers.leading(-__int_as_float(0x7f800000), VOCAB).weight;
    const u64 seed = mix(how.seed) + position;
    float logit = -__int_as_float(0x7f800000);
    int token = VOCAB;
    for (int round = 0;; round++) {
        token = drawers.draw(logit, token, mix(mix(seed) + round));
        logit = __ldcg(S.logits + token);
        if (all) break;
        const Found found = drawers.leading(logit, token);
        if (!found.count || (found.count < how.top_k && (how.top_p >= 1 || found.weight < how.top_p * weight))) break;
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) *S.token = S.told[position % TOLD * 2] = token;
}
