// Vectors by their kept channels: of one token, or of several that take the same rows.
#pragma once
#include <algorithm>
#include <cstdint>

// A vector by its kept channels (stream compaction): CompactVector in kernels/compact_vector.py, as one slot.
struct CompactVector {
    const int32_t* index;
    const float* value;
    int64_t count;
};

// The channels of x [K] but those with |x| <= threshold, so that NaN is kept; index and value have room for K.
inline CompactVector compact(const float* x, const float* threshold, int64_t K, int32_t* index, float* value) {
    int64_t count = 0;
    for (int64_t k = 0; k < K; k++) {
        index[count] = int32_t(k), value[count] = x[k];
        count += !(__builtin_fabsf(x[k]) <= threshold[k]);
    }
    return {index, value, count};
}

// The channels that any of x [tokens, stride] keeps, of which K each, in order; how many. index has room for K.
inline int64_t unite(const float* x, int64_t tokens, int64_t stride, const float* threshold, int64_t K, int32_t* index) {
    constexpr int64_t AT_A_TIME = 64;
    int64_t count = 0;
    for (int64_t from = 0; from < K; from += AT_A_TIME) {
        int64_t channels = std::min(AT_A_TIME, K - from);
        int32_t kept[AT_A_TIME] = {};
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t k = 0; k < channels; k++)
                kept[k] |= !(__builtin_fabsf(x[t * stride + from + k]) <= threshold[from + k]);
        for (int64_t k = 0; k < channels; k++) index[count] = int32_t(from + k), count += kept[k];
    }
    return count;
}

// x [K] on a list of channels, of which it keeps some: the others count 0.
inline CompactVector choose(const float* x, const float* threshold, const int32_t* index, int64_t count, float* value) {
    for (int64_t i = 0; i < count; i++)
        value[i] = __builtin_fabsf(x[index[i]]) <= threshold[index[i]] ? 0 : x[index[i]];
    return {index, value, count};
}
