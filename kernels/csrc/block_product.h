// A block of inputs and a strip of outputs at a time: whole numbers are summed, then scaled. See block_gemv.h.
#pragma once
#include "block_tokens.h"

namespace blocks {

constexpr int64_t TILE = 8 * STRIP;  // outputs whose sums stay in L1 for SUPER inputs; of several tokens a STRIP
constexpr int64_t AHEAD = 6;         // strips that are fetched ahead: of 2, 4 and 6 the best on a Zen 5, cold weights

// The way through blocks and strips: SUPER inputs at a time, of which a tile of outputs, of which block by block. Blocks
// without a kept channel are left out.
struct Walk {
    const Kept* kept;
    int64_t begin, end, last, tile;   // outputs, the end of the blocks, and the outputs of a tile
    int64_t super, super_end, n;      // blocks that share scales, and the tile's first output
    int64_t b, s;                     // the block, and the strip's first output

    Walk(const Kept* kept, int64_t begin, int64_t end, int64_t first, int64_t last, int64_t tile)
        : kept(kept), begin(begin), end(end), last(last), tile(tile), n(begin), b(first), s(begin) {
        enter(first);
        settle();
    }
    bool done() const { return super >= last; }
    int64_t tile_end() const { return std::min(n + tile, end); }
    void next() {
        s += STRIP;
        if (s < tile_end()) return;
        s = n, b++;
        settle();
    }

  private:
    void enter(int64_t block) {
        super = block, super_end = std::min(last, (block / (SUPER / BLOCK) + 1) * (SUPER / BLOCK));
    }
    void settle() {
        while (!done()) {
            while (b < super_end && !kept[b].groups) b++;
            if (b < super_end) return;
            n += tile;
            if (n >= end) n = begin, enter(super_end);
            b = super, s = n;
        }
    }
};

// The products of up to MOST tokens with a part; several keep all their channels.
template <class Kind, int MOST> class Product {
    typedef ScaleOf<Kind> Scale;
    typedef MinimumOf<Kind> Minimum;
    static constexpr int64_t SCALES = BLOCK / Kind::SCALE_BLOCK, TILE = MOST == 1 ? blocks::TILE : STRIP;

    const Part& w;
    const Kept* const kept;  // [tokens, K / BLOCK]
    const int64_t tokens;
    const int64_t N, begin, end;  // N: with padding; begin, end: outputs that are computed
    float* const y;               // output 0's place, and the next token's `stride` further on
    const int64_t stride;
    alignas(LINE) float sums[MOST * TILE];
    alignas(LINE) float minimums[MOST * TILE];

  public:
    Product(const Part& w, const Kept* kept, int64_t tokens, int64_t begin, int64_t end, float* y, int64_t stride)
        : w(w), kept(kept), tokens(MOST == 1 ? 1 : tokens), N(w.padded()), begin(begin), end(end), y(y), stride(stride) {}

    // y = the product of blocks `first` to `last`.
    void run(int64_t first, int64_t last) {
        if (begin >= std::min(end, w.N)) return;
        for (int64_t t = 0; t < tokens; t++) std::fill(y + t * stride + begin, y + t * stride + std::min(end, w.N), 0.0f);
        Walk at(kept, begin, end, first, last, TILE), later = at;
        for (int i = 0; i < AHEAD && !later.done(); i++) later.next();
        while (!at.done()) add_tile(at, later);
    }

  private:
    void add_tile(Walk& at, Walk& later) {
        int64_t n = at.n, super = at.super, to = at.tile_end();
        std::fill_n(sums, (tokens - 1) * TILE + to - n, 0.0f);
        if (Kind::MINIMUM && Kind::NESTED) std::fill_n(minimums, (tokens - 1) * TILE + to - n, 0.0f);
        for (; at.n == n && at.super == super; at.next()) {
            if (!later.done()) {
                ahead(later.b, later.s);
                later.next();
            }
            if (to - at.s >= STRIP) add_strip<STRIP>(at.b, at.s, at.s - n);
            else add_strip<HALF>(at.b, at.s, at.s - n);
        }
        for (int64_t t = 0; t < tokens; t++)
            finish(super / (SUPER / BLOCK) * N + n, t, n, std::min(to, w.N) - n);
    }

    // Fetches what comes AHEAD strips later.
    void ahead(int64_t b, int64_t s) const {
        const Kept& x = kept[b];
        const uint8_t* low = w.plane[0] + BLOCK * (b * N + s) * Kind::LOW / 8;
        const uint8_t* high = w.plane[1] + BLOCK * (b * N + s) * Kind::HIGH / 8;
        for (int i = 0; i < 4 * x.groups; i++) {
            fetch(low + x.row[i] * (STRIP * Kind::LOW / 8));
            if (Kind::LOW == 8) fetch(low + x.row[i] * STRIP + LINE);
            if (Kind::HIGH) fetch(high + x.row[i] * (STRIP * Kind::HIGH / 8));
        }
        for (int64_t i = 0; i < SCALES; i++) {
            const Scale* scale = (const Scale*)w.scale + (b * SCALES + i) * N + s;
            for (int64_t j = 0; j < STRIP; j += LINE / int64_t(sizeof(Scale))) fetch(scale + j);
        }
        if (Kind::MINIMUM)
            for (int64_t j = 0; j < STRIP; j += LINE / int64_t(sizeof(Minimum)))
                fetch((const Minimum*)w.minimum + b * N + s + j);
    }

    // Block b's share of the sums of the strip from output s on, which is output `at` of its tile.
    template <int64_t WIDTH> void add_strip(int64_t b, int64_t s, int64_t at) {
        const uint8_t* low = w.plane[0] + BLOCK * (b * N + s) * Kind::LOW / 8;
        const uint8_t* high = Kind::HIGH ? w.plane[1] + BLOCK * (b * N + s) * Kind::HIGH / 8 : nullptr;
        const Scale* scale = (const Scale*)w.scale + b * SCALES * N + s;
        const Minimum* minimum = (const Minimum*)w.minimum + b * N + s;
        if constexpr (MOST > 1) {
            const Strip<Kind, WIDTH> strip(low, high);
            return in_groups<TOKENS_AT_ONCE>(tokens, [&](auto number, int64_t t) {
                const Kept* x[number];
                for (int k = 0; k < number; k++) x[k] = kept + (t + k) * (w.K / BLOCK) + b;
                strip.template add<number>(x, scale, N, sums + t * TILE, TILE);
                if (Kind::MINIMUM)
                    strip.template add_minimum<number>(x, minimum, (Kind::NESTED ? minimums : sums) + t * TILE, TILE);
            });
        }
        const Kept& x = kept[b];
        UNROLL for (int chunk = 0; chunk < CHUNKS; chunk++) {
            if (SCALES == 1) {
                add<WIDTH>(x, 0, x.groups, x.sum[0] + x.sum[1], low, high, chunk, scale, sums + at);
            } else {
                if (x.middle) add<WIDTH>(x, 0, x.middle, x.sum[0], low, high, chunk, scale, sums + at);
                if (x.groups > x.middle)
                    add<WIDTH>(x, x.middle, x.groups, x.sum[1], low, high, chunk, scale + N, sums + at);
            }
        }
        if (!Kind::MINIMUM) return;
        float share = x.scale * float(x.sum[0] + x.sum[1]), *to = (Kind::NESTED ? minimums : sums) + at;
        UNROLL for (int64_t n = 0; n < WIDTH; n += LANES)
            store(to + n, load(to + n) + apart(load(minimum + n) * share));
    }

    // Groups `first` to `last` of four kept rows, for chunk `chunk` of each half of the strip.
    template <int64_t WIDTH>
    static void add(const Kept& x, int first, int last, int32_t sum, const uint8_t* low, const uint8_t* high, int chunk,
                    const Scale* scale, float* to) {
        constexpr int HALVES = WIDTH / HALF;
        vi total[HALVES][QUADS];
        UNROLL for (int half = 0; half < HALVES; half++)
            UNROLL for (int q = 0; q < QUADS; q++) total[half][q] = vi{} - Kind::ZERO * sum;
        for (int g = first; g < last; g++) {
            vb codes[HALVES][QUADS];
            unpack<Kind, WIDTH>(low, high, x.row + 4 * g, chunk, codes);
            UNROLL for (int half = 0; half < HALVES; half++)
                UNROLL for (int q = 0; q < QUADS; q++)
                    total[half][q] = dot<Kind::EIGHT>(total[half][q], codes[half][q], x.factor[g]);
        }
        UNROLL for (int half = 0; half < HALVES; half++)
            UNROLL for (int q = 0; q < QUADS; q++) {
                int64_t n = half * HALF + q * 16 + chunk * LANES;
                vf scaled = __builtin_convertvector(total[half][q], vf) * apart(load(scale + n) * x.scale);
                store(to + n, load(to + n) + apart(scaled));
            }
    }

    // y += token t's sums of the tile times the scales of the scales, which begin at `at`.
    void finish(int64_t at, int64_t t, int64_t n, int64_t count) {
        float* to = y + t * stride + n;
        int64_t i = 0;
        for (; i + LANES <= count; i += LANES) store(to + i, load(to + i) + finished(at, t, i));
        if (i >= count) return;
        vf rest = finished(at, t, i);  // the scales have room for whole vectors
        for (int64_t j = i; j < count; j++) to[j] += rest[j - i];
    }
    vf finished(int64_t at, int64_t t, int64_t i) const {
        vf found = load(sums + t * TILE + i);
        if (Kind::NESTED) found = apart(found * load(w.super_scale + at + i));
        if (Kind::NESTED && Kind::MINIMUM)
            found -= apart(load(minimums + t * TILE + i) * load(w.super_minimum + at + i));
        return apart(found);
    }
};

}  // namespace blocks
