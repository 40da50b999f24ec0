// Sums memory, several runs of it at once a thread, as a product with rows of a weight reads it. For bandwidth.py.
#include <cstdint>
#include <omp.h>

// By number of runs: 1 34, 2 35, 4 36, 8 38, 12 36 GB/s on two cores of an AMD EPYC (Zen 3); torch.sum 33.
constexpr int64_t RUNS = 8, WORDS = 8;  // eight words are a cache line

template <bool FETCH>
static uint64_t read_runs(const uint64_t* memory, int64_t length, int64_t ahead) {
    uint64_t sums[RUNS][WORDS] = {}, total = 0;
    for (int64_t i = 0; i < length; i += WORDS)
        for (int64_t run = 0; run < RUNS; ++run) {
            const uint64_t* line = memory + run * length + i;
            if (FETCH) __builtin_prefetch(line + ahead, 0, 2);  // into L2, as kernels/csrc/rows.h does
            for (int64_t word = 0; word < WORDS; ++word) sums[run][word] += line[word];
        }
    for (const auto& sum : sums)
        for (uint64_t word : sum) total += word;
    return total;
}

// `ahead`: how many bytes before its use a line is fetched; 0 leaves that to the processor.
extern "C" uint64_t read_memory(const uint64_t* memory, int64_t bytes, int threads, int64_t ahead) {
    uint64_t total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    {
        const int64_t length = bytes / 8 / omp_get_num_threads() / RUNS / WORDS * WORDS;
        const uint64_t* own = memory + omp_get_thread_num() * RUNS * length;
        total += ahead ? read_runs<true>(own, length, ahead / 8) : read_runs<false>(own, length, 0);
    }
    return total;
}
