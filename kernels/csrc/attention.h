// Attention of one token over a static cache: rotary embedding, scores and values of CHUNK positions at a time, which
// are a task for some thread, then a merge (flash decoding: https://crfm.stanford.edu/2023/10/12/flashdecoding.html).
#pragma once
#include <cmath>

#include "rows.h"

constexpr int64_t CHUNK = 64;  // fixed, so that sums do not depend on the number of threads
static_assert(CHUNK % LANES == 0, "a chunk's scores are whole vectors");

// The positions that a token at `position` sees, and the chunks of the cache they lie in.
struct Span {
    int64_t begin, end, first, chunks;
    Span(int64_t position, int64_t window)
        : begin(window ? std::max<int64_t>(0, position + 1 - window) : 0), end(position + 1), first(begin / CHUNK),
          chunks((end + CHUNK - 1) / CHUNK - first) {}
};

// Where what a chunk gives for a query head goes; the next head's place is `chunks` further on.
struct Found {
    float *values, *peak, *total;  // [heads, chunks, size], [heads, chunks] twice
    int64_t chunks;
    Found at(int64_t head, int64_t chunk, int64_t size) const {
        int64_t place = head * chunks + chunk;
        return {values + place * size, peak + place, total + place, chunks};
    }
};

// A head's RMSNorm, if it has one, and its rotary embedding by cos, sin [size / 2], in place. behind: the norm comes after
// the rotary embedding; scale: of a norm that sees more than the head, else 0.
template <class T>
inline void turn(float* x, const T* norm, bool behind, float eps, float scale, const float* cos, const float* sin,
                 int64_t size) {
    auto normalise = [&] {
        if (!scale) scale = 1 / std::sqrt(sum_of_squares(x, size) / size + eps);
        for (int64_t d = 0; d < size; d++) x[d] = x[d] * scale * to_float(norm[d]);
    };
    if (norm && !behind) normalise();
    for (int64_t d = 0, half = size / 2; d < half; d++) {
        float low = x[d], high = x[d + half];
        x[d] = low * cos[d] - high * sin[d], x[d + half] = high * cos[d] + low * sin[d];
    }
    if (norm && behind) normalise();
}

// Keeps x [rows, n] within -cap … cap, if there is one: cap * tanh(x / cap). The rest of a row is no whole vector.
inline void soft_cap(float* x, int64_t rows, int64_t n, float cap) {
    if (!cap) return;
    for (; rows--; x += n)
        for (int64_t i = 0; i < n; i += LANES) {
            vf some = {};
            size_t bytes = std::min<int64_t>(LANES, n - i) * sizeof(float);
            std::memcpy(&some, x + i, bytes);
            some = cap - 2 * cap / (1.0f + exp(some * (2 / cap)));
            std::memcpy(x + i, &some, bytes);
        }
}

// exp(score - the largest) in place, with its sum and the largest; `scores` has room for whole vectors.
inline float soften(float* scores, int64_t count, float& peak) {
    for (int64_t i = count; i % LANES; i++) scores[i] = -__builtin_inff();
    vf highest = splat(-__FLT_MAX__);  // finite: where all scores are -infinity, all weights shall be 0, not NaN
    for (int64_t i = 0; i < count; i += LANES) highest = load(scores + i) > highest ? load(scores + i) : highest;
    float most = highest[0];
    for (int i = 1; i < LANES; i++) most = std::max(most, highest[i]);
    vf sums = {};
    for (int64_t i = 0; i < count; i += LANES) {
        vf weight = exp(load(scores + i) - most);
        store(scores + i, weight);
        sums += weight;
    }
    peak = most;
    return sum(sums);
}

// H query heads q [H, size], turned, scaled and arranged, over the keys and values [count, size] that they share. cap: of
// the scores, 0 for none.
template <class T, int H>
inline void attend(const float* q, const T* keys, const T* values, int64_t count, int64_t size, float cap, Found found) {
    float scores[H * CHUNK];
    dot_rows<T, H>(keys, q, size, count, scores, CHUNK, values);
    for (int h = 0; h < H; h++) soft_cap(scores + h * CHUNK, 1, count, cap);
    for (int h = 0; h < H; h++)
        found.total[h * found.chunks] = soften(scores + h * CHUNK, count, found.peak[h * found.chunks]);
    blend_rows<T, H>(values, scores, size, count, CHUNK, found.values, found.chunks * size);
}

// y [size] of one query head from its chunks' values [chunks, size], peak and total [chunks]; overwrites peak, which
// has room for whole vectors.
inline void merge(const float* values, float* peak, const float* total, int64_t chunks, int64_t size,
                  float* __restrict y) {
    float highest, sum = 0;
    soften(peak, chunks, highest);
    for (int64_t c = 0; c < chunks; c++) sum += peak[c] * total[c];
    std::fill_n(y, size, 0.0f);
    for (int64_t c = 0; c < chunks; c++)
        for (int64_t d = 0; d < size; d++) y[d] += peak[c] / sum * values[c * size + d];
}
