// The products of several tokens, all of whose channels are kept: a block of inputs and a strip of outputs at a time, whose
// codes are unpacked once. Each token's has the bits of block_product.h.
#pragma once
#include "block_product.h"

namespace blocks {

constexpr int TOKENS_AT_ONCE = AT_ONCE / 2;  // each with QUADS vectors of sums
static_assert(MOST_TOKENS % TOKENS_AT_ONCE == 0, "there is room for sums of whole groups");

// As many pairs of products as 16 bits hold are added there, where no instruction adds four of them to 32 bits.
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
constexpr bool IN_PAIRS = true;
typedef int16_t vs __attribute__((vector_size(VECTOR_BYTES)));
inline vs pairs(vb codes, int32_t x) {
#if defined(__AVX512BW__)
    return (vs)_mm512_maddubs_epi16((__m512i)codes, _mm512_set1_epi32(x));
#else
    return (vs)_mm256_maddubs_epi16((__m256i)codes, _mm256_set1_epi32(x));
#endif
}
inline vi added(vs x) {
#if defined(__AVX512BW__)
    return (vi)_mm512_madd_epi16((__m512i)x, _mm512_set1_epi16(1));
#else
    return (vi)_mm256_madd_epi16((__m256i)x, _mm256_set1_epi16(1));
#endif
}
#else
constexpr bool IN_PAIRS = false;
typedef vi vs;
inline vs pairs(vb, int32_t) { return vs{}; }
inline vi added(vs x) { return x; }
#endif

#define ROLLED _Pragma("GCC unroll 1")  // else codes are loaded long before they are used, and put away again

template <class Kind, int64_t WIDTH> class Strip {
    static constexpr int HALVES = WIDTH / HALF, GROUPS = BLOCK / 4, SCALES = Kind::SCALES;
    static constexpr int MOST = (1 << (Kind::LOW + Kind::HIGH)) - 1;  // the largest code
    static constexpr int RUN = std::min(32767 / (2 * 127 * MOST), GROUPS / SCALES);  // groups whose pairs 16 bits hold
    alignas(LINE) vb codes[CHUNKS][HALVES][GROUPS][QUADS];  // 4 KB

  public:
    Strip(const Part& w, int64_t b, int64_t s) {
        for (int g = 0; g < GROUPS; g++) {
            const Four<Kind> rows(w, b, g);
            UNROLL for (int chunk = 0; chunk < CHUNKS; chunk++) {
                vb found[HALVES][QUADS];
                unpack<Kind, WIDTH>(rows, s, chunk, found);
                UNROLL for (int half = 0; half < HALVES; half++)
                    UNROLL for (int q = 0; q < QUADS; q++) codes[chunk][half][g][q] = found[half][q];
            }
        }
    }

    // sums [TOKENS_AT_ONCE, stride] += the block's share of each token's x; scale [SCALES, N].
    void add(const Kept* const* x, const typename Kind::Scale* scale, int64_t N, float* sums, int64_t stride) const {
        ROLLED for (int chunk = 0; chunk < CHUNKS; chunk++)
            ROLLED for (int half = 0; half < HALVES; half++)
                UNROLL for (int i = 0; i < SCALES; i++) {
                    vi total[TOKENS_AT_ONCE][QUADS];
                    UNROLL for (int t = 0; t < TOKENS_AT_ONCE; t++) {
                        vi from = vi{} - Kind::ZERO * (SCALES == 1 ? x[t]->sum[0] + x[t]->sum[1] : x[t]->sum[i]);
                        UNROLL for (int q = 0; q < QUADS; q++) total[t][q] = from;
                    }
                    multiply(codes[chunk][half], x, i * (GROUPS / SCALES), total);
                    UNROLL for (int q = 0; q < QUADS; q++) {
                        int64_t n = half * HALF + q * 16 + chunk * LANES;
                        vf own = load(scale + i * N + n);
                        UNROLL for (int t = 0; t < TOKENS_AT_ONCE; t++) {
                            vf scaled = __builtin_convertvector(total[t][q], vf) * apart(own * x[t]->scale);
                            float* to = sums + t * stride + n;
                            store(to, load(to) + apart(scaled));
                        }
                    }
                }
    }

    // sums [TOKENS_AT_ONCE, stride] += the block's minimum times the sum of each token's x.
    static void add_minimum(const Kept* const* x, const typename Kind::Minimum* minimum, float* sums, int64_t stride) {
        UNROLL for (int64_t n = 0; n < WIDTH; n += LANES) {
            vf own = load(minimum + n);
            UNROLL for (int t = 0; t < TOKENS_AT_ONCE; t++) {
                float *to = sums + t * stride + n, share = x[t]->scale * float(x[t]->sum[0] + x[t]->sum[1]);
                store(to, load(to) + apart(own * share));
            }
        }
    }

  private:
    // total += the codes of the groups of a scale, from `first` on, times each token's factors.
    static void multiply(const vb (*code)[QUADS], const Kept* const* x, int first, vi (*total)[QUADS]) {
        constexpr int END = GROUPS / SCALES;
        if constexpr (IN_PAIRS && !Kind::EIGHT) {
            UNROLL for (int from = first; from < first + END; from += RUN) {
                vs part[TOKENS_AT_ONCE][QUADS] = {};
                ROLLED for (int g = from; g < from + RUN; g++)
                    UNROLL for (int t = 0; t < TOKENS_AT_ONCE; t++)
                        UNROLL for (int q = 0; q < QUADS; q++) part[t][q] += pairs(code[g][q], x[t]->factor[g]);
                UNROLL for (int t = 0; t < TOKENS_AT_ONCE; t++)
                    UNROLL for (int q = 0; q < QUADS; q++) total[t][q] += added(part[t][q]);
            }
        } else {
            ROLLED for (int g = first; g < first + END; g++)
                UNROLL for (int t = 0; t < TOKENS_AT_ONCE; t++)
                    UNROLL for (int q = 0; q < QUADS; q++)
                        total[t][q] = dot<Kind::EIGHT>(total[t][q], code[g][q], x[t]->factor[g]);
        }
    }
};

// At most MOST_TOKENS of them.
template <class Kind> class Products : SeveralTokens {
    static constexpr int64_t SIDE = 4 * STRIP;  // outputs whose sums stay near the core for SUPER inputs

    alignas(LINE) float sums[MOST_TOKENS * SIDE];
    alignas(LINE) float minimums[MOST_TOKENS * SIDE];

  public:
    explicit Products(const SeveralTokens& of) : SeveralTokens(of) {}

    // y = the products of blocks `first` to `last`.
    void run(int64_t first, int64_t last) {
        int64_t outputs = std::min(end, w.N);
        if (begin >= outputs) return;
        for (int64_t t = 0; t < tokens; t++) std::fill(y + t * stride + begin, y + t * stride + outputs, 0.0f);
        for (int64_t super = first, to; super < last; super = to) {
            to = std::min(last, (super / (SUPER / BLOCK) + 1) * (SUPER / BLOCK));
            for (int64_t n = begin; n < end; n += SIDE) add_tile(super, to, n, std::min(n + SIDE, end));
        }
    }

  private:
    void add_tile(int64_t super, int64_t super_end, int64_t n, int64_t to) {
        int64_t room = (tokens + TOKENS_AT_ONCE - 1) / TOKENS_AT_ONCE * TOKENS_AT_ONCE * SIDE;
        std::fill_n(sums, room, 0.0f);
        if (Kind::MINIMUM && Kind::NESTED) std::fill_n(minimums, room, 0.0f);
        for (int64_t b = super; b < super_end; b++)
            for (int64_t s = n; s < to; s += STRIP) {
                if (b + 1 < super_end) ahead(b + 1, s);
                else if (s + SIDE < end) ahead(super, s + SIDE);
                if (to - s >= STRIP) add_strip<STRIP>(b, s, s - n);
                else add_strip<HALF>(b, s, s - n);
            }
        for (int64_t t = 0, at = super / (SUPER / BLOCK) * N + n; t < tokens; t++)
            finish<Kind>(w, at, sums + t * SIDE, minimums + t * SIDE, std::min(to, w.N) - n, y + t * stride + n);
    }

    // Fetches the codes of a block and a strip.
    void ahead(int64_t b, int64_t s) const {
        for (int g = 0; g < BLOCK / 4; g++) Four<Kind>(w, b, g).fetch_at(s);
    }

    // Block b's share of the sums of the strip from output s on, which is output `at` of its tile.
    template <int64_t WIDTH> void add_strip(int64_t b, int64_t s, int64_t at) {
        const Strip<Kind, WIDTH> strip(w, b, s);
        const auto* scale = (const typename Kind::Scale*)w.scale + b * Kind::SCALES * N + s;
        const auto* minimum = (const typename Kind::Minimum*)w.minimum + b * N + s;
        for (int64_t t = 0; t < tokens; t += TOKENS_AT_ONCE) {
            const Kept* x[TOKENS_AT_ONCE];  // the last one again where there are fewer, to no one's sums
            for (int k = 0; k < TOKENS_AT_ONCE; k++) x[k] = kept + std::min(t + k, tokens - 1) * (w.K / BLOCK) + b;
            strip.add(x, scale, N, sums + t * SIDE + at, SIDE);
            if (Kind::MINIMUM) strip.add_minimum(x, minimum, (Kind::NESTED ? minimums : sums) + t * SIDE + at, SIDE);
        }
    }
};

}  // namespace blocks
