// The product of a sparse x and a weight in blocks: see kernels/block_gemv.py.
//
// A block of inputs is worked through at once, some of its rows at a time: whole numbers are summed, then scaled. As threads
// share the work at fixed places and fp32 terms are added in the order of the blocks, sums have the same bits on any
// number of threads and on every instruction set.
#pragma once
#include "blocks.h"

namespace blocks {

// The kept ones of BLOCK inputs, x = factor scale, those of each half filled up to whole fours by factors of zero.
struct Kept {
    float scale;
    int32_t middle, groups;  // fours of the first half, and of both
    int32_t sum[2];          // of each half's factors
    uint8_t row[BLOCK];
    int32_t factor[BLOCK / 4];
};

// The nearest whole numbers: a float that this is added to ends in one.
inline vi whole(vf x) { return (vi)(apart(x) + 0x1.8p23f) - (vi)splat(0x1.8p23f); }

// The largest kept |x| of a block, and what NaN and infinity make of it; kept: -1 or 0 each. No threshold keeps all.
inline float largest(const float* x, const float* threshold, int32_t* kept, float& check) {
    vf most = {}, checks = {};
    for (int i = 0; i < BLOCK; i += LANES) {
        vf v = load(x + i), size = (vf)((vu)v & 0x7fffffffu);
        vi keeps = threshold ? ~(size <= load(threshold + i)) : vi{} - 1;
        std::memcpy(kept + i, &keeps, sizeof keeps);
        size = (vf)((vi)size & keeps);
        most = size > most ? size : most;
        checks += (vf)((vi)v & keeps) * 0.0f;
    }
    check = sum(checks);
    float found = 0;
    for (int i = 0; i < LANES; i++) found = std::max(found, most[i]);
    return found;
}

// The channels of x [BLOCK] but those with |x| <= threshold, rounded to 8 bits of the largest; their number.
inline int64_t keep(const float* x, const float* threshold, Kept& out) {
    int32_t kept[BLOCK], whole_x[BLOCK];
    float check, most = largest(x, threshold, kept, check), inverse = most > 1e-30f ? 127 / most : 0;
    for (int i = 0; i < BLOCK; i += LANES) {
        vi v = whole(load(x + i) * inverse);
        std::memcpy(whole_x + i, &v, sizeof v);
    }
    int8_t factor[BLOCK + 1];
    uint8_t row[BLOCK + 1];
    int n = 0, count = 0;
    for (int half = 0; half < 2; half++) {
        int before = n;
        out.sum[half] = 0;
        for (int i = half * BLOCK / 2; i < (half + 1) * BLOCK / 2; i++) {
            row[n] = uint8_t(i), factor[n] = int8_t(whole_x[i]);
            out.sum[half] += factor[n] & kept[i];
            n -= kept[i];
        }
        count += n - before;
        for (; n % 4; n++) row[n] = row[n - 1], factor[n] = 0;
        (half ? out.groups : out.middle) = n / 4;
    }
    std::memcpy(out.row, row, BLOCK), std::memcpy(out.factor, factor, BLOCK);
    out.scale = most / 127 + check;
    return count;
}

// The same of all K inputs; out [K / BLOCK].
inline int64_t keep(const float* x, const float* threshold, int64_t K, Kept* out) {
    int64_t count = 0;
    for (int64_t b = 0; b < K / BLOCK; b++) count += keep(x + b * BLOCK, threshold ? threshold + b * BLOCK : nullptr, out[b]);
    return count;
}

// partial [SPLITS, stride] = each split's product of x, by blocks, and outputs `begin` to `end` of a part, for the splits
// from `first` to `last`. `at`: where output 0 stands. It is compiled in blocks.cpp.
void multiply(const Kept* kept, const Part& w, int64_t begin, int64_t end, int first, int last, float* partial,
              int64_t at, int64_t stride);

// A weight as parts beside each other, N outputs in all.
struct Weight {
    const Part* part;
    int64_t count, N;
};

// This worker's share of partial [SPLITS, N], whose sum over splits is the product of x, by blocks, and the weight.
inline void multiply(const Kept* kept, const Weight& weight, float* partial, Worker worker) {
    int shared = std::gcd(SPLITS, worker.count), splits = SPLITS / shared, threads = worker.count / shared;
    int first = worker.id % shared * splits;
    int64_t at = 0;
    for (const Part* w = weight.part; w < weight.part + weight.count; at += w++->N) {
        int64_t begin = part(w->padded(), worker.id / shared, threads, STRIP);
        int64_t end = part(w->padded(), worker.id / shared + 1, threads, STRIP);
        multiply(kept, *w, begin, end, first, first + splits, partial, at, weight.N);
    }
}

// This worker's share of y [N], the same product to the last bit: for the many outputs of an output layer, whose partial
// sums would be far from the core.
inline void multiply_many(const Kept* kept, const Weight& weight, float* y, Worker worker) {
    constexpr int64_t MANY = 32 * STRIP;
    alignas(LINE) static thread_local float partial[SPLITS * MANY];
    for (const Part* w = weight.part; w < weight.part + weight.count; y += w++->N) {
        int64_t begin = part(w->padded(), worker.id, worker.count, STRIP);
        int64_t end = part(w->padded(), worker.id + 1, worker.count, STRIP);
        for (int64_t n = begin; n < end; n += MANY) {
            multiply(kept, *w, n, std::min(n + MANY, end), 0, SPLITS, partial, -n, MANY);
            int64_t count = std::min(std::min(n + MANY, end), w->N) - n;
            collect<float>(partial, MANY, nullptr, nullptr, 0, count, y + n);
        }
    }
}

}  // namespace blocks
