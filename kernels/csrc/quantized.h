// Integer dot products (maddubs, madd) for four-bit and int8 weights. The other factor is rounded to 8 bits for four-bit
// rows and to 16 bits for the int8 output layer, which lets a CPU keep up with memory. Integer sums are exact, so they do
// not depend on the order of their terms. Entries far larger than the rest, for which the others would be rounded away,
// are multiplied on their own: kernels/outliers.py says which these are, and why.
#pragma once
#include <cmath>
#include <utility>

#include "rows.h"

constexpr int64_t STRIP = 64;  // values that are added at once: 32 bytes of four-bit ones
constexpr int64_t TILE = 16;  // groups whose factors are computed at once: their scales are 32 bytes

// Of what is usual, for 8 bits: 1 to 3 of 10,000 entries of the demo's MLP are beyond, and each costs what 8 rows do.
constexpr float FACTOR_8 = 8;
constexpr float FACTOR_16 = 64;  // for 16 bits

// The size that x [n] has as a rule: the smallest of the largest entries of 8 interleaved groups; inf when all are zero.
inline float usual_size(const float* x, int64_t n) {
    constexpr int GROUPS = 8;
    float most[GROUPS] = {}, usual = __builtin_inff();
    int64_t k = 0;
    for (; k + GROUPS <= n; k += GROUPS)
        UNROLL for (int g = 0; g < GROUPS; g++) {
            float size = __builtin_fabsf(x[k + g]);
            most[g] = size > most[g] ? size : most[g];
        }
    for (int g = 0; k < n; k++, g++) most[g] = std::max(most[g], __builtin_fabsf(x[k]));
    for (float size : most)
        if (size > 0) usual = std::min(usual, size);
    return usual;
}

// What ROWS rows are multiplied by in each of TILE groups of outputs: x[row] row_scale = factor scale, where factor is a
// whole number from -127 to 127.
struct Factors {
    int32_t pair[ROWS / 2][TILE];  // of two rows, each in a byte
    int32_t offset[TILE];          // -8 times the sum of the rows' factors, for values that are stored plus 8
    float scale[TILE];
};

// A weight of four-bit values and their scales: see kernels/int4.py. `group` is a multiple of STRIP.
struct Int4Rows {
    typedef uint8_t Element;
    const uint8_t* data;
    int64_t N, group, stride, grain, tile;  // stride: bytes of a row
    Int4Rows(const uint8_t* data, int64_t N, int64_t group)
        : data(data), N(N), group(group), stride((N / 2 + 2 * (N / group) + 31) / 32 * 32), grain(group), tile(TILE * group) {}
    const uint8_t* row(int64_t k) const { return data + k * stride; }

    // Entries beyond share no factors with other rows.
    static float most(const CompactVector& x) { return FACTOR_8 * usual_size(x.value, x.count); }

    // sums [tokens, stride] += the entries up to `most` times their rows; each x rounded to 8 bits of the largest. A call
    // would cost a quarter of the time: the rows' addresses then lie in memory.
    template <int MOST>
    __attribute__((always_inline)) void add(const Entries& of, const uint8_t* const* row, const uint8_t* const* next,
                                            int64_t begin, int64_t columns, float* sums, int64_t stride) const {
        Factors factors[MOST];
        int64_t last = (begin + columns) / group;
        for (int64_t tile = begin / group / TILE * TILE; tile < last; tile += TILE) {
            for (int64_t t = 0; t < of.tokens; t++)
                weigh(row, of.x[t].value + of.first, of.count, of.most[t], tile, factors[t]);
            for (int r = 0; r < ROWS; r++) fetch(next[r] + N / 2 + 2 * tile);
            for (int64_t g = std::max(begin / group, tile); g < std::min(tile + TILE, last); g++)
                for (int64_t n = g * group; n < (g + 1) * group; n += STRIP) {
                    if (n % (2 * LINE) == 0)
                        for (int r = 0; r < ROWS; r++) fetch(next[r] + n / 2);
                    in_groups<std::min(MOST, AT_ONCE / 2)>(of.tokens, [&](auto number, int64_t t) __attribute__((always_inline)) {
                        add_strip<number>(row, n, factors + t, g - tile, sums + t * stride + n - begin, stride);
                    });
                }
        }
    }
    // The entries that `add` has left out, one by one: a factor is 127 then, which is exact.
    static __attribute__((noinline)) void add_alone(Int4Rows weight, int64_t row, float x, int64_t begin, int64_t columns,
                                                    float* sums) {
        const uint8_t* rows[ROWS];
        std::fill_n(rows, ROWS, weight.row(row));
        CompactVector alone{nullptr, &x, 1};
        float most = __builtin_inff();
        weight.add<1>({&alone, &most, 1, 0, 1}, rows, rows, begin, columns, sums, 0);
    }
    void add_outliers(const CompactVector& x, int64_t first, int64_t last, float most, int64_t begin, int64_t columns,
                      float* sums) const {
        for (int64_t i = first; i < last; i++)
            if (__builtin_fabsf(x.value[i]) > most) add_alone(*this, x.index[i], x.value[i], begin, columns, sums);
    }
    static void finish(float*, int64_t) {}

  private:
    // x times the scales of a tile; rows that are missing or beyond the limit count nothing. Rows are filled up, so that
    // a tile can be read whole.
    void weigh(const uint8_t* const* row, const float* x, int count, float limit, int64_t tile, Factors& f) const {
        for (int64_t g = 0; g < TILE; g += LANES) {
            vf product[ROWS], most = {}, check = {};
            UNROLL for (int r = 0; r < ROWS; r++) {
                float own = r < count && !(__builtin_fabsf(x[r]) > limit) ? x[r] : 0;
                vf p = product[r] = load((const bf16*)(row[r] + N / 2) + tile + g) * own;
                vf size = (vf)((vu)p & 0x7fffffffu);
                most = size > most ? size : most;
                check += p * 0.0f;  // NaN and infinity reach y through the scale
            }
            store(f.scale + g, most / 127.0f + check);
            vf inverse = 127.0f / (most + 1e-30f);
            vu total = {};
            UNROLL for (int r = 0; r < ROWS; r += 2) {
                vu a = whole(product[r] * inverse), b = whole(product[r + 1] * inverse);
                vu pair = (a & 255) | b << 8;
                std::memcpy(f.pair[r / 2] + g, &pair, sizeof pair);
                total += a + b;
            }
            total *= -8u;
            std::memcpy(f.offset + g, &total, sizeof total);
        }
    }
    // The nearest whole numbers: a float that this is added to ends in one.
    static vu whole(vf x) { return (vu)(x + 0x1.8p23f) - (vu)splat(0x1.8p23f); }

    // sums [TOKENS, stride], of which STRIP each, += the rows' values from n on, times a token's factors of group g.
    template <int TOKENS>
    static __attribute__((always_inline)) void add_strip(const uint8_t* const* row, int64_t n, const Factors* f,
                                                         int64_t g, float* sums, int64_t stride) {
#if defined(__AVX2__)
        const __m256i nibble = _mm256_set1_epi8(15);
        __m256i acc[TOKENS][4];  // of values 0, 8, 16 and 24 on, and beside them 32 more: 16-bit sums hold 8 rows
        UNROLL for (int t = 0; t < TOKENS; t++)
            UNROLL for (int i = 0; i < 4; i++) acc[t][i] = _mm256_set1_epi16(short(f[t].offset[g]));
        UNROLL for (int r = 0; r < ROWS; r += 2) {
            __m256i a = _mm256_loadu_si256((const __m256i*)(row[r] + n / 2));
            __m256i b = _mm256_loadu_si256((const __m256i*)(row[r + 1] + n / 2));
            __m256i bytes[2] = {_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b)};
            UNROLL for (int i = 0; i < 2; i++) {
                __m256i low = _mm256_and_si256(bytes[i], nibble);
                __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes[i], 4), nibble);
                UNROLL for (int t = 0; t < TOKENS; t++) {
                    __m256i pair = _mm256_set1_epi16(short(f[t].pair[r / 2][g]));
                    acc[t][i] = _mm256_add_epi16(acc[t][i], _mm256_maddubs_epi16(low, pair));
                    acc[t][i + 2] = _mm256_add_epi16(acc[t][i + 2], _mm256_maddubs_epi16(high, pair));
                }
            }
        }
        UNROLL for (int t = 0; t < TOKENS; t++)
            UNROLL for (int i = 0; i < 4; i++)
                UNROLL for (int half = 0; half < 2; half++) {
                    __m128i sum = half ? _mm256_extracti128_si256(acc[t][i], 1) : _mm256_castsi256_si128(acc[t][i]);
                    __m256 y = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(sum));
                    float* p = sums + t * stride + half * 32 + i * 8;
                    _mm256_storeu_ps(p, _mm256_fmadd_ps(y, _mm256_set1_ps(f[t].scale[g]), _mm256_loadu_ps(p)));
                }
#else
        for (int t = 0; t < TOKENS; t++, f++, sums += stride) {
            int16_t acc[STRIP];
            for (int i = 0; i < STRIP; i++) acc[i] = int16_t(f->offset[g]);
            for (int r = 0; r < ROWS; r++) {
                int16_t factor = int8_t(f->pair[r / 2][g] >> r % 2 * 8);
                for (int half = 0; half < 2; half++)
                    for (int i = 0; i < 16; i++) {
                        uint8_t byte = row[r][n / 2 + 16 * half + i];
                        acc[32 * half + i] += (byte & 15) * factor;
                        acc[32 * half + 16 + i] += (byte >> 4) * factor;
                    }
            }
            for (int i = 0; i < STRIP; i++) sums[i] += acc[i] * f->scale[g];
        }
#endif
    }
};

// The dot product of w and x, exact: 32 bits hold the sum of BLOCK products.
inline float dot(const int8_t* w, const int16_t* x, int64_t K) {
    constexpr int64_t BLOCK = 2048;  // 127 * 32767 * 2048 / 16 lanes is well below 2^31
    float y = 0;
    int64_t k = 0;
#if defined(__AVX2__)
    for (int64_t end; k + 32 <= K; k = end) {
        end = std::min(k + BLOCK, K / 32 * 32);
        __m256i a = _mm256_setzero_si256(), b = a;
        for (int64_t i = k; i < end; i += 32) {
            if (i % LINE == 0) fetch(w + i + AHEAD);
            __m256i u = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(w + i)));
            __m256i v = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(w + i + 16)));
            a = _mm256_add_epi32(a, _mm256_madd_epi16(u, _mm256_loadu_si256((const __m256i*)(x + i))));
            b = _mm256_add_epi32(b, _mm256_madd_epi16(v, _mm256_loadu_si256((const __m256i*)(x + i + 16))));
        }
        __m256 sums = _mm256_add_ps(_mm256_cvtepi32_ps(a), _mm256_cvtepi32_ps(b));
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        y += s[0] + s[1];
    }
#endif
    for (int64_t end; k < K; k = end) {
        end = std::min(k + 256, K);
        int32_t part = 0;
        for (int64_t i = k; i < end; i++) part += int32_t(w[i]) * x[i];
        y += part;
    }
    return y;
}

// A vector x = value scale in 16-bit fixed point: absmax quantization with 32767 levels, and outliers on their own.
struct Fixed {
    std::vector<int16_t> value;
    std::vector<std::pair<int64_t, float>> outliers;
    float scale = 0;

    void set(const float* x, int64_t K) {
        float most = 0, check = 0, limit = FACTOR_16 * usual_size(x, K);
        outliers.clear();
        for (int64_t k = 0; k < K; k++) {
            check += x[k] * 0;
            if (__builtin_fabsf(x[k]) > limit) outliers.push_back({k, x[k]});
            else most = std::max(most, __builtin_fabsf(x[k]));
        }
        value.resize(K);
        float inverse = most > 0 ? 32767 / most : 0;
        for (int64_t k = 0; k < K; k++)
            value[k] = __builtin_fabsf(x[k]) > limit ? 0 : int16_t(__builtin_rintf(x[k] * inverse));
        scale = most / 32767 + check;
    }
    // w [K] times x times w_scale.
    float times(const int8_t* w, float w_scale) const {
        float y = dot(w, value.data(), value.size()) * (scale * w_scale);
        for (auto [k, x] : outliers) y += w[k] * x * w_scale;
        return y;
    }
};
