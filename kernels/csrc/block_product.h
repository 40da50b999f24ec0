// The product of one token, of which channels may be left out: a few rows of a block at a time, along many outputs. See
// block_gemv.h.
#pragma once
#include "block_gemv.h"

namespace blocks {

// Chosen on a Zen 3, cold weights, 1536 x 17920 and 8960 x 1536: 4 groups, 16, 140 and all strips of a row are no faster.
constexpr int PASS = 2;               // groups of four rows that are read beside each other
constexpr int64_t TILE = 32 * STRIP;  // outputs whose sums stay near the core for SUPER inputs

// What several tokens' products of some outputs of a part are computed of, and where they go.
struct SeveralTokens {
    const Part& w;
    const Kept* const kept;  // [tokens, K / BLOCK]
    const int64_t tokens;
    const int64_t begin, end;  // outputs
    float* const y;            // output 0's place, and the next token's `stride` further on
    const int64_t stride;
    const int64_t N = w.padded();
};

// to [count] += sums of outputs times the scales of the scales, of which the first output's is at `at`.
template <class Kind>
inline void finish(const Part& w, int64_t at, const float* sums, const float* minimums, int64_t count, float* to) {
    auto finished = [&](int64_t i) {
        vf found = load(sums + i);
        if (Kind::NESTED) found = apart(found * load(w.super_scale + at + i));
        if (Kind::NESTED && Kind::MINIMUM) found -= apart(load(minimums + i) * load(w.super_minimum + at + i));
        return apart(found);
    };
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, load(to + i) + finished(i));
    if (i >= count) return;
    vf rest = finished(i);  // the scales have room for whole vectors
    for (int64_t j = i; j < count; j++) to[j] += rest[j - i];
}

// The way through passes: SUPER inputs at a time, of which a TILE of outputs, of which block by block, of which PASS
// groups of kept rows. Blocks without a kept channel are left out.
struct Walk {
    const Kept* kept;
    int64_t begin, end, last;     // outputs, and the end of the blocks
    bool halves;                  // whether each half of a block has a scale of its own
    int64_t super, super_end, n;  // blocks that share scales, and the tile's first output
    int64_t b;                    // the block
    int half, group, group_end;   // the groups of this pass

    Walk(const Kept* kept, int64_t begin, int64_t end, int64_t first, int64_t last, bool halves)
        : kept(kept), begin(begin), end(end), last(last), halves(halves), n(begin), b(first), half(0), group(0) {
        enter(first);
        settle();
    }
    bool done() const { return super >= last; }
    int64_t tile_end() const { return std::min(n + TILE, end); }
    bool starts() const { return group == (half ? kept[b].middle : 0); }
    bool ends() const { return group_end == groups(); }
    void next() {
        group = group_end;
        settle();
    }

  private:
    int groups() const { return halves && !half ? kept[b].middle : kept[b].groups; }
    void enter(int64_t block) {
        super = block, super_end = std::min(last, (block / (SUPER / BLOCK) + 1) * (SUPER / BLOCK));
    }
    void settle() {
        while (!done()) {
            for (; b < super_end; b++, half = group = 0)
                for (; half <= halves; half++)
                    if (group < groups()) {
                        group_end = std::min(group + PASS, groups());
                        return;
                    }
            n += TILE;
            if (n >= end) n = begin, enter(super_end);
            b = super, half = group = 0;
        }
    }
};

template <class Kind> class Product {
    typedef typename Kind::Scale Scale;
    typedef typename Kind::Minimum Minimum;
    static constexpr int64_t SCALES = Kind::SCALES;
    typedef std::array<Four<Kind>, PASS> Rows;

    const Part& w;
    const Kept* const kept;
    const int64_t N, begin, end;  // N: with padding; begin, end: outputs that are computed
    float* const y;               // output 0's place
    Rows next;                    // of the next pass
    alignas(LINE) int32_t wholes[TILE];
    alignas(LINE) float sums[TILE];
    alignas(LINE) float minimums[TILE];

  public:
    Product(const Part& w, const Kept* kept, int64_t begin, int64_t end, float* y)
        : w(w), kept(kept), N(w.padded()), begin(begin), end(end), y(y) {}

    // y = the product of blocks `first` to `last`.
    void run(int64_t first, int64_t last) {
        if (begin >= std::min(end, w.N)) return;
        std::fill(y + begin, y + std::min(end, w.N), 0.0f);
        Walk at(kept, begin, end, first, last, SCALES > 1);
        if (!at.done()) find(at);
        while (!at.done()) add_tile(at);
    }

  private:
    void add_tile(Walk& at) {
        int64_t n = at.n, super = at.super, to = at.tile_end();
        std::fill_n(sums, to - n, 0.0f);
        if (Kind::MINIMUM && Kind::NESTED) std::fill_n(minimums, to - n, 0.0f);
        while (!at.done() && at.n == n && at.super == super) {
            Walk now = at;
            Rows rows = next;
            at.next();
            if (!at.done()) find(at);
            for (int64_t s = n; s < to; s += STRIP) {
                if (!at.done()) ahead(at, at.n + s - n);
                if (to - s >= STRIP) add_strip<STRIP>(now, rows, s, s - n);
                else add_strip<HALF>(now, rows, s, s - n);
            }
        }
        finish<Kind>(w, super / (SUPER / BLOCK) * N + n, sums, minimums, std::min(to, w.N) - n, y + n);
    }

    // next = the rows of a pass.
    void find(const Walk& at) {
        for (int g = at.group; g < at.group_end; g++) next[g - at.group] = {w, at.b, kept[at.b].row + 4 * g};
    }

    // Fetches what the next pass reads at the strip from output s on.
    void ahead(const Walk& at, int64_t s) const {
        if (s >= at.tile_end()) return;
        for (int g = at.group; g < at.group_end; g++) next[g - at.group].fetch_at(s);
        if (!at.starts()) return;
        const Scale* scale = (const Scale*)w.scale + (at.b * SCALES + at.half) * N + s;
        for (int64_t j = 0; j < STRIP; j += LINE / int64_t(sizeof(Scale))) fetch(scale + j);
        if (Kind::MINIMUM && !at.half)
            for (int64_t j = 0; j < STRIP; j += LINE / int64_t(sizeof(Minimum)))
                fetch((const Minimum*)w.minimum + at.b * N + s + j);
    }

    // A pass's share of the sums of the strip from output s on, which is output `at` of its tile.
    template <int64_t WIDTH> void add_strip(const Walk& now, const Rows& rows, int64_t s, int64_t at) {
        const Kept& x = kept[now.b];
        int32_t sum = Kind::ZERO * (SCALES > 1 ? x.sum[now.half] : x.sum[0] + x.sum[1]);
        UNROLL for (int chunk = 0; chunk < CHUNKS; chunk++) {
            vi total[WIDTH / HALF][QUADS];
            begin_with<WIDTH>(now.starts(), sum, chunk, at, total);
            add_rows<WIDTH>(x.factor + now.group, now.group_end - now.group, rows, s, chunk, total);
            end_with<WIDTH>(now.ends(), x.scale, (now.b * SCALES + now.half) * N + s, chunk, at, total);
        }
        if (!Kind::MINIMUM || !now.ends()) return;
        const Minimum* minimum = (const Minimum*)w.minimum + now.b * N + s;
        float share = x.scale * float(x.sum[0] + x.sum[1]), *to = (Kind::NESTED ? minimums : sums) + at;
        UNROLL for (int64_t n = 0; n < WIDTH; n += LANES)
            store(to + n, load(to + n) + apart(load(minimum + n) * share));
    }

    // total: what earlier passes found for chunk `chunk` of each half of a strip, which is output `at` of its tile.
    template <int64_t WIDTH> void begin_with(bool starts, int32_t sum, int chunk, int64_t at, vi total[][QUADS]) const {
        UNROLL for (int half = 0; half < WIDTH / HALF; half++)
            UNROLL for (int q = 0; q < QUADS; q++) {
                if (starts) total[half][q] = vi{} - sum;
                else std::memcpy(&total[half][q], wholes + at + half * HALF + q * 16 + chunk * LANES, sizeof(vi));
            }
    }

    // total += the codes of `groups` of four rows, times their factors.
    template <int64_t WIDTH>
    static void add_rows(const int32_t* factor, int groups, const Rows& rows, int64_t s, int chunk, vi total[][QUADS]) {
        for (int g = 0; g < groups; g++) {
            vb codes[WIDTH / HALF][QUADS];
            unpack<Kind, WIDTH>(rows[g], s, chunk, codes);
            UNROLL for (int half = 0; half < WIDTH / HALF; half++)
                UNROLL for (int q = 0; q < QUADS; q++)
                    total[half][q] = dot<Kind::EIGHT>(total[half][q], codes[half][q], factor[g]);
        }
    }

    // Keeps `total` for the next pass or, where it ends a block, adds it to the sums times the scales from `place` on.
    template <int64_t WIDTH>
    void end_with(bool ends, float by, int64_t place, int chunk, int64_t at, const vi total[][QUADS]) {
        const Scale* scale = (const Scale*)w.scale + place;
        UNROLL for (int half = 0; half < WIDTH / HALF; half++)
            UNROLL for (int q = 0; q < QUADS; q++) {
                int64_t n = half * HALF + q * 16 + chunk * LANES;
                if (!ends) {
                    std::memcpy(wholes + at + n, &total[half][q], sizeof(vi));
                    continue;
                }
                float* to = sums + at + n;
                vf scaled = __builtin_convertvector(total[half][q], vf) * apart(load(scale + n) * by);
                store(to, load(to) + apart(scaled));
            }
    }
};

}  // namespace blocks
