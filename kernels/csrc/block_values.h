// The values that a weight's blocks stand for, with the bits of dequantize_blocks in kernels/blocks.py.
#pragma once
#include "blocks.h"

namespace blocks {

// A vector of floats in the type of the prompts' products.
inline void put(float* p, vf v) { store(p, v); }
template <class T> inline void put(T* p, vf v) {
    UNROLL for (int i = 0; i < LANES; i++) p[i] = from_float<T>(v[i]);
}
inline void put(bf16* p, vf v) {
    typedef uint16_t vh __attribute__((vector_size(VECTOR_BYTES / 2)));
    vu u = (vu)v, rounded = u + 0x7fff + (u >> 16 & 1);
    vh half = __builtin_convertvector((v == v ? rounded : (u | 0x400000)) >> 16, vh);
    std::memcpy(p, &half, sizeof half);
}

typedef float StripValues[BLOCK][STRIP];

template <class Kind> class Values {
    typedef typename Kind::Scale Scale;
    typedef typename Kind::Minimum Minimum;
    static constexpr int64_t SCALES = Kind::SCALES;

    const Part& w;
    const int64_t N, b, s;  // N: with padding; b, s: the block and the strip's first output
    float scale[SCALES][STRIP], minimum[STRIP];

  public:
    Values(const Part& w, int64_t b, int64_t s) : w(w), N(w.padded()), b(b), s(s) {}

    template <int64_t WIDTH> __attribute__((noinline)) void strip(StripValues y) {
        for (int64_t n = 0; n < WIDTH; n += LANES) scales_at(n);
        for (int g = 0; g < BLOCK / 4; g++) {
            const Four<Kind> rows(w, b, g);
            for (int chunk = 0; chunk < CHUNKS; chunk++) {
                vb codes[WIDTH / HALF][QUADS];
                unpack<Kind, WIDTH>(rows, s, chunk, codes);
                for (int half = 0; half < WIDTH / HALF; half++)
                    for (int q = 0; q < QUADS; q++)
                        four(codes[half][q], 4 * g / Kind::SCALE_BLOCK, half * HALF + q * 16 + chunk * LANES, y + 4 * g);
            }
        }
    }

  private:
    void four(vb codes, int64_t part, int64_t n, float (*y)[STRIP]) const {
        for (int r = 0; r < 4; r++) {
            vf value = __builtin_convertvector((vi)((vu)codes >> 8 * r & 255) - Kind::ZERO, vf);
            value = apart(value * load(scale[part] + n));
            if (Kind::MINIMUM) value = Kind::NESTED ? value - load(minimum + n) : value + load(minimum + n);
            store(y[r] + n, value);
        }
    }
    void scales_at(int64_t n) {
        int64_t above = b / (SUPER / BLOCK) * N + s + n;
        for (int64_t i = 0; i < SCALES; i++) {
            vf own = load((const Scale*)w.scale + (b * SCALES + i) * N + s + n);
            store(scale[i] + n, Kind::NESTED ? own * load(w.super_scale + above) : own);
        }
        if (!Kind::MINIMUM) return;
        vf own = load((const Minimum*)w.minimum + b * N + s + n);
        store(minimum + n, Kind::NESTED ? apart(own * load(w.super_minimum + above)) : own);
    }
};

// y: those of block b and the strip from output s on, of which the last one may have but HALF.
inline void strip_values(const Part& w, int64_t b, int64_t s, StripValues y) {
    with_kind(w.type, [&](auto kind) {
        Values<decltype(kind)> values(w, b, s);
        if (w.padded() - s >= STRIP) values.template strip<STRIP>(y);
        else values.template strip<HALF>(y);
    });
}

// y [K, end - begin] of outputs `begin` to `end`; begin is a multiple of STRIP.
template <class T> inline void columns(const Part& w, int64_t begin, int64_t end, T* y, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t b = 0; b < w.K / BLOCK; b++)
        for (int64_t s = begin; s < end; s += STRIP) {
            StripValues values;
            strip_values(w, b, s, values);
            for (int64_t k = 0, count = std::min(end - s, STRIP); k < BLOCK; k++) {
                T *to = y + (b * BLOCK + k) * (end - begin) + s - begin, last[LANES];
                for (int64_t n = 0; n < count; n += LANES) {
                    put(n + LANES <= count ? to + n : last, load(values[k] + n));
                    if (n + LANES > count) std::copy_n(last, count - n, to + n);
                }
            }
        }
}

// Bits of output n's code in a plane of BITS, of row k of block b.
template <int BITS> inline int code(const uint8_t* plane, int64_t N, int64_t b, int64_t n, int64_t k) {
    int64_t s = n / STRIP * STRIP, row = std::min(STRIP, N - s) * BITS / 8;
    int64_t place = (n - s) / HALF * HALF + n / 4 % 4 * 16 + n / 16 % 4 * 4 + n % 4;
    return plane[((b * BLOCK + k) * N + s) * BITS / 8 + place % row] >> place / row * BITS & ((1 << BITS) - 1);
}

template <class Kind> inline float value(const Part& w, int64_t N, int64_t b, int64_t n, int64_t k) {
    typedef typename Kind::Scale Scale;
    typedef typename Kind::Minimum Minimum;
    int64_t above = b / (SUPER / BLOCK) * N + n, own = (b * BLOCK + k) / Kind::SCALE_BLOCK * N + n;
    int found = code<Kind::LOW>(w.plane[0], N, b, n, k);
    if (Kind::HIGH) found |= code<Kind::HIGH ? Kind::HIGH : 1>(w.plane[1], N, b, n, k) << Kind::LOW;
    vf y = splat(float((Kind::TABLE ? TABLE[found & 15] : found) - Kind::ZERO));
    vf scale = splat(to_float(((const Scale*)w.scale)[own]));
    y = apart(y * (Kind::NESTED ? apart(scale * to_float(w.super_scale[above])) : scale));
    if (!Kind::MINIMUM) return y[0];
    vf minimum = splat(to_float(((const Minimum*)w.minimum)[b * N + n]));
    return (Kind::NESTED ? y - apart(minimum * to_float(w.super_minimum[above])) : y + minimum)[0];
}

// y [K]: the weights of one output, as an embedding rounded to T.
template <class T, class To> inline void look_up_output(const Part& w, int64_t output, To* y) {
    with_kind(w.type, [&](auto kind) {
        for (int64_t k = 0; k < w.K; k++) {
            T rounded = from_float<T>(value<decltype(kind)>(w, w.padded(), k / BLOCK, output, k % BLOCK));
            if constexpr (std::is_same_v<T, To>) y[k] = rounded;
            else y[k] = to_float(rounded);
        }
    });
}

}  // namespace blocks
