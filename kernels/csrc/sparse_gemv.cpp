// teal::sparse_gemv and teal::sparse_gemm on the CPU, and what else int8 and int4 need there: see kernels/sparse_gemv.py.
#include <omp.h>

#include "quantized.h"

struct Scratch {
    Floats x, value, partial, y;
    std::vector<int32_t> index;
};

template <class T, class Weight>
static void sparse_gemv(const T* x, const Weight& weight, const float* threshold, const float* scale, const T* bias,
                        T* y, int64_t K, int threads) {
    static thread_local Scratch scratch;
    int64_t N = weight.N;
    scratch.x.resize(K), scratch.value.resize(K), scratch.index.resize(K);
    scratch.partial.resize(SPLITS * N), scratch.y.resize(N);
    float *wide = scratch.x, *partial = scratch.partial, *sums = scratch.y;  // the calling thread's, for all
    for (int64_t k = 0; k < K; k++) wide[k] = to_float(x[k]);
    CompactVector kept = compact(wide, threshold, K, scratch.index.data(), scratch.value);
#pragma omp parallel num_threads(threads)
    {
        Worker worker{omp_get_thread_num(), omp_get_num_threads()};
        multiply(&kept, 1, weight, partial, worker);
#pragma omp barrier
        int64_t begin = part(N, worker.id, worker.count), end = part(N, worker.id + 1, worker.count);
        collect(partial, N, scale, bias, begin, end - begin, sums + begin);
        for (int64_t n = begin; n < end; n++) y[n] = from_float<T>(sums[n]);
    }
}

// Several tokens at once, which take the rows that any of them keeps.
template <class T, class Weight>
static void sparse_gemm(const T* x, int64_t tokens, const Weight& weight, const float* threshold, const float* scale,
                        const T* bias, T* y, int64_t K, int threads) {
    static thread_local Scratch scratch;
    static thread_local std::vector<CompactVector> lists;
    int64_t N = weight.N;
    scratch.x.resize(tokens * K), scratch.value.resize(tokens * K), scratch.index.resize(K);
    scratch.partial.resize(tokens * SPLITS * N), scratch.y.resize(tokens * N), lists.resize(tokens);
    float *wide = scratch.x, *value = scratch.value, *partial = scratch.partial, *sums = scratch.y;
    int32_t* index = scratch.index.data();
    for (int64_t i = 0; i < tokens * K; i++) wide[i] = to_float(x[i]);
    int64_t count = unite(wide, tokens, K, threshold, K, index);
    for (int64_t t = 0; t < tokens; t++) lists[t] = choose(wide + t * K, threshold, index, count, value + t * K);
    const CompactVector* list = lists.data();  // the calling thread's
#pragma omp parallel num_threads(threads)
    {
        Worker worker{omp_get_thread_num(), omp_get_num_threads()};
        multiply(list, tokens, weight, partial, worker);
#pragma omp barrier
        int64_t begin = part(N, worker.id, worker.count), end = part(N, worker.id + 1, worker.count);
        for (int64_t t = 0; t < tokens; t++) {
            collect(partial + t * SPLITS * N, N, scale, bias, begin, end - begin, sums + t * N + begin);
            for (int64_t n = t * N + begin; n < t * N + end; n++) y[n] = from_float<T>(sums[n]);
        }
    }
}

// Calls f(weight): rows of values of so many bits, which are of type T, int8 or in groups of four bits.
template <class T, class F> static void with_rows(T, int bits, const void* packed, int64_t N, int64_t group, F f) {
    if (bits == 4) f(Int4Rows((const uint8_t*)packed, N, group));
    else if (bits == 8) f(Rows<int8_t>{(const int8_t*)packed, N});
    else f(Rows<T>{(const T*)packed, N});
}

// bits: of a value of the packed weight, which is of x's type, int8 or the four-bit rows of kernels/int4.py.
extern "C" void teal_sparse_gemv(int type, int bits, const void* x, const void* packed, const float* threshold,
                                 const float* scale, const void* bias, void* y, int64_t K, int64_t N, int64_t group,
                                 int threads) {
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        with_rows(zero, bits, packed, N, group, [&](auto weight) {
            sparse_gemv((const T*)x, weight, threshold, scale, (const T*)bias, (T*)y, K, threads);
        });
    });
}

// The same of x [tokens, K], as y [tokens, N]: see kernels/sparse_gemm.py.
extern "C" void teal_sparse_gemm(int type, int bits, const void* x, const void* packed, const float* threshold,
                                 const float* scale, const void* bias, void* y, int64_t tokens, int64_t K, int64_t N,
                                 int64_t group, int threads) {
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        with_rows(zero, bits, packed, N, group, [&](auto weight) {
            sparse_gemm((const T*)x, tokens, weight, threshold, scale, (const T*)bias, (T*)y, K, threads);
        });
    });
}

// y [V] fp32 = scale [V] ⊙ (weight [V, K] int8 times x): see kernels/output_gemv.py.
extern "C" void teal_output_gemv(int type, const void* x, const void* weight, const float* scale, float* y, int64_t V,
                                 int64_t K, int threads) {
    static thread_local Scratch scratch;
    static thread_local Fixed fixed;
    scratch.x.resize(K);
    float* wide = scratch.x;
    with_type(type, [&](auto zero) {
        for (int64_t k = 0; k < K; k++) wide[k] = to_float(((const decltype(zero)*)x)[k]);
    });
    fixed.set(wide, K);
    const Fixed& shared = fixed;  // the calling thread's
#pragma omp parallel for num_threads(threads)
    for (int64_t v = 0; v < V; v++) y[v] = shared.times((const int8_t*)weight + v * K, scale[v]);
}

// Columns from `begin` on of a row of int8 or four-bit values times scale, as y [columns].
template <class T>
static void dequantize_row(const Rows<int8_t>& weight, int64_t k, const float* scale, int64_t begin, int64_t columns,
                           T* y) {
    const int8_t* values = weight.row(k) + begin;
    for (int64_t n = 0; n < columns; n++) y[n] = from_float<T>(values[n] * scale[begin + n]);
}
template <class T>
static void dequantize_row(const Int4Rows& weight, int64_t k, const float* scale, int64_t begin, int64_t columns,
                           T* y) {
    const uint8_t* values = weight.row(k);
    const bf16* group_scales = (const bf16*)(values + weight.N / 2);
    for (int64_t n = begin; n < begin + columns; n += 32, y += 32) {
        float group_scale = to_float(group_scales[n / weight.group]);
        for (int64_t i = 0; i < 16; i++) {
            uint8_t byte = values[n / 2 + i];
            y[i] = from_float<T>(((byte & 15) - 8) * (group_scale * scale[n + i]));
            y[16 + i] = from_float<T>(((byte >> 4) - 8) * (group_scale * scale[n + 16 + i]));
        }
    }
}

// y [K, columns], of the type that `type` numbers: columns from `begin` on of an int8 or four-bit weight times scale [N]:
// see kernels/dequantize.py.
extern "C" void teal_dequantize(int type, int bits, const void* packed, const float* scale, void* y, int64_t K,
                                int64_t N, int64_t group, int64_t begin, int64_t columns, int threads) {
    with_type(type, [&](auto zero) {
        auto run = [&](auto weight) {
#pragma omp parallel for num_threads(threads)
            for (int64_t k = 0; k < K; k++)
                dequantize_row(weight, k, scale, begin, columns, (decltype(zero)*)y + k * columns);
        };
        if (bits == 4) run(Int4Rows((const uint8_t*)packed, N, group));
        else run(Rows<int8_t>{(const int8_t*)packed, N});
    });
}
