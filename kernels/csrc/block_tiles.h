// The products of several tokens on processors that multiply tiles (AMX): 16 tokens times 16 outputs, a block of inputs
// or what shares a scale of it at once. Whole numbers are the same as everywhere, and are scaled and added in the order of
// block_product.h, so that each token has its bits.
#pragma once
#include "block_product.h"

#if defined(__AMX_INT8__)
namespace blocks {

static_assert(VECTOR_BYTES == 64 && BLOCK == 32, "a vector of codes is a row of a tile");

// As <immintrin.h> has them, but that the compiler knows of the memory: GCC 12's reads, it believes, 8 bytes at most
// (findings/gcc-tile-config.sh). Tiles 0 and 1 are tokens, of the first and the second scale of a block, 2 and 3 codes, 4 to 7
// products.
struct TileShapes {
    uint8_t palette = 1, start = 0, unused[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};

    // Products of `tokens` and groups of four inputs.
    TileShapes(int tokens, int groups) {
        for (int i = 0; i < 8; i++) rows[i] = uint8_t(i / 2 == 1 ? groups : tokens), bytes[i] = VECTOR_BYTES;
        bytes[0] = bytes[1] = uint16_t(4 * groups);
    }
};
struct Tiles {
    explicit Tiles(const TileShapes& shapes) { asm volatile("ldtilecfg %0" : : "m"(shapes) : "memory"); }
    ~Tiles() { asm volatile("tilerelease"); }
    template <int I> static void load_tokens(const int32_t* factors, int64_t bytes) {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(factors), "r"(bytes), "i"(I) : "memory");
    }
    // The products of tile I with four tiles of codes, `bytes` apart, to sums, `sum_bytes` apart. A tile has no second
    // register behind its name: in turns on one, each product would wait for the one before to be stored.
    template <int I> static void multiply(const vb* codes, int64_t bytes, vi* sums, int64_t sum_bytes) {
        const char* code = (const char*)codes;
        char* sum = (char*)sums;
        asm volatile(
            "tileloadd (%0,%8,1), %%tmm2\n\ttileloadd (%1,%8,1), %%tmm3\n\ttilezero %%tmm4\n\ttilezero %%tmm5\n\t"
            "tdpbsud %%tmm2, %%tmm%c9, %%tmm4\n\ttileloadd (%2,%8,1), %%tmm2\n\ttilezero %%tmm6\n\t"
            "tdpbsud %%tmm3, %%tmm%c9, %%tmm5\n\ttileloadd (%3,%8,1), %%tmm3\n\ttilezero %%tmm7\n\t"
            "tdpbsud %%tmm2, %%tmm%c9, %%tmm6\n\ttdpbsud %%tmm3, %%tmm%c9, %%tmm7\n\t"
            "tilestored %%tmm4, (%4,%8,1)\n\ttilestored %%tmm5, (%5,%8,1)\n\ttilestored %%tmm6, (%6,%8,1)\n\t"
            "tilestored %%tmm7, (%7,%8,1)"
            :
            : "r"(code), "r"(code + bytes), "r"(code + 2 * bytes), "r"(code + 3 * bytes), "r"(sum), "r"(sum + sum_bytes),
              "r"(sum + 2 * sum_bytes), "r"(sum + 3 * sum_bytes), "r"(int64_t(VECTOR_BYTES)), "i"(I)
            : "memory");
    }
};

constexpr int64_t MOST_TILE_TOKENS = 64;  // whose products share the unpacking of codes

// At most MOST_TILE_TOKENS, T of them at once; sums of those that are not there go nowhere.
template <class Kind> class TileProducts : SeveralTokens {
    static constexpr int T = 16;
    static constexpr int SCALES = Kind::SCALES, ROWS = BLOCK / 4 / SCALES;  // a tile of codes has so many
    static constexpr int64_t BLOCKS = SUPER / BLOCK;

    // Of SUPER inputs and T tokens: their factors, their scale, what ZERO and minimums add.
    struct Inputs {
        alignas(LINE) int32_t factor[BLOCKS][SCALES][T][ROWS];
        int32_t zero[BLOCKS][SCALES][T];
        float scale[BLOCKS][T], share[BLOCKS][T];
    };
    std::vector<Inputs>& inputs = room();  // [supers, tokens / T]
    // Half a strip at a time, whose codes and sums fit into a first cache of 48 KB.
    alignas(LINE) vb codes[STRIP / HALF][BLOCKS][QUADS][BLOCK / 4];
    alignas(LINE) vi whole[2][QUADS][SCALES][T];  // of two blocks
    alignas(LINE) float sums[T][HALF], minimums[T][HALF];
    alignas(LINE) float found[MOST_TILE_TOKENS][STRIP], total[MOST_TILE_TOKENS][STRIP];  // of a split, of those before

  public:
    explicit TileProducts(const SeveralTokens& of) : SeveralTokens(of) {}

    // y = the products, summed over the splits.
    void run() {
        if (begin >= std::min(end, w.N)) return;
        const int64_t blocks = w.K / BLOCK, groups = (tokens + T - 1) / T;
        // Calls f(a first block, how many that share scales, the tokens' inputs, the next first block, the split if these
        // end it, else -1).
        auto each_super = [&](auto f) {
            Inputs* x = inputs.data();
            for (int64_t split = 0; split < SPLITS; split++) {
                int64_t last = part(blocks, split + 1, SPLITS);
                for (int64_t super = part(blocks, split, SPLITS), to; super < last; super = to, x += groups) {
                    to = std::min(last, (super / BLOCKS + 1) * BLOCKS);
                    f(super, to - super, x, to < blocks ? to : 0, to == last ? split : -1);
                }
            }
        };
        inputs.resize(std::max<size_t>(inputs.size(), (blocks / BLOCKS + 1 + SPLITS) * groups));
        each_super([&](int64_t super, int64_t count, Inputs* x, int64_t, int64_t) {
            for (int64_t t = 0; t < tokens; t += T) prepare(super, count, t, x[t / T]);
        });
        const TileShapes shapes(T, ROWS);
        const Tiles tiles(shapes);
        std::fill_n(found[0], tokens * STRIP, 0.0f);
        for (int64_t s = begin; s < end; s += STRIP) {
            each_super([&](int64_t super, int64_t count, const Inputs* x, int64_t next, int64_t split) {
                int64_t next_strip = next ? s : s + STRIP;
                if (end - s >= STRIP) add_strip<STRIP>(super, count, s, x, next, next_strip);
                else add_strip<HALF>(super, count, s, x, next, next_strip);
                if (split < 0) return;
                for (float *sum = total[0], *of = found[0]; sum < total[0] + tokens * STRIP; sum += LANES, of += LANES)
                    store(sum, split ? load(sum) + load(of) : load(of)), store(of, vf{});
            });
            for (int64_t t = 0; t < tokens; t++)
                std::copy_n(total[t], std::min(STRIP, std::min(end, w.N) - s), y + t * stride + s);
        }
    }

  private:
    // The fours of rows that are still to be fetched, at output s; a few at a time, as more at once hold up everything.
    struct Ahead {
        int64_t four, last, s, turn;
    };
    void fetch_some(Ahead& ahead) const {
        if (ahead.turn++ % ((tokens + T - 1) / T) || ahead.four >= ahead.last) return;
        Four<Kind>(w, ahead.four / (BLOCK / 4), int(ahead.four % (BLOCK / 4))).fetch_at(ahead.s);
        ahead.four++;
    }

    static std::vector<Inputs>& room() {
        static thread_local std::vector<Inputs> last;
        return last;
    }

    void prepare(int64_t super, int64_t count, int64_t first, Inputs& to) const {
        for (int64_t b = 0; b < count; b++)
            for (int64_t t = 0; t < T; t++) {
                const Kept& x = kept[std::min(first + t, tokens - 1) * (w.K / BLOCK) + super + b];
                for (int i = 0; i < SCALES; i++) {
                    std::copy_n(x.factor + i * ROWS, ROWS, to.factor[b][i][t]);
                    to.zero[b][i][t] = Kind::ZERO * (SCALES > 1 ? x.sum[i] : x.sum[0] + x.sum[1]);
                }
                to.scale[b][t] = x.scale, to.share[b][t] = x.scale * float(x.sum[0] + x.sum[1]);
            }
    }

    // found += the share of `count` blocks, from `super` on, of the products of the strip from output s on. It fetches the
    // blocks from `next` on at output `next_strip`.
    template <int64_t WIDTH>
    void add_strip(int64_t super, int64_t count, int64_t s, const Inputs* x, int64_t next, int64_t next_strip) {
        for (int64_t b = 0; b < count; b++) unpack_block<WIDTH>(super + b, s, b);
        Ahead ahead{next * (BLOCK / 4), next_strip < end ? std::min(next + BLOCKS, w.K / BLOCK) * (BLOCK / 4) : 0, next_strip, 0};
        for (int half = 0; half < WIDTH / HALF; half++, s += HALF)
            for (int64_t first = 0; first < tokens; first += T) {
                sum_half(super, count, s, codes[half], x[first / T], ahead);
                for (int64_t t = 0; t < std::min<int64_t>(T, tokens - first); t++)
                    finish<Kind>(w, super / BLOCKS * N + s, sums[t], minimums[t], std::min(HALF, w.N - s),
                                 found[first + t] + half * HALF);
            }
    }
    template <int64_t WIDTH> void unpack_block(int64_t b, int64_t s, int64_t to) {
        for (int g = 0; g < BLOCK / 4; g++) {
            const Four<Kind> rows(w, b, g);
            vb four[WIDTH / HALF][QUADS];
            unpack<Kind, WIDTH>(rows, s, 0, four);
            UNROLL for (int half = 0; half < WIDTH / HALF; half++)
                UNROLL for (int q = 0; q < QUADS; q++) codes[half][to][q][g] = four[half][q];
        }
    }
    // A block's whole numbers are scaled while the next one's are found: they can be read only after they went to memory.
    void sum_half(int64_t super, int64_t count, int64_t s, const vb (*code)[QUADS][BLOCK / 4], const Inputs& x,
                  Ahead& ahead) {
        std::memset(sums, 0, sizeof sums);
        if (Kind::MINIMUM && Kind::NESTED) std::memset(minimums, 0, sizeof minimums);
        for (int64_t b = 0; b <= count; b++) {
            if (b < count) load_tokens(x.factor[b]);
            if (b < count) find(code[b][0], whole[b % 2][0]);
            for (int q = 0; b && q < QUADS; q++) {
                add(super, b - 1, s, q * LANES, whole[(b - 1) % 2][q], x);
                fetch_some(ahead);
            }
        }
    }
    static void load_tokens(const int32_t (*factor)[T][ROWS]) {
        Tiles::load_tokens<0>(factor[0][0], 4 * ROWS);
        if (SCALES > 1) Tiles::load_tokens<1>(factor[SCALES - 1][0], 4 * ROWS);
    }
    static void find(const vb* code, vi (*to)[T]) {
        constexpr int64_t BYTES = BLOCK / 4 * sizeof(vb), SUMS = SCALES * T * sizeof(vi);
        Tiles::multiply<0>(code, BYTES, to[0], SUMS);
        if (SCALES > 1) Tiles::multiply<1>(code + ROWS, BYTES, to[SCALES - 1], SUMS);
    }

    // sums += a block's whole numbers of LANES outputs, from the strip's number n on, times their scales.
    void add(int64_t super, int64_t b, int64_t s, int64_t n, const vi (*found)[T], const Inputs& x) {
        const auto* own = (const typename Kind::Scale*)w.scale + (super + b) * SCALES * N + s + n;
        vf first = load(own), second = SCALES > 1 ? load(own + N) : vf{}, minimum = {};
        if (Kind::MINIMUM) minimum = load((const typename Kind::Minimum*)w.minimum + (super + b) * N + s + n);
#pragma GCC unroll 16
        for (int t = 0; t < T; t++) {
            vf sum = load(sums[t] + n) + scaled(found[0][t], x.zero[b][0][t], first, x.scale[b][t]);
            if (SCALES > 1) sum += scaled(found[SCALES - 1][t], x.zero[b][SCALES - 1][t], second, x.scale[b][t]);
            if (Kind::MINIMUM && !Kind::NESTED) sum += apart(minimum * x.share[b][t]);
            store(sums[t] + n, sum);
            if (!Kind::MINIMUM || !Kind::NESTED) continue;
            store(minimums[t] + n, load(minimums[t] + n) + apart(minimum * x.share[b][t]));
        }
    }
    static vf scaled(vi found, int32_t zero, vf own, float scale) {
        return apart(__builtin_convertvector(Kind::ZERO ? found - zero : found, vf) * apart(own * scale));
    }
};

}  // namespace blocks
#endif
