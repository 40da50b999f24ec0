// A block of inputs and a strip of outputs for several tokens, all of whose channels are kept: codes are unpacked once.
#pragma once
#include "block_gemv.h"

namespace blocks {

template <class Kind> using ScaleOf = std::conditional_t<Kind::NESTED, int8_t, fp16>;
template <class Kind> using MinimumOf = std::conditional_t<Kind::NESTED, uint8_t, fp16>;

constexpr int TOKENS_AT_ONCE = AT_ONCE / 2;  // each with QUADS vectors of sums

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
    static constexpr int HALVES = WIDTH / HALF, GROUPS = BLOCK / 4, SCALES = BLOCK / Kind::SCALE_BLOCK;
    static constexpr int MOST = (1 << (Kind::LOW + Kind::HIGH)) - 1;  // the largest code
    static constexpr int RUN = std::min(32767 / (2 * 127 * MOST), GROUPS / SCALES);  // groups whose pairs 16 bits hold
    alignas(LINE) vb codes[CHUNKS][HALVES][GROUPS][QUADS];  // 4 KB

  public:
    Strip(const uint8_t* low, const uint8_t* high) {
        for (int g = 0; g < GROUPS; g++) {
            const uint8_t row[4] = {uint8_t(4 * g), uint8_t(4 * g + 1), uint8_t(4 * g + 2), uint8_t(4 * g + 3)};
            UNROLL for (int chunk = 0; chunk < CHUNKS; chunk++) {
                vb found[HALVES][QUADS];
                unpack<Kind, WIDTH>(low, high, row, chunk, found);
                UNROLL for (int half = 0; half < HALVES; half++)
                    UNROLL for (int q = 0; q < QUADS; q++) codes[chunk][half][g][q] = found[half][q];
            }
        }
    }

    // sums [TOKENS, stride] += the block's share of each token's x; scale [SCALES, N].
    template <int TOKENS>
    void add(const Kept* const* x, const ScaleOf<Kind>* scale, int64_t N, float* sums, int64_t stride) const {
        ROLLED for (int chunk = 0; chunk < CHUNKS; chunk++)
            ROLLED for (int half = 0; half < HALVES; half++)
                UNROLL for (int i = 0; i < SCALES; i++) {
                    vi total[TOKENS][QUADS];
                    UNROLL for (int t = 0; t < TOKENS; t++) {
                        vi from = vi{} - Kind::ZERO * (SCALES == 1 ? x[t]->sum[0] + x[t]->sum[1] : x[t]->sum[i]);
                        UNROLL for (int q = 0; q < QUADS; q++) total[t][q] = from;
                    }
                    multiply<TOKENS>(codes[chunk][half], x, i * (GROUPS / SCALES), total);
                    UNROLL for (int q = 0; q < QUADS; q++) {
                        int64_t n = half * HALF + q * 16 + chunk * LANES;
                        vf own = load(scale + i * N + n);
                        UNROLL for (int t = 0; t < TOKENS; t++) {
                            vf scaled = __builtin_convertvector(total[t][q], vf) * apart(own * x[t]->scale);
                            float* to = sums + t * stride + n;
                            store(to, load(to) + apart(scaled));
                        }
                    }
                }
    }

    // sums [TOKENS, stride] += the block's minimum times the sum of each token's x.
    template <int TOKENS>
    static void add_minimum(const Kept* const* x, const MinimumOf<Kind>* minimum, float* sums, int64_t stride) {
        UNROLL for (int64_t n = 0; n < WIDTH; n += LANES) {
            vf own = load(minimum + n);
            UNROLL for (int t = 0; t < TOKENS; t++) {
                float *to = sums + t * stride + n, share = x[t]->scale * float(x[t]->sum[0] + x[t]->sum[1]);
                store(to, load(to) + apart(own * share));
            }
        }
    }

  private:
    // total += the codes of the groups of a scale, from `first` on, times each token's factors.
    template <int TOKENS>
    static void multiply(const vb (*code)[QUADS], const Kept* const* x, int first, vi (*total)[QUADS]) {
        constexpr int END = GROUPS / SCALES;
        if constexpr (IN_PAIRS && !Kind::EIGHT) {
            UNROLL for (int from = first; from < first + END; from += RUN) {
                vs part[TOKENS][QUADS] = {};
                ROLLED for (int g = from; g < from + RUN; g++)
                    UNROLL for (int t = 0; t < TOKENS; t++)
                        UNROLL for (int q = 0; q < QUADS; q++) part[t][q] += pairs(code[g][q], x[t]->factor[g]);
                UNROLL for (int t = 0; t < TOKENS; t++)
                    UNROLL for (int q = 0; q < QUADS; q++) total[t][q] += added(part[t][q]);
            }
        } else {
            ROLLED for (int g = first; g < first + END; g++)
                UNROLL for (int t = 0; t < TOKENS; t++)
                    UNROLL for (int q = 0; q < QUADS; q++)
                        total[t][q] = dot<Kind::EIGHT>(total[t][q], code[g][q], x[t]->factor[g]);
        }
    }
};

}  // namespace blocks
