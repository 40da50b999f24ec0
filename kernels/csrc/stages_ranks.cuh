// What the GPUs of one host, a rank each, do together: sums of their updates of the residual, and one list of logits.
//
// A rank stores its values into the others' memory, each in one word with the number of the call, and polls its own until
// all have come: nothing is asked for over the link, there is no barrier, and no flag apart from the data (NCCL's LL
// protocol is built so). Calls have two sets of words by turns: who sends a call's has all of the call before, and so
// knows that those of the one before that have been read.
#pragma once
#include "stages_output.cuh"

constexpr int WORDS = most(DIM, SHARE);  // from a rank in a call
constexpr u64 PATIENCE = 60000000000;    // nanoseconds until a rank counts as lost

__device__ __forceinline__ u64* words(const Step& S, int to, int from, u32 call) {
    return S.words[to] + ((i64)(call & 1) * RANKS + from) * WORDS;
}
__device__ __forceinline__ u64 nanoseconds() {
    u64 now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}
__device__ __forceinline__ void send(const Step& S, int k, float value, u32 call) {
#pragma unroll
    for (int r = 0; r < RANKS; r++)
        if (r != S.rank)
            asm volatile("st.relaxed.sys.global.u64 [%0], %1;"
                         :: "l"(words(S, r, (int)S.rank, call) + k), "l"((u64)call << 32 | bits_of(value)) : "memory");
}
// A value of another rank; NaN if it does not come.
__device__ __forceinline__ float receive(const Step& S, int from, int k, u32 call) {
    const u64 *at = words(S, (int)S.rank, from, call) + k, begin = nanoseconds();
    u64 word;
    for (int polls = 1;; polls++) {
        asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(word) : "l"(at) : "memory");
        if ((u32)(word >> 32) == call) return __uint_as_float((u32)word);
        if (polls % 65536 == 0 && (__ldcg(S.lost) || nanoseconds() - begin > PATIENCE)) {
            *S.lost = 1;
            return __int_as_float(0x7fffffff);
        }
    }
}

// An update [DIM] becomes the sum of all ranks', in their order: the same bits everywhere. A rank's own lies on its grid,
// the sum need not. number: of the call in the step.
STAGE stage_sum(const __grid_constant__ Step S, const int number, float* update) {
    const int k = blockIdx.x * THREADS + threadIdx.x;
    launch_dependents();
    wait_for_producers();
    if (k >= DIM) return;
    const u32 call = __ldcg(S.calls) + number + 1;
    const float own = __ldcg(update + k);
    send(S, k, own, call);
    float sum = 0;
#pragma unroll
    for (int r = 0; r < RANKS; r++) sum += r == S.rank ? own : receive(S, r, k, call);
    update[k] = sum;
}

// The logits of all tokens in each rank's memory, and the likeliest one, which with its position becomes the next step's.
STAGE stage_gather(const __grid_constant__ Step S, const int number) {
    const int thread = blockIdx.x * THREADS + threadIdx.x, threads = gridDim.x * THREADS;
    wait_for_producers();
    const u32 call = __ldcg(S.calls) + number + 1;
    const int before = (int)S.rank * SHARE;
    for (int k = thread; k < least(SHARE, VOCAB - before); k += threads) send(S, k, __ldcg(S.logits + before + k), call);
    u64 best = 0;
    for (int token = thread; token < VOCAB; token += threads) {
        const int from = token / SHARE;
        const float y = from == S.rank ? __ldcg(S.logits + token) : receive(S, from, token - from * SHARE, call);
        if (from != S.rank) S.logits[token] = y;
        best = larger_key(best, key_of(y, token));
    }
    find_best(shared(), S, best, number + 1);
}
