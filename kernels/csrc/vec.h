// Vectors of fp32 as wide as the target's registers, by the compiler's vector extension: one source for AVX-512, AVX2,
// NEON and everything else. Weights in bf16, fp16 and fp32 are converted two vectors at a time.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__F16C__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif
constexpr int LANES = VECTOR_BYTES / 4;
constexpr int PAIR = 2 * LANES;

typedef float vf __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(VECTOR_BYTES)));
typedef float quarter __attribute__((vector_size(16)));

inline vf load(const float* p) { vf v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
inline vf splat(float x) { return vf{} + x; }

inline float sum(vf v) {
    quarter q[LANES / 4];  // an array of floats would go through memory
    std::memcpy(q, &v, sizeof v);
    for (int half = LANES / 8; half; half /= 2)
        for (int i = 0; i < half; i++) q[i] += q[i + half];
    return (q[0][0] + q[0][2]) + (q[0][1] + q[0][3]);
}

inline float sum_of_squares(const float* x, int64_t n) {
    vf squares = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) squares += load(x + i) * load(x + i);
    float rest = sum(squares);
    for (; i < n; i++) rest += x[i] * x[i];
    return rest;
}

template <class To, class From> inline To bits(From x) { To y; std::memcpy(&y, &x, sizeof y); return y; }

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

// Calls f with a value of the type that `type` numbers, as TYPES in kernels/native.py does.
template <class F> inline void with_type(int type, F f) {
    if (type == 0) f(float());
    if (type == 1) f(bf16());
    if (type == 2) f(fp16());
}

inline float to_float(float x) { return x; }
inline float to_float(int8_t x) { return x; }
inline float to_float(uint8_t x) { return x; }
inline float to_float(bf16 x) { return bits<float>(uint32_t(x.bits) << 16); }
inline float to_float(fp16 x) {
#if defined(__F16C__)
    return _cvtsh_ss(x.bits);
#elif defined(__aarch64__)
    return bits<__fp16>(x.bits);
#else
    uint32_t sign = (x.bits & 0x8000u) << 16;
    float y = bits<float>((x.bits & 0x7fffu) << 13) * 0x1p112f;  // exact, of subnormals too
    return bits<float>(bits<uint32_t>(y) | sign | (y >= 65536.0f ? 0x7f800000u : 0u));  // those were infinity and NaN
#endif
}

// To nearest, ties to even.
template <class T> T from_float(float x);
template <> inline float from_float(float x) { return x; }
template <> inline bf16 from_float(float x) {
    uint32_t u = bits<uint32_t>(x);
    if (x != x) return {uint16_t(u >> 16 | 0x40)};
    return {uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
template <> inline fp16 from_float(float x) {
#if defined(__F16C__)
    return {uint16_t(_cvtss_sh(x, 0))};
#elif defined(__aarch64__)
    return {bits<uint16_t>(__fp16(x))};
#else
    uint32_t u = bits<uint32_t>(x), sign = u >> 16 & 0x8000, rest = u & 0x7fffffff;
    if (rest > 0x7f800000) return {uint16_t(sign | 0x7e00)};
    if (rest >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // from 65520 on it rounds to infinity
    if (rest < 0x38800000)  // subnormal: adding 0.5 puts the last kept bit where an fp32 sum rounds
        return {uint16_t(sign | (bits<uint32_t>(bits<float>(rest) + 0.5f) - 0x3f000000))};
    return {uint16_t(sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13)};
#endif
}
template <class T> inline float rounded(float x) { return to_float(from_float<T>(x)); }

inline vf load(const bf16* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
    vf v;
    for (int i = 0; i < LANES; i++) v[i] = to_float(p[i]);
    return v;
#endif
}

// PAIR elements as two vectors: of bf16 first the even ones, then the odd, which costs one operation a vector.
inline void load_pair(const float* p, vf& a, vf& b) { a = load(p), b = load(p + LANES); }
inline void load_pair(const bf16* p, vf& a, vf& b) {
    vu u;
    std::memcpy(&u, p, sizeof u);
    a = (vf)(u << 16), b = (vf)(u & 0xffff0000u);
}
inline void load_pair(const fp16* p, vf& a, vf& b) {
#if defined(__AVX512F__)
    a = (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
    b = (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p + 1));
#elif defined(__AVX2__) && defined(__F16C__)
    a = (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
    b = (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1));
#elif defined(__aarch64__)
    float16x8_t both = vreinterpretq_f16_u16(vld1q_u16((const uint16_t*)p));
    a = (vf)vcvt_f32_f16(vget_low_f16(both)), b = (vf)vcvt_high_f32_f16(both);
#else
    float wide[PAIR];
    for (int i = 0; i < PAIR; i++) wide[i] = to_float(p[i]);
    a = load(wide), b = load(wide + LANES);
#endif
}
inline void load_pair(const int8_t* p, vf& a, vf& b) {
#if defined(__AVX512F__)
    a = (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
    b = (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p + 1)));
#elif defined(__AVX2__)
    a = (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
    b = (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + LANES))));
#else
    for (int i = 0; i < LANES; i++) a[i] = p[i], b[i] = p[LANES + i];
#endif
}
// Where load_pair puts element i of a pair.
template <class T> constexpr int slot(int i) { return i; }
template <> constexpr int slot<bf16>(int i) { return i % 2 * LANES + i / 2; }

// Puts x [n] into the order of load_pair, whole pairs only, the rest as it is; and back.
template <class T> inline void arrange(const float* x, int64_t n, float* out) {
    int64_t pairs = n / PAIR * PAIR;
    for (int64_t p = 0; p < pairs; p += PAIR)
        for (int i = 0; i < PAIR; i++) out[p + slot<T>(i)] = x[p + i];
    for (int64_t i = pairs; i < n; i++) out[i] = x[i];
}
template <class T> inline void rearrange(float* x, int64_t n) {
    if (slot<T>(1) == 1) return;
    for (int64_t p = 0; p + PAIR <= n; p += PAIR) {
        float pair[PAIR];
        for (int i = 0; i < PAIR; i++) pair[i] = x[p + slot<T>(i)];
        std::memcpy(x + p, pair, sizeof pair);
    }
}

// e^x to 1.1 units in the last place: 2^n e^r with |r| <= ln 2 / 2, e^r by its series. Below 2^-126 it is 0; NaN stays.
inline vf exp(vf x) {
    const vf shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number, kept in the low bits
    vf n = x * 1.44269504f + shift;
    vu power = ((vu)n - (vu)shift) << 23;
    n -= shift;
    vf r = x - n * 0.693145752f - n * 1.42860682e-6f;
    vf y = r * (1.0f / 5040) + 1.0f / 720;
    y = y * r + 1.0f / 120;
    y = y * r + 1.0f / 24;
    y = y * r + 1.0f / 6;
    y = y * r + 0.5f;
    y = y * r * r + r + 1.0f;
    y = (vf)((vu)y + power);
    y = x < -87.33f ? vf{} : y;
    y = x > 88.72f ? splat(__builtin_inff()) : y;
    return x == x ? y : x;
}

// SiLU(g) up; with tanh its GELU, which is g / (1 + exp(-a)) of another a.
inline vf gated(vf g, vf up, bool tanh) {
    vf a = tanh ? g * (1.0f + 0.044715f * g * g) * 1.59576912f : g;
    return g / (1.0f + exp(-a)) * up;
}
