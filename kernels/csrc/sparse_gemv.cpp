// teal::sparse_gemv on the CPU: see kernels/sparse_gemv.py.
#include <omp.h>

#include "rows.h"

struct Room {
    Floats x, value, partial, y;
    std::vector<int32_t> index;
};

template <class T>
static void sparse_gemv(const T* x, const T* weight, const float* threshold, const T* bias, T* y, int64_t K, int64_t N,
                        int threads) {
    static thread_local Room room;
    room.x.resize(K), room.value.resize(K), room.index.resize(K), room.partial.resize(SPLITS * N), room.y.resize(N);
    float *wide = room.x, *partial = room.partial, *sums = room.y;  // the calling thread's, for all
    for (int64_t k = 0; k < K; k++) wide[k] = widen(x[k]);
    Kept kept = keep(wide, threshold, K, room.index.data(), room.value);
#pragma omp parallel num_threads(threads)
    {
        Worker worker{omp_get_thread_num(), omp_get_num_threads()};
        multiply(kept, weight, N, partial, worker);
#pragma omp barrier
        int64_t begin = part(N, worker.id, worker.count), end = part(N, worker.id + 1, worker.count);
        collect(partial, N, bias, begin, end - begin, sums + begin);
        for (int64_t n = begin; n < end; n++) y[n] = narrow<T>(sums[n]);
    }
}

extern "C" void teal_sparse_gemv(int type, const void* x, const void* weight, const float* threshold, const void* bias,
                                 void* y, int64_t K, int64_t N, int threads) {
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        sparse_gemv((const T*)x, (const T*)weight, threshold, (const T*)bias, (T*)y, K, N, threads);
    });
}
