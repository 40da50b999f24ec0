// The two products of decoding: sums of weighted rows (a layer's kept channels, attention's values) and dot products
// with rows (the output layer, attention's keys). Rows are of type T, everything else is fp32.
//
// Split-K with a fixed number of splits: a list of rows is always cut into SPLITS parts, the terms of a part are added in
// the order of the list, and the parts in their order. So sums have the same bits on any number of threads.
#pragma once
#include <algorithm>
#include <array>
#include <numeric>
#include <vector>

#include "compact_vector.h"
#include "vec.h"

// Chosen for the demo model and for 4096 x 14336 on two cores of an AMD EPYC (Zen 3), bf16, cold weights.
constexpr int SPLITS = 4;        // two threads take two parts of the list and whole rows each: 1.1 to 1.3x half rows
constexpr int ROWS = 8;          // rows at once, so that a column's sum is loaded and stored once for all
constexpr int64_t SHORT = 8192;  // bytes of a row up to which fetching the next rows helps; longer streams are noticed
constexpr int64_t AHEAD = 2048;  // bytes that dot products fetch ahead
constexpr int64_t LINE = 64;     // bytes
constexpr int64_t GRAIN = 32;    // columns that threads do not share: a line of bf16, and whole pairs
static_assert(GRAIN % PAIR == 0, "else sums would depend on the number of threads");
constexpr int64_t MOST_TOKENS = 16;  // that a product reads its weight once for: of more, once for each so many
constexpr int64_t SUMS = 4096;       // of several tokens that are kept near the core: 16 KB of a first cache's 32

// Into L2: of lines on their way to L1 a core has fewer. A quarter faster on Zen 4 (docs/cpu_log.md). GCC 12 leaves loops
// and calls out that do nothing but __builtin_prefetch (findings/gcc-prefetch-calls.sh).
inline void fetch(const void* p) {
#if defined(__x86_64__)
    asm volatile("prefetcht1 %0" : : "m"(*(const char*)p));
#else
    __builtin_prefetch(p, 0, 2);
#endif
}

#define UNROLL _Pragma("GCC unroll 8")  // else small arrays of vectors live in memory

// An array on lines of its own, with room for whole vectors at its end.
class Floats {
    struct alignas(LINE) Line {
        float floats[LINE / 4];
    };
    std::vector<Line> lines;

  public:
    void resize(int64_t n) { lines.resize((n * 4 + LINE - 1) / LINE); }
    operator float*() { return (float*)lines.data(); }
};
static_assert(LINE % VECTOR_BYTES == 0, "whole lines hold whole vectors");

struct Worker {
    int id, count;
};

// Where part i of n things begins.
inline int64_t part(int64_t n, int64_t i, int64_t parts, int64_t grain = 1) {
    return i == parts ? n : n * i / parts / grain * grain;
}

// Calls f(number, first) until all tokens had their turn: with the largest numbers, as constants, from AT_ONCE down.
template <int AT_ONCE, class F> __attribute__((always_inline)) inline void in_groups(int64_t tokens, F f, int64_t t = 0) {
    for (; t + AT_ONCE <= tokens; t += AT_ONCE) f(std::integral_constant<int, AT_ONCE>(), t);
    if constexpr (AT_ONCE > 1) in_groups<AT_ONCE / 2>(tokens, f, t);
}
constexpr int AT_ONCE = LANES == 16 ? 8 : 4;  // tokens with two vectors of sums each, as registers hold them

// sums [TOKENS, stride] += x[t][0] row[0] + … + x[t][R-1] row[R-1] of each token t, in the order of load_pair. `next`: as
// many rows again, to be fetched meanwhile, or null.
template <class T, int R, int TOKENS>  // inlined, its pointers would not stay in registers
__attribute__((noinline)) void add_rows(const T* const* row, const float* const* x, const T* const* next,
                                        int64_t columns, float* sums, int64_t stride) {
    const T* rows[R];
    float scale[TOKENS][R];
    UNROLL for (int r = 0; r < R; r++) rows[r] = row[r];
    UNROLL for (int k = 0; k < TOKENS; k++)
        UNROLL for (int r = 0; r < R; r++) scale[k][r] = x[k][r];
    int64_t n = 0;
    for (; n + PAIR <= columns; n += PAIR) {
        if (next && n * int64_t(sizeof(T)) % LINE == 0)
            for (int r = 0; r < R; r++) fetch(next[r] + n);
        vf s[TOKENS], t[TOKENS];
        float* at = sums + n;
        UNROLL for (int k = 0; k < TOKENS; k++) s[k] = load(at + k * stride), t[k] = load(at + k * stride + LANES);
        UNROLL for (int r = 0; r < R; r++) {
            vf a, b;
            load_pair(rows[r] + n, a, b);
            UNROLL for (int k = 0; k < TOKENS; k++) s[k] += a * scale[k][r], t[k] += b * scale[k][r];
        }
        UNROLL for (int k = 0; k < TOKENS; k++) store(at + k * stride, s[k]), store(at + k * stride + LANES, t[k]);
    }
    for (; n < columns; n++)
        for (int k = 0; k < TOKENS; k++)
            for (int r = 0; r < R; r++) sums[k * stride + n] += to_float(rows[r][n]) * scale[k][r];
}

// What is added to the sums of some tokens: entries `first` to `first` + `count` of their lists, which name the same
// rows, at most ROWS. most: beyond it they are outliers, for each token.
struct Entries {
    const CompactVector* x;
    const float* most;
    int64_t tokens, first;
    int count;
};

// A weight [K, N] whose rows are N values of type W. Another format of weights is another such class (quantized.h).
template <class W> struct Rows {
    typedef W Element;
    static constexpr int64_t grain = GRAIN, tile = GRAIN;  // columns: what they are cut into, and several tokens' tiles
    const W* data;
    int64_t N;
    const W* row(int64_t k) const { return data + k * N; }
    int64_t bytes(int64_t columns) const { return columns * int64_t(sizeof(W)); }

    // sums [tokens, stride] += the entries times their rows, from column `begin` on. `next`: as `add_rows` has it.
    template <int MOST>
    void add(const Entries& of, const W* const* row, const W* const* next, int64_t begin, int64_t columns, float* sums,
             int64_t stride) const {
        const W *mine[ROWS], *theirs[ROWS];
        for (int r = 0; r < ROWS; r++) mine[r] = row[r] + begin, theirs[r] = next[r] + begin;
        in_groups<std::min(MOST, AT_ONCE)>(of.tokens, [&](auto number, int64_t t) __attribute__((always_inline)) {
            const float* x[number];
            for (int k = 0; k < number; k++) x[k] = of.x[t + k].value + of.first;
            const W* const* fetched = bytes(columns) <= SHORT && !t ? theirs : nullptr;
            if (of.count == ROWS) return add_rows<W, ROWS, number>(mine, x, fetched, columns, sums + t * stride, stride);
            for (int r = 0; r < of.count; r++) {
                add_rows<W, 1, number>(mine + r, x, fetched ? theirs + r : nullptr, columns, sums + t * stride, stride);
                for (int k = 0; k < number; k++) x[k]++;
            }
        });
    }
    static void finish(float* sums, int64_t columns) { rearrange<W>(sums, columns); }
    static float most(const CompactVector&) { return __builtin_inff(); }  // nothing is rounded
    static void add_outliers(const CompactVector&, int64_t, int64_t, float, int64_t, int64_t, float*) {}
};

// sums [tokens, stride] = entries `first` to `last` of each list times their rows, `columns` of them from `begin` on;
// entries up to `end` follow and are fetched two steps ahead. Outliers go last.
template <int MOST, class Weight>
inline void sum_rows(Entries of, int64_t first, int64_t last, int64_t end, const Weight& weight, int64_t begin,
                     int64_t columns, float* sums, int64_t stride) {
    if (MOST == 1) of.tokens = 1;  // a constant, so that one token's loops are no loops
    for (int64_t t = 0; t < of.tokens; t++) std::memset(sums + t * stride, 0, columns * sizeof(float));
    for (int64_t i = first; i < last; i += ROWS) {
        of.first = i, of.count = std::min<int64_t>(ROWS, last - i);
        const typename Weight::Element *row[ROWS], *next[ROWS];
        for (int r = 0; r < ROWS; r++) {
            row[r] = weight.row(of.x->index[std::min(i + r, last - 1)]);
            next[r] = weight.row(of.x->index[std::min(i + 2 * ROWS + r, end - 1)]);
        }
        weight.template add<MOST>(of, row, next, begin, columns, sums, stride);
    }
    for (int64_t t = 0; t < of.tokens; t++, sums += stride) {
        weight.add_outliers(of.x[t], first, last, of.most[t], begin, columns, sums);
        weight.finish(sums, columns);
    }
}

// This worker's share of partial [tokens, SPLITS, N], whose sums over splits are the products of x [tokens], lists of the
// same rows, and the weight [K, N]. Several tokens' sums are computed for as many columns at a time as stay near the core.
template <int MOST, class Weight>
__attribute__((noinline)) void multiply(const CompactVector* x, int64_t tokens, const Weight& weight, float* partial,
                                        Worker worker) {
    float most[MOST];
    Entries of{x, most, MOST == 1 ? 1 : tokens, 0, 0};
    for (int64_t t = 0; t < of.tokens; t++) most[t] = weight.most(x[t]);
    int shared = std::gcd(SPLITS, worker.count), splits = SPLITS / shared, parts = worker.count / shared;
    int64_t N = weight.N;
    int64_t begin = part(N, worker.id / shared, parts, weight.grain);
    int64_t end = part(N, worker.id / shared + 1, parts, weight.grain);
    int first = worker.id % shared * splits, last = first + splits;
    if constexpr (MOST == 1) {
        for (int split = first; split < last; split++)
            sum_rows<1>(of, part(x->count, split, SPLITS), part(x->count, split + 1, SPLITS), part(x->count, last, SPLITS),
                        weight, begin, end - begin, partial + split * N + begin, 0);
        return;
    }
    // Side by side: where they go, they often are a multiple of 4096 bytes apart, and would push one another out of L1.
    static thread_local Floats near;
    int64_t tile = std::max(SUMS / tokens / weight.tile, int64_t(1)) * weight.tile;
    near.resize(tokens * tile);
    for (int split = first; split < last; split++)
        for (int64_t n = begin, to; n < end; n = to) {
            to = std::min((n / tile + 1) * tile, end);
            sum_rows<MOST>(of, part(x->count, split, SPLITS), part(x->count, split + 1, SPLITS),
                           part(x->count, last, SPLITS), weight, n, to - n, near, tile);
            for (int64_t t = 0; t < tokens; t++)
                std::copy_n(near + t * tile, to - n, partial + (t * SPLITS + split) * N + n);
        }
}
template <class Weight>
inline void multiply(const CompactVector* x, int64_t tokens, const Weight& weight, float* partial, Worker worker) {
    if (tokens == 1) return multiply<1>(x, 1, weight, partial, worker);
    for (int64_t t = 0; t < tokens; t += MOST_TOKENS)
        multiply<MOST_TOKENS>(x + t, std::min(MOST_TOKENS, tokens - t), weight, partial + t * SPLITS * weight.N, worker);
}

// y [count]: elements from `begin` on of the product whose parts are partial [SPLITS, N], or, if it is `summed`, [N], times
// scale [N] and plus bias [N] unless null.
template <class T>
inline void collect(const float* partial, int64_t N, const float* scale, const T* bias, int64_t begin, int64_t count,
                    float* __restrict y, bool summed = false) {
    const float* p = partial + begin;
    if (summed) std::copy_n(p, count, y);
    else
        for (int64_t i = 0; i < count; i++) y[i] = p[i] + p[N + i] + p[2 * N + i] + p[3 * N + i];
    if (scale)
        for (int64_t i = 0; i < count; i++) y[i] *= scale[begin + i];
    if (bias)
        for (int64_t i = 0; i < count; i++) y[i] += to_float(bias[begin + i]);
}
static_assert(SPLITS == 4, "collect adds four parts");

// y [H, stride]: rows [count, K] times each of x [H, K], which `arrange` has put into the order of load_pair. `also`:
// as many rows again, to be fetched meanwhile, or null.
template <class T, int H>
inline void dot_rows(const T* rows, const float* x, int64_t K, int64_t count, float* y, int64_t stride, const T* also) {
    for (int64_t i = 0; i < count; i++, rows += K) {
        vf s[H], t[H];
        UNROLL for (int h = 0; h < H; h++) s[h] = t[h] = vf{};
        int64_t k = 0;
        for (; k + PAIR <= K; k += PAIR) {
            if (k * int64_t(sizeof(T)) % LINE == 0) {
                fetch((const char*)(rows + k) + AHEAD);
                if (also) fetch(also + i * K + k);
            }
            vf a, b;
            load_pair(rows + k, a, b);
            UNROLL for (int h = 0; h < H; h++) {
                s[h] += a * load(x + h * K + k);
                t[h] += b * load(x + h * K + k + LANES);
            }
        }
        UNROLL for (int h = 0; h < H; h++) {
            float rest = 0;
            for (int64_t j = k; j < K; j++) rest += to_float(rows[j]) * x[h * K + j];
            y[h * stride + i] = sum(s[h] + t[h]) + rest;
        }
    }
}

// y [H, step]: each of the weights [H, stride] of `count` rows times rows [count, N].
template <class T, int H>
inline void blend_rows(const T* rows, const float* weights, int64_t N, int64_t count, int64_t stride, float* y,
                       int64_t step) {
    int64_t n = 0;
    for (; n + PAIR <= N; n += PAIR) {
        vf s[H], t[H];
        UNROLL for (int h = 0; h < H; h++) s[h] = t[h] = vf{};
        for (int64_t i = 0; i < count; i++) {
            vf a, b;
            load_pair(rows + i * N + n, a, b);
            UNROLL for (int h = 0; h < H; h++) {
                s[h] += a * weights[h * stride + i];
                t[h] += b * weights[h * stride + i];
            }
        }
        UNROLL for (int h = 0; h < H; h++) {
            store(y + h * step + n, s[h]), store(y + h * step + n + LANES, t[h]);
            rearrange<T>(y + h * step + n, PAIR);
        }
    }
    for (; n < N; n++)
        for (int h = 0; h < H; h++) {
            float rest = 0;
            for (int64_t i = 0; i < count; i++) rest += weights[h * stride + i] * to_float(rows[i * N + n]);
            y[h * step + n] = rest;
        }
}
