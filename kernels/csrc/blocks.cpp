// teal::block_gemv on the CPU, and what else weights in blocks need there: see kernels/block_gemv.py and
// kernels/block_values.py.
#include <omp.h>

#include "block_tiles.h"
#include "block_tokens.h"
#include "block_values.h"

using namespace blocks;

void blocks::multiply(const Kept* x, int64_t tokens, const Part& w, int64_t begin, int64_t end, int first, int last,
                      Partial to) {
    int64_t K = w.K / BLOCK;
    with_kind(w.type, [&](auto kind) {
        for (int split = first; split < last; split++) {
            int64_t from = part(K, split, SPLITS), until = part(K, split + 1, SPLITS);
            float* y = to.first + split * to.split;
            if (tokens == 1) Product<decltype(kind)>(w, x, begin, end, y).run(from, until);
            else
                for (int64_t t = 0; t < tokens; t += MOST_TOKENS)
                    Products<decltype(kind)>(
                        {w, x + t * K, std::min(MOST_TOKENS, tokens - t), begin, end, y + t * to.token, to.token})
                        .run(from, until);
        }
    });
}

void blocks::multiply_tiles(const Kept* x, int64_t tokens, const Part& w, int64_t begin, int64_t end, float* y,
                            int64_t stride) {
#if defined(__AMX_INT8__)
    with_kind(w.type, [&](auto kind) {
        for (int64_t t = 0; t < tokens; t += MOST_TILE_TOKENS)
            TileProducts<decltype(kind)>({w, x + t * (w.K / BLOCK), std::min(MOST_TILE_TOKENS, tokens - t), begin, end,
                                          y + t * stride, stride})
                .run();
    });
#endif
}

struct BlockScratch {
    Floats x, partial;
    std::vector<Kept> kept;
};

template <class T>
static void block_gemv(const T* x, Weight weight, const float* threshold, const T* bias, T* y, int64_t K, int threads) {
    int64_t N = weight.N;
    static thread_local BlockScratch scratch;
    scratch.x.resize(K), scratch.partial.resize(SPLITS * N), scratch.kept.resize(K / BLOCK);
    float *wide = scratch.x, *partial = scratch.partial;  // the calling thread's, for all
    Kept* kept = scratch.kept.data();
    for (int64_t k = 0; k < K; k++) wide[k] = to_float(x[k]);
    keep(wide, threshold, K, kept);
#pragma omp parallel num_threads(threads)
    {
        Worker worker{omp_get_thread_num(), omp_get_num_threads()};
        multiply(kept, 1, weight, partial, worker);
#pragma omp barrier
        int64_t begin = part(N, worker.id, worker.count), end = part(N, worker.id + 1, worker.count);
        std::vector<float> sums(end - begin);
        collect(partial, N, nullptr, bias, begin, end - begin, sums.data());
        for (int64_t n = begin; n < end; n++) y[n] = from_float<T>(sums[n - begin]);
    }
}

extern "C" void teal_block_gemv(int type, const void* x, const Part* parts, int64_t count, const float* threshold,
                                const void* bias, void* y, int64_t K, int64_t N, int threads) {
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        block_gemv((const T*)x, {parts, count, N}, threshold, (const T*)bias, (T*)y, K, threads);
    });
}

// y [K, end - begin], of a part's outputs from `begin` on, a multiple of 128.
extern "C" void teal_block_columns(int type, const Part* part, int64_t begin, int64_t end, void* y, int threads) {
    with_type(type, [&](auto zero) { columns(*part, begin, end, (decltype(zero)*)y, threads); });
}

// y [count, K]: the weights of some outputs.
extern "C" void teal_block_outputs(int type, const Part* part, const int64_t* outputs, int64_t count, void* y) {
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        for (int64_t i = 0; i < count; i++) look_up_output<T>(*part, outputs[i], (T*)y + i * part->K);
    });
}
