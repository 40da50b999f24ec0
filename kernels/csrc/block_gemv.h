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

// Where products go: output 0 of the first token and split, and how far the next token's and split's are.
struct Partial {
    float* first;
    int64_t token, split;
};

// to = each split's products of x [tokens, K / BLOCK] and outputs `begin` to `end` of a part, for the splits from `first`
// to `last`. Several tokens keep all channels. It is compiled in blocks.cpp.
void multiply(const Kept* x, int64_t tokens, const Part& w, int64_t begin, int64_t end, int first, int last, Partial to);

// Whether so many tokens' products are multiplied by tiles (block_tiles.h).
#if defined(__AMX_INT8__)
constexpr int64_t FEWEST_BY_TILES = 5;
#else
constexpr int64_t FEWEST_BY_TILES = INT64_MAX;
#endif
inline bool by_tiles(int64_t tokens) { return tokens >= FEWEST_BY_TILES; }

// y [tokens, stride] = the same products, summed over the splits.
void multiply_tiles(const Kept* x, int64_t tokens, const Part& w, int64_t begin, int64_t end, float* y, int64_t stride);

// A weight as parts beside each other, N outputs in all.
struct Weight {
    const Part* part;
    int64_t count, N;
};

// This worker's share of partial [tokens, SPLITS, N], whose sums over splits are the products of x and the weight.
inline void multiply(const Kept* x, int64_t tokens, const Weight& weight, float* partial, Worker worker) {
    int shared = std::gcd(SPLITS, worker.count), splits = SPLITS / shared, threads = worker.count / shared;
    int first = worker.id % shared * splits;
    for (const Part* w = weight.part; w < weight.part + weight.count; partial += w++->N) {
        int64_t begin = part(w->padded(), worker.id / shared, threads, STRIP);
        int64_t end = part(w->padded(), worker.id / shared + 1, threads, STRIP);
        multiply(x, tokens, *w, begin, end, first, first + splits, {partial, SPLITS * weight.N, weight.N});
    }
}

// This worker's share of y [tokens, N], the same products to the last bit: for tiles and for the many outputs of an output
// layer, whose partial sums would be far from the core.
inline void multiply_many(const Kept* x, int64_t tokens, const Weight& weight, float* y, Worker worker) {
    constexpr int64_t MANY = 32 * STRIP;
    static thread_local Floats partial;
    int64_t many = std::max(MANY / tokens / STRIP, int64_t(1)) * STRIP;
    partial.resize(tokens * SPLITS * many);
    for (const Part* w = weight.part; w < weight.part + weight.count; y += w++->N) {
        int64_t begin = part(w->padded(), worker.id, worker.count, STRIP);
        int64_t end = part(w->padded(), worker.id + 1, worker.count, STRIP);
        if (by_tiles(tokens)) {
            multiply_tiles(x, tokens, *w, begin, end, y, weight.N);
            continue;
        }
        for (int64_t n = begin; n < end; n += many) {
            multiply(x, tokens, *w, n, std::min(n + many, end), 0, SPLITS, {partial - n, SPLITS * many, many});
            int64_t count = std::min(std::min(n + many, end), w->N) - n;
            for (int64_t t = 0; t < tokens; t++)
                collect<float>(partial + t * SPLITS * many, many, nullptr, nullptr, 0, count, y + t * weight.N + n);
        }
    }
}

}  // namespace blocks
