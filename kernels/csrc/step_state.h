// What a step is given, a model by its tensors, and what it keeps of its tokens: see decode_step.cpp.
#pragma once
#include "attention.h"
#include "block_gemv.h"
#include "quantized.h"

extern "C" {

// CpuWeight in engine/cpu_step.py: rows of values of so many bits, of four in groups of `group` outputs; or, with `parts`
// of them, blocks.
struct Weight {
    const void* data;
    const float* scale;  // of quantized ones, else null
    int64_t bits, group;
    const blocks::Part* part;
    int64_t parts;
};

struct Layer {  // CpuLayer in engine/cpu_step.py; absent tensors are null
    const void *attention_norm, *ffn_norm, *attention_norm_behind, *ffn_norm_behind, *q_norm, *k_norm;
    Weight wqkv, wo, w13, w2;
    const void *wqkv_bias, *wo_bias, *w13_bias, *w2_bias;
    const float *wqkv_threshold, *wo_threshold, *w13_threshold, *w2_threshold;
    void *k_cache, *v_cache;  // [sequences, key/value heads, max_seq_length, head_dim]
    int64_t window, rope;     // 0: the whole context; which of the rotary embeddings
};

struct Model {  // CpuModel in engine/cpu_step.py
    int64_t dim, heads, kv_heads, head_dim, ffn_dim, vocab_size, max_seq_length, layers;
    int64_t ropes, q_norm_width, norm_behind, tanh_gate;  // 0: norms see all of q, of k; those come after the rotary
                                                          // embedding; GELU by tanh, not SiLU
    double eps, embedding_scale, attention_scale, attention_cap, output_cap, query_beta;
    int64_t query_step;  // from each so many positions to the next, queries grow by query_beta
    Weight embeddings, output;
    const void* norm;
    const float *frequencies, *rope_sizes;  // [ropes, head_dim / 2]
    const Layer* layer;
    int64_t* kept;  // [layers, 4]: how many channels each product kept of its input
};
}

// Whether a weight's products for so many tokens come as sums [tokens, N], not as partial ones [tokens, SPLITS, N].
inline bool summed(const Weight& w, int64_t tokens) { return w.parts && blocks::by_tiles(tokens); }

// y [count] = elements of token t's product, from `begin` on, plus the bias.
template <class T>
inline void take(const Weight& w, int64_t tokens, const float* product, int64_t t, int64_t N, const void* bias,
                 int64_t begin, int64_t count, float* y) {
    bool sums = summed(w, tokens);
    collect(product + t * (sums ? 1 : SPLITS) * N, N, w.scale, (const T*)bias, begin, count, y, sums);
}

// What a step is to compute. dense: tokens of one sequence, for which thresholds count for nothing; else each is of a
// sequence of its own, and cached there.
struct Tokens {
    const int64_t *id, *position;
    int64_t count;
    bool dense;
    int64_t wanted;  // the last ones, whose logits are computed
};

// Some tokens on their way through the model.
struct State {
    int64_t widest;                       // inputs that a product may have
    Floats residual, x, value, q;         // [tokens, dim], [tokens, widest] twice, [tokens, heads, head_dim]
    Floats cos, sin;                      // [tokens, ropes, head_dim / 2]
    std::vector<CompactVector> list;      // [tokens]: the kept channels of the next product's input
    std::vector<int32_t> index, every;    // [widest]: of tokens that skip some; 0, 1, 2, …
    int64_t united;                       // channels of `index` that any of several tokens keeps
    std::vector<blocks::Kept> kept;       // [tokens, widest / BLOCK]: the same of a product with blocks
    std::vector<Fixed> fixed;             // [tokens]: the output layer's input

    void fit(const Model& m, int64_t tokens) {
        widest = std::max({m.dim, m.ffn_dim, m.heads * m.head_dim});
        residual.resize(tokens * m.dim), x.resize(tokens * widest), value.resize(tokens * widest);
        q.resize(tokens * m.heads * m.head_dim);
        cos.resize(tokens * m.ropes * m.head_dim / 2), sin.resize(tokens * m.ropes * m.head_dim / 2);
        list.resize(tokens), fixed.resize(tokens), index.resize(widest);
        kept.resize(tokens * (widest / blocks::BLOCK + 1));
        if (int64_t(every.size()) < widest) every.resize(widest), std::iota(every.begin(), every.end(), 0);
    }

    // Lists the channels of token t's input x [K] that its product takes; how many. together: it is one of several that
    // take what any of them keeps, which stands in `index`; of blocks, whose rows are read in fours, they take all.
    int64_t keep(int64_t t, const float* x, const float* threshold, int64_t K, bool in_blocks, bool together) {
        float* own = value + (together ? t * widest : 0);
        if (in_blocks) {
            if (together) x = choose(x, threshold, every.data(), K, own).value, threshold = nullptr;
            return blocks::keep(x, threshold, K, kept.data() + t * (K / blocks::BLOCK));
        }
        if (!threshold) list[t] = {every.data(), x, K};
        else if (together) list[t] = choose(x, threshold, index.data(), united, own);
        else list[t] = compact(x, threshold, K, index.data(), own);
        return list[t].count;
    }
};

struct Shared {
    State state;                  // of several tokens
    Floats qkv, update, gate_up;  // products as partial sums [tokens, SPLITS, N]
    Floats values, peak, total;   // attention: [tokens, heads, chunks, head_dim], [tokens, heads, chunks] twice
    Floats h;                     // [tokens, ffn_dim]

    // end: the positions up to and with the last token's.
    void fit(const Model& m, int64_t tokens, int64_t end) {
        int64_t places = tokens * m.heads * ((end + CHUNK - 1) / CHUNK);
        if (tokens > 1) state.fit(m, tokens);
        qkv.resize(tokens * SPLITS * (m.heads + 2 * m.kv_heads) * m.head_dim);
        update.resize(tokens * SPLITS * m.dim);
        gate_up.resize(tokens * SPLITS * 2 * m.ffn_dim);
        values.resize(places * m.head_dim), peak.resize(places), total.resize(places);
        h.resize(tokens * m.ffn_dim);
    }
};

struct Private {
    State state;  // of a token alone
    Floats gate, up, peak, scratch;

    void fit(const Model& m, int64_t tokens) {
        if (tokens == 1) state.fit(m, 1);
        gate.resize(m.ffn_dim), up.resize(m.ffn_dim), scratch.resize(m.head_dim);
        peak.resize((m.max_seq_length + CHUNK - 1) / CHUNK);
    }
};
