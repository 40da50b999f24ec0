// Weights in llama.cpp's block formats, as kernels/blocks.py lays them out: how codes are unpacked, four rows at a time,
// into bytes of which each 32 bits belong to one output, and multiplied by four bytes of x. Sums are whole numbers, so
// that they are the same on every instruction set.
#pragma once
#include "rows.h"

namespace blocks {

constexpr int64_t BLOCK = 32;   // inputs that are worked through at once
constexpr int64_t SUPER = 256;  // inputs that share the scale of the scales, of nested types
constexpr int64_t STRIP = 128;  // outputs beside each other in memory; the last ones may be HALF
constexpr int64_t HALF = 64;
constexpr int CHUNKS = HALF / VECTOR_BYTES;  // vectors that hold a byte of each of HALF outputs
constexpr int QUADS = 4;                     // vectors, each four bytes of LANES neighbouring outputs, for all of them

typedef uint8_t vb __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(VECTOR_BYTES)));

// A type of kernels/blocks.py's BLOCK_TYPES. LOW, HIGH: bits of the planes.
template <int LOW_, int HIGH_, bool NESTED_, bool MINIMUM_, int ZERO_, int64_t SCALE_BLOCK_ = BLOCK, bool TABLE_ = false>
struct Kind {
    static constexpr int LOW = LOW_, HIGH = HIGH_, ZERO = ZERO_;
    static constexpr int64_t SCALE_BLOCK = SCALE_BLOCK_;
    static constexpr bool NESTED = NESTED_, MINIMUM = MINIMUM_, TABLE = TABLE_;
    static constexpr bool EIGHT = LOW == 8 || TABLE;  // whether codes may be beyond 127
    static constexpr int64_t SCALES = BLOCK / SCALE_BLOCK;
    typedef std::conditional_t<NESTED, int8_t, fp16> Scale;
    typedef std::conditional_t<NESTED, uint8_t, fp16> Minimum;
};

// Calls f with the type that `type` numbers, in the order of BLOCK_TYPES.
template <class F> inline void with_kind(int64_t type, F f) {
    switch (type) {
        case 0: return f(Kind<4, 0, false, false, 8>());                       // Q4_0
        case 1: return f(Kind<4, 0, false, true, 0>());                        // Q4_1
        case 2: return f(Kind<4, 1, false, false, 16>());                      // Q5_0
        case 3: return f(Kind<4, 1, false, true, 0>());                        // Q5_1
        case 4: return f(Kind<8, 0, false, false, 128>());                     // Q8_0
        case 5: return f(Kind<4, 0, true, true, 0>());                         // Q4_K
        case 6: return f(Kind<4, 1, true, true, 0>());                         // Q5_K
        case 7: return f(Kind<4, 2, true, false, 32, 16>());                   // Q6_K
        case 8: return f(Kind<4, 0, false, false, 128, BLOCK, true>());        // IQ4_NL
        case 9: return f(Kind<4, 0, true, false, 128, BLOCK, true>());         // IQ4_XS
    }
}

// CpuPart in kernels/block_gemv.py: some outputs of a weight, all of one type; K inputs, N outputs without padding.
struct Part {
    int64_t type, K, N;
    const uint8_t* plane[2];
    const void *scale, *minimum;
    const fp16 *super_scale, *super_minimum;

    int64_t padded() const { return (N + HALF - 1) / HALF * HALF; }
};

// Where four rows of a block begin, in both planes.
template <class Kind> struct Four {
    const uint8_t *low[4], *high[4];

    Four() = default;
    Four(const Part& w, int64_t b, const uint8_t* row) {
        for (int r = 0; r < 4; r++) {
            int64_t before = (b * BLOCK + row[r]) * w.padded();  // codes
            low[r] = w.plane[0] + before * Kind::LOW / 8;
            high[r] = Kind::HIGH ? w.plane[1] + before * Kind::HIGH / 8 : nullptr;
        }
    }
    Four(const Part& w, int64_t b, int group) {
        const uint8_t first = uint8_t(4 * group), row[4] = {first, uint8_t(first + 1), uint8_t(first + 2), uint8_t(first + 3)};
        *this = Four(w, b, row);
    }
    // Fetches what they have at output s.
    void fetch_at(int64_t s) const {
        for (int r = 0; r < 4; r++) {
            fetch(low[r] + s * Kind::LOW / 8);
            if (Kind::LOW == 8) fetch(low[r] + s + LINE);
            if (Kind::HIGH) fetch(high[r] + s * Kind::HIGH / 8);
        }
    }
};

// SIZE bytes over and over.
template <int64_t SIZE> inline vb repeat(const uint8_t* p) {
    vb v;
#if defined(__AVX512F__)
    if (SIZE == 32) return (vb)_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)p));
    if (SIZE == 16) return (vb)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
    if (SIZE == 16) return (vb)_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
#endif
    std::memcpy(&v, p, sizeof v);
    return v;
}

// How a plane of BITS lies in a row of WIDTH outputs: lanes of 16 bytes, each of one half, shifted by so many bits.
template <int BITS, int64_t WIDTH> struct Plane {
    static constexpr int64_t ROW = WIDTH * BITS / 8;
    static constexpr uint32_t MASK = 0x01010101u * ((1 << BITS) - 1);

    static constexpr int shift(int half, int lane) {
        return ROW == 8 ? 2 * lane : (HALF * half + 16 * lane) / ROW * BITS;  // `lanes` doubles a row of 8 bytes
    }
    // The lanes of chunk `chunk` of a half, still to be shifted.
    static vb lanes(const uint8_t* row, int half, int chunk) {
        const uint8_t* from = row + (HALF * half + chunk * VECTOR_BYTES) % ROW;
        if (ROW >= VECTOR_BYTES) return repeat<VECTOR_BYTES>(from);
        if (ROW >= 16) return repeat<ROW>(from);
        uint64_t low;
        std::memcpy(&low, row, 8);
        uint64_t both[2] = {low, low >> 1};
        return repeat<16>((const uint8_t*)both);
    }
    // The values of a half, times 2 ** UP.
    template <int UP> static vu shifted(vb v, int half, int chunk) {
        if (BITS == 8) return (vu)v;
        if (ROW >= HALF) return ((vu)v >> shift(half, 0)) & MASK;
        vu right = {}, left = {};
        UNROLL for (int i = 0; i < LANES; i++) {
            int by = shift(half, (chunk * LANES + i) / 4) - UP;
            right[i] = std::max(by, 0), left[i] = std::max(-by, 0);
        }
        if (shift(half, 3) <= UP) return ((vu)v << left) & (MASK << UP);
        if (shift(half, 0) >= UP) return ((vu)v >> right) & (MASK << UP);
        return (((vu)v >> right) << left) & (MASK << UP);
    }
};

// Four rows as QUADS vectors, whose 32 bits each hold a byte of every row.
inline void interleave(const vb row[4], vb quad[QUADS]) {
#if defined(__AVX512BW__)
    __m512i a = (__m512i)row[0], b = (__m512i)row[1], c = (__m512i)row[2], d = (__m512i)row[3];
    __m512i ab = _mm512_unpacklo_epi8(a, b), cd = _mm512_unpacklo_epi8(c, d);
    quad[0] = (vb)_mm512_unpacklo_epi16(ab, cd), quad[1] = (vb)_mm512_unpackhi_epi16(ab, cd);
    ab = _mm512_unpackhi_epi8(a, b), cd = _mm512_unpackhi_epi8(c, d);
    quad[2] = (vb)_mm512_unpacklo_epi16(ab, cd), quad[3] = (vb)_mm512_unpackhi_epi16(ab, cd);
#elif defined(__AVX2__)
    __m256i a = (__m256i)row[0], b = (__m256i)row[1], c = (__m256i)row[2], d = (__m256i)row[3];
    __m256i ab = _mm256_unpacklo_epi8(a, b), cd = _mm256_unpacklo_epi8(c, d);
    quad[0] = (vb)_mm256_unpacklo_epi16(ab, cd), quad[1] = (vb)_mm256_unpackhi_epi16(ab, cd);
    ab = _mm256_unpackhi_epi8(a, b), cd = _mm256_unpackhi_epi8(c, d);
    quad[2] = (vb)_mm256_unpacklo_epi16(ab, cd), quad[3] = (vb)_mm256_unpackhi_epi16(ab, cd);
#elif defined(__aarch64__)
    uint8x16_t a = (uint8x16_t)row[0], b = (uint8x16_t)row[1], c = (uint8x16_t)row[2], d = (uint8x16_t)row[3];
    uint16x8_t ab = (uint16x8_t)vzip1q_u8(a, b), cd = (uint16x8_t)vzip1q_u8(c, d);
    quad[0] = (vb)vzip1q_u16(ab, cd), quad[1] = (vb)vzip2q_u16(ab, cd);
    ab = (uint16x8_t)vzip2q_u8(a, b), cd = (uint16x8_t)vzip2q_u8(c, d);
    quad[2] = (vb)vzip1q_u16(ab, cd), quad[3] = (vb)vzip2q_u16(ab, cd);
#else
    uint8_t bytes[QUADS * VECTOR_BYTES];
    for (int r = 0; r < 4; r++)
        for (int i = 0; i < VECTOR_BYTES; i++) bytes[4 * i + r] = row[r][i];
    std::memcpy(quad, bytes, sizeof bytes);
#endif
}

// The values plus 128 that four-bit codes stand for: IQ4_VALUES in kernels/blocks.py.
constexpr uint8_t TABLE[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};

inline vb look_up(vb codes) {
#if defined(__AVX512BW__)
    return (vb)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)TABLE)), (__m512i)codes);
#elif defined(__AVX2__)
    return (vb)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)TABLE)), (__m256i)codes);
#elif defined(__aarch64__)
    return (vb)vqtbl1q_u8(vld1q_u8(TABLE), (uint8x16_t)codes);
#else
    for (int i = 0; i < VECTOR_BYTES; i++) codes[i] = TABLE[codes[i]];
    return codes;
#endif
}

#if defined(__AVX2__) || defined(__aarch64__)
#define UNPACK inline
#else
#define UNPACK __attribute__((noinline))  // plain loops, which are unrolled, are many instructions
#endif

// Codes of four rows for chunk `chunk` of each half of the strip from output s on.
template <class Kind, int64_t WIDTH>
UNPACK void unpack(const Four<Kind>& at, int64_t s, int chunk, vb codes[][QUADS]) {
    typedef Plane<Kind::LOW, WIDTH> Low;
    typedef Plane<Kind::HIGH ? Kind::HIGH : 1, WIDTH> High;
    vb rows[4], lower[QUADS], upper[QUADS];
    UNROLL for (int half = 0; half < WIDTH / HALF; half++) {
        if (half == 0 || Low::ROW == 2 * HALF) {
            UNROLL for (int r = 0; r < 4; r++) rows[r] = Low::lanes(at.low[r] + s * Kind::LOW / 8, half, chunk);
            interleave(rows, lower);
        }
        if (Kind::HIGH && half == 0) {
            UNROLL for (int r = 0; r < 4; r++) rows[r] = High::lanes(at.high[r] + s * Kind::HIGH / 8, half, chunk);
            interleave(rows, upper);
        }
        UNROLL for (int q = 0; q < QUADS; q++) {
            vu v = Low::template shifted<0>(lower[q], half, chunk);
            if (Kind::HIGH) v |= High::template shifted<4>(upper[q], half, chunk);
            codes[half][q] = Kind::TABLE ? look_up((vb)v) : (vb)v;
        }
    }
}

// sums + the products of each 32 bits' codes with the four signed bytes of x. EIGHT: whether codes may be beyond 127.
template <bool EIGHT> UNPACK vi dot(vi sums, vb codes, int32_t x) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, _mm512_set1_epi32(x));
#elif defined(__AVX512BW__)
    const __m512i factor = _mm512_set1_epi32(x), ones = _mm512_set1_epi16(1), most = _mm512_set1_epi8(127);
    if (!EIGHT) return sums + (vi)_mm512_madd_epi16(_mm512_maddubs_epi16((__m512i)codes, factor), ones);
    // Pairs of products of seven bits and of the eighth apart, or 16 bits would not hold them.
    __m512i low = _mm512_maddubs_epi16(_mm512_and_si512((__m512i)codes, most), factor);
    __m512i top = _mm512_maddubs_epi16(_mm512_and_si512(_mm512_srli_epi16((__m512i)codes, 7), _mm512_set1_epi8(1)), factor);
    return sums + (vi)_mm512_madd_epi16(low, ones) + (vi)_mm512_madd_epi16(top, _mm512_set1_epi16(128));
#elif defined(__AVX2__)
    const __m256i factor = _mm256_set1_epi32(x), ones = _mm256_set1_epi16(1);
    if (!EIGHT) return sums + (vi)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)codes, factor), ones);
    __m256i low = _mm256_maddubs_epi16(_mm256_and_si256((__m256i)codes, _mm256_set1_epi8(127)), factor);
    __m256i top = _mm256_and_si256(_mm256_srli_epi16((__m256i)codes, 7), _mm256_set1_epi8(1));
    top = _mm256_maddubs_epi16(top, factor);
    return sums + (vi)_mm256_madd_epi16(low, ones) + (vi)_mm256_madd_epi16(top, _mm256_set1_epi16(128));
#elif defined(__aarch64__)
    int16x8_t factor = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(x)));
    int16x8_t low = (int16x8_t)vmovl_u8(vget_low_u8((uint8x16_t)codes));
    int16x8_t high = (int16x8_t)vmovl_high_u8((uint8x16_t)codes);
    int32x4_t a = vpaddq_s32(vmull_s16(vget_low_s16(low), vget_low_s16(factor)), vmull_high_s16(low, factor));
    int32x4_t b = vpaddq_s32(vmull_s16(vget_low_s16(high), vget_low_s16(factor)), vmull_high_s16(high, factor));
    return sums + (vi)vpaddq_s32(a, b);
#else
    for (int i = 0; i < VECTOR_BYTES; i++) sums[i / 4] += codes[i] * int8_t(x >> i % 4 * 8);
    return sums;
#endif
}

// LANES scales as floats.
inline vf load(const int8_t* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    vf v;
    for (int i = 0; i < LANES; i++) v[i] = p[i];
    return v;
#endif
}
inline vf load(const uint8_t* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    vf v;
    for (int i = 0; i < LANES; i++) v[i] = p[i];
    return v;
#endif
}
inline vf load(const fp16* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    vf v;
    for (int i = 0; i < LANES; i++) v[i] = to_float(p[i]);
    return v;
#endif
}
using ::load;

// A product that no sum takes into one rounding with it: else instruction sets with and without FMA would differ.
inline vf apart(vf x) {
#if defined(__AVX512F__)
    asm("" : "+v"(x));
#elif defined(__x86_64__)
    asm("" : "+x"(x));
#elif defined(__aarch64__)
    asm("" : "+w"(x));
#endif
    return x;
}

}  // namespace blocks
