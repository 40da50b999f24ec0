// teal::sparse_gemv on the CPU, and what else int8 and int4 need there: see kernels/sparse_gemv.py.
#include <omp.h>

#include "quantized.h"

struct Room {
    Floats x, value, partial, y;
    std::vector<int32_t> index;
};

template <class T, class Weight>
static void sparse_gemv(const T* x, const Weight& weight, const float* threshold, const float* scale, const T* bias,
                        T* y, int64_t K, int threads) {
    static thread_local Room room;
    int64_t N = weight.N;
    room.x.resize(K), room.value.resize(K), room.index.resize(K), room.partial.resize(SPLITS * N), room.y.resize(N);
    float *wide = room.x, *partial = room.partial, *sums = room.y;  // the calling thread's, for all
    for (int64_t k = 0; k < K; k++) wide[k] = widen(x[k]);
    Kept kept = keep(wide, threshold, K, room.index.data(), room.value);
#pragma omp parallel num_threads(threads)
    {
        Worker worker{omp_get_thread_num(), omp_get_num_threads()};
        multiply(kept, weight, partial, worker);
#pragma omp barrier
        int64_t begin = part(N, worker.id, worker.count), end = part(N, worker.id + 1, worker.count);
        collect(partial, N, scale, bias, begin, end - begin, sums + begin);
        for (int64_t n = begin; n < end; n++) y[n] = narrow<T>(sums[n]);
    }
}

// bits: of a value of the weight, which are of x's type, int8 or the four-bit rows of kernels/int4.py.
extern "C" void teal_sparse_gemv(int type, int bits, const void* x, const void* weight, const float* threshold,
                                 const float* scale, const void* bias, void* y, int64_t K, int64_t N, int64_t group,
                                 int threads) {
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        auto run = [&](auto rows) {
            sparse_gemv((const T*)x, rows, threshold, scale, (const T*)bias, (T*)y, K, threads);
        };
        if (bits == 4) run(Int4Rows((const uint8_t*)weight, N, group));
        else if (bits == 8) run(Rows<int8_t>{(const int8_t*)weight, N});
        else run(Rows<T>{(const T*)weight, N});
    });
}

// y [V] fp32 = rows [V, K] int8 times x, times scale [V]: see kernels/output_gemv.py.
extern "C" void teal_output_gemv(int type, const void* x, const void* rows, const float* scale, float* y, int64_t V,
                                 int64_t K, int threads) {
    static thread_local Room room;
    static thread_local Fixed fixed;
    room.x.resize(K);
    float* wide = room.x;
    with_type(type, [&](auto zero) {
        for (int64_t k = 0; k < K; k++) wide[k] = widen(((const decltype(zero)*)x)[k]);
    });
    fixed.set(wide, K);
    const int16_t* value = fixed.value.data();
    float unit = fixed.unit;
#pragma omp parallel for num_threads(threads)
    for (int64_t v = 0; v < V; v++) y[v] = dot((const int8_t*)rows + v * K, value, K) * (unit * scale[v]);
}

// y [K, N] fp32: rows of int8 or of four bits, times scale [N]: see kernels/widen.py.
extern "C" void teal_widen(int bits, const void* rows, const float* scale, float* y, int64_t K, int64_t N, int64_t group,
                           int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t k = 0; k < K; k++) {
        float* row = y + k * N;
        if (bits == 8) {
            const int8_t* values = (const int8_t*)rows + k * N;
            for (int64_t n = 0; n < N; n++) row[n] = values[n] * scale[n];
            continue;
        }
        Int4Rows weight((const uint8_t*)rows, N, group);
        const uint8_t* values = weight.row(k);
        for (int64_t n = 0; n < N; n += 32) {
            float unit = widen(((const bf16*)(values + N / 2))[n / group]);
            for (int64_t i = 0; i < 16; i++) {
                uint8_t byte = values[n / 2 + i];
                row[n + i] = ((byte & 15) - 8) * (unit * scale[n + i]);
                row[n + 16 + i] = ((byte >> 4) - 8) * (unit * scale[n + 16 + i]);
            }
        }
    }
}
