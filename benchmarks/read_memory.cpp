// Sums memory, several runs of it at once a thread, as a product with rows of a weight reads it. For bandwidth.py.
#include <cstdint>
#include <omp.h>

// By number of runs: 1 34, 2 35, 4 36, 8 38, 12 36 GB/s on two cores of an AMD EPYC (Zen 3); torch.sum 33.
constexpr int64_t RUNS = 8, WORDS = 8;

extern "C" uint64_t read_memory(const uint64_t* memory, int64_t words, int threads) {
    uint64_t total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    {
        const int64_t length = words / omp_get_num_threads() / RUNS / WORDS * WORDS;
        const uint64_t* own = memory + omp_get_thread_num() * RUNS * length;
        uint64_t sums[RUNS][WORDS] = {};
        for (int64_t i = 0; i < length; i += WORDS)
            for (int64_t run = 0; run < RUNS; ++run)
                for (int64_t word = 0; word < WORDS; ++word) sums[run][word] += own[run * length + i + word];
        for (const auto& sum : sums)
            for (uint64_t word : sum) total += word;
    }
    return total;
}
