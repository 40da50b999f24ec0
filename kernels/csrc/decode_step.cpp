// Tokens through the whole model on the CPU, in one parallel region: see engine/cpu_step.py.
//
// Of a token alone every thread keeps the residual stream and the lists of kept channels for itself: to compute them
// again is cheaper than to wait for one another. Several tokens are shared out instead, and all their lists name the
// same rows, which are read once for all: every row, or those that any of the tokens keeps. Where that is every row,
// each token has the bits that it has alone, since its sums have the same terms in the same order.
//
// What threads share is written by all, each its share, and read by all after a barrier; at least one more barrier lies
// between that and when it is written again.
#include <omp.h>

#include "block_values.h"
#include "step_state.h"

namespace {

template <class T> class Step {
    const Model& m;
    const Tokens& tokens;
    const int64_t width;  // outputs of wqkv
    Shared& all;
    Private& own;
    State& now;
    const Worker worker;
    int64_t* counted;  // where the next product's number of kept channels goes

  public:
    Step(const Model& m, const Tokens& tokens, Shared& all, Private& own, Worker worker)
        : m(m), tokens(tokens), width((m.heads + 2 * m.kv_heads) * m.head_dim), all(all), own(own),
          now(tokens.count == 1 ? own.state : all.state), worker(worker), counted(m.kept) {}

    void run(float* logits) {
        each([&](int64_t t) {
            embed(tokens.id[t], residual(t));
            for (int64_t d = 0; d < m.ropes * m.head_dim / 2; d++) {
                float angle = tokens.position[t] * m.frequencies[d], size = m.rope_sizes[d];
                cos(t)[d] = size * std::cos(angle), sin(t)[d] = size * std::sin(angle);
            }
        });
        for (int64_t i = 0; i < m.layers; i++) block(m.layer[i]);
        if (tokens.wanted) put_out(logits);
    }

  private:
    static void barrier() {
#pragma omp barrier
    }
    int64_t share(int64_t n, int end, int64_t grain = 1) { return part(n, worker.id + end, worker.count, grain); }

    // Calls f for each token that is this thread's to compute; `meet` waits until the others are done with theirs.
    template <class F> void each(F f) {
        if (tokens.count == 1) return f(0);
        for (int64_t t = share(tokens.count, 0); t < share(tokens.count, 1); t++) f(t);
    }
    void meet() {
        if (tokens.count > 1) barrier();
    }
    float* residual(int64_t t) { return now.residual + t * m.dim; }
    float* x(int64_t t) { return now.x + t * now.widest; }  // the input of the next product
    float* q(int64_t t) { return now.q + t * m.heads * m.head_dim; }
    float* cos(int64_t t, int64_t rope = 0) { return now.cos + (t * m.ropes + rope) * (m.head_dim / 2); }
    float* sin(int64_t t, int64_t rope = 0) { return now.sin + (t * m.ropes + rope) * (m.head_dim / 2); }

    void embed(int64_t id, float* y) {
        if (m.embeddings.parts) blocks::look_up_output<T>(*m.embeddings.part, id, y);
        else
            for (int64_t k = 0; k < m.dim; k++) y[k] = to_float(((const T*)m.embeddings.data)[id * m.dim + k]);
        if (m.embedding_scale != 1)
            for (int64_t k = 0; k < m.dim; k++) y[k] *= float(m.embedding_scale);
    }

    void put_out(float* logits) {  // [wanted, vocab_size]
        int64_t skipped = tokens.count - tokens.wanted;
        blocks::Kept* kept = now.kept.data();
        each([&](int64_t t) {
            if (t < skipped) return;
            norm(t, (const T*)m.norm);
            if (m.output.parts) blocks::keep(x(t), nullptr, m.dim, kept + t * (m.dim / blocks::BLOCK));
            else if (m.output.scale) now.fixed[t].set(x(t), m.dim);
            else arrange<T>(x(t), m.dim, now.value + t * m.dim);
        });
        meet();
        if (m.output.parts)
            return blocks::multiply_many(kept + skipped * (m.dim / blocks::BLOCK), tokens.wanted,
                                         {m.output.part, m.output.parts, m.vocab_size}, logits, worker);
        int64_t last = share(m.vocab_size, 1), rows = tokens.wanted == 1 ? m.vocab_size : 16;  // these stay near the core
        for (int64_t i = share(m.vocab_size, 0); i < last; i += rows) put_out(i, std::min(rows, last - i), logits + i);
    }
    void put_out(int64_t first, int64_t count, float* logits) {  // of some outputs, which are rows
        int64_t skipped = tokens.count - tokens.wanted;
        if (m.output.scale)
            for (int64_t i = 0; i < count; i++)
                for (int64_t t = 0; t < tokens.wanted; t++)
                    logits[t * m.vocab_size + i] = now.fixed[skipped + t].times(
                        (const int8_t*)m.output.data + (first + i) * m.dim, m.output.scale[first + i]);
        else
            in_groups<AT_ONCE>(tokens.wanted, [&](auto number, int64_t t) {
                dot_rows<T, number>((const T*)m.output.data + first * m.dim, now.value + (skipped + t) * m.dim, m.dim, count,
                                    logits + t * m.vocab_size, m.vocab_size, nullptr);
            });
    }

    void block(const Layer& layer) {
        each([&](int64_t t) { norm(t, (const T*)layer.attention_norm); });
        product(now.x, now.widest, layer.wqkv_threshold, layer.wqkv, m.dim, width, all.qkv);
        attention(layer);
        product(now.x, now.widest, layer.wo_threshold, layer.wo, m.heads * m.head_dim, m.dim, all.update);
        add(layer.wo, layer.wo_bias, (const T*)layer.attention_norm_behind);
        each([&](int64_t t) { norm(t, (const T*)layer.ffn_norm); });
        product(now.x, now.widest, layer.w13_threshold, layer.w13, m.dim, 2 * m.ffn_dim, all.gate_up);
        activate(layer.w13, layer.w13_bias);
        product(all.h, m.ffn_dim, layer.w2_threshold, layer.w2, m.ffn_dim, m.dim, all.update);
        add(layer.w2, layer.w2_bias, (const T*)layer.ffn_norm_behind);
    }

    // partial [tokens, SPLITS, N] = input [tokens, stride], of which K each, times a weight.
    void product(const float* input, int64_t stride, const float* threshold, const Weight& w, int64_t K, int64_t N,
                 float* partial) {
        bool together = !tokens.dense && tokens.count > 1;
        if (together) {
            barrier();  // until all inputs are there
            if (worker.id == 0) now.united = unite(input, tokens.count, stride, threshold, K, now.index.data());
            barrier();
        }
        int64_t count = together && !w.parts ? now.united : K;
        if (tokens.dense) threshold = nullptr;
        each([&](int64_t t) { count = now.keep(t, input + t * stride, threshold, K, w.parts, together); });
        meet();
        auto multiply_rows = [&](const auto& rows) { multiply(now.list.data(), tokens.count, rows, partial, worker); };
        if (summed(w, tokens.count)) blocks::multiply_many(now.kept.data(), tokens.count, {w.part, w.parts, N}, partial, worker);
        else if (w.parts) blocks::multiply(now.kept.data(), tokens.count, {w.part, w.parts, N}, partial, worker);
        else if (w.bits == 4) multiply_rows(Int4Rows((const uint8_t*)w.data, N, w.group));
        else if (w.bits == 8) multiply_rows(Rows<int8_t>{(const int8_t*)w.data, N});
        else multiply_rows(Rows<T>{(const T*)w.data, N});
        if (worker.id == 0) *counted++ = count;
        barrier();
    }

    // x: the residual, normalised unless the weight is null, as the model's type holds it.
    void norm(int64_t t, const T* weight) {
        const float* from = residual(t);
        float* to = x(t);
        if (weight) return normalise(from, weight, to);
        for (int64_t k = 0; k < m.dim; k++) to[k] = rounded<T>(from[k]);
    }
    void normalise(const float* from, const T* weight, float* to) {
        float scale = 1 / std::sqrt(sum_of_squares(from, m.dim) / m.dim + float(m.eps));
        for (int64_t k = 0; k < m.dim; k++) to[k] = rounded<T>(from[k] * scale * to_float(weight[k]));
    }

    void add(const Weight& w, const void* bias, const T* norm_behind) {
        each([&](int64_t t) {
            float *update = x(t), *to = residual(t);
            take<T>(w, tokens.count, all.update, t, m.dim, bias, 0, m.dim, update);
            if (norm_behind) normalise(update, norm_behind, update);
            for (int64_t k = 0; k < m.dim; k++) to[k] += update[k];
        });
    }

    // Head `head` of a token's q/k/v product into y [head_dim].
    void project(const Layer& layer, int64_t t, int64_t head, float* y) {
        take<T>(layer.wqkv, tokens.count, all.qkv, t, width, layer.wqkv_bias, head * m.head_dim, m.head_dim, y);
    }
    // A query's or a key's, normalised and turned. scale: see `turn`.
    void project(const Layer& layer, int64_t t, int64_t head, const void* norm, float scale, float* y) {
        project(layer, t, head, y);
        int64_t place = scale ? (head < m.heads ? head : head - m.heads) * m.head_dim : 0;
        turn(y, norm ? (const T*)norm + place : nullptr, m.norm_behind, float(m.eps), scale, cos(t, layer.rope),
             sin(t, layer.rope), m.head_dim);
    }
    // What a norm over `count` heads together scales them by (OLMo); 0 where each has its own or there is none.
    float norm_scale(const Layer& layer, int64_t t, int64_t head, int64_t count) {
        if (m.q_norm_width || !layer.q_norm) return 0;
        float sum = 0;
        for (int64_t i = head; i < head + count; i++) {
            project(layer, t, i, own.scratch);
            sum += sum_of_squares(own.scratch, m.head_dim);
        }
        return 1 / std::sqrt(sum / (count * m.head_dim) + float(m.eps));
    }

    // Where the key of a head at a position of a token's sequence stands in the cache.
    int64_t place(int64_t t, int64_t kv, int64_t position) {
        return (((tokens.dense ? 0 : t) * m.kv_heads + kv) * m.max_seq_length + position) * m.head_dim;
    }
    // Writes a token's key and value of one head to the cache.
    void remember(const Layer& layer, int64_t t, int64_t kv) {
        int64_t at = place(t, kv, tokens.position[t]);
        project(layer, t, m.heads + kv, layer.k_norm, norm_scale(layer, t, m.heads, m.kv_heads), own.scratch);
        for (int64_t d = 0; d < m.head_dim; d++) ((T*)layer.k_cache)[at + d] = from_float<T>(own.scratch[d]);
        project(layer, t, m.heads + m.kv_heads + kv, own.scratch);
        for (int64_t d = 0; d < m.head_dim; d++) ((T*)layer.v_cache)[at + d] = from_float<T>(own.scratch[d]);
    }

    void attention(const Layer& layer) {  // x: what the heads found
        int64_t size = m.head_dim, chunks = 0;
        float* scratch = own.scratch;
        each([&](int64_t t) {
            float scale = float(m.attention_scale), together = norm_scale(layer, t, 0, m.heads);
            if (m.query_step) scale *= 1 + float(m.query_beta) * std::log(float(1 + tokens.position[t] / m.query_step));
            for (int64_t head = 0; head < m.heads; head++) {
                project(layer, t, head, layer.q_norm, together, scratch);
                for (int64_t d = 0; d < size; d++) scratch[d] *= scale;
                arrange<T>(scratch, size, q(t) + head * size);
            }
            for (int64_t kv = 0; tokens.count > 1 && kv < m.kv_heads; kv++) remember(layer, t, kv);
        });
        meet();
        for (int64_t t = 0; t < tokens.count; t++)
            chunks = std::max(chunks, Span(tokens.position[t], layer.window).chunks);
        Found found{all.values, all.peak, all.total, chunks};
        int64_t tasks = m.kv_heads * chunks, last = share(tokens.count * tasks, 1);
        for (int64_t task = share(tokens.count * tasks, 0); task < last; task++)
            attend_chunk(layer, task / tasks, task % tasks / chunks, task % chunks, found);
        barrier();
        each([&](int64_t t) {
            int64_t count = Span(tokens.position[t], layer.window).chunks;
            float *peak = own.peak, *y = x(t);
            for (int64_t head = 0; head < m.heads; head++) {
                int64_t at = (t * m.heads + head) * chunks;
                std::copy_n(all.peak + at, count, peak);
                merge(all.values + at * size, peak, all.total + at, count, size, y + head * size);
            }
            for (int64_t k = 0; k < m.heads * size; k++) y[k] = rounded<T>(y[k]);
        });
    }
    // What a token's heads that share a key's find in a chunk of the cache, unless the token sees none of it.
    void attend_chunk(const Layer& layer, int64_t t, int64_t kv, int64_t chunk, Found found) {
        int64_t size = m.head_dim, group = m.heads / m.kv_heads, head = kv * group, last = head + group;
        Span span(tokens.position[t], layer.window);
        if (chunk >= span.chunks) return;
        int64_t begin = std::max(span.begin, (span.first + chunk) * CHUNK);
        int64_t count = std::min(span.end, (span.first + chunk + 1) * CHUNK) - begin;
        int64_t at = place(t, kv, begin);
        const T *keys = (const T*)layer.k_cache + at, *values = (const T*)layer.v_cache + at;
        if (tokens.count == 1 && chunk == span.chunks - 1) remember(layer, t, kv);
        auto attend_some = [&](auto heads) {
            for (constexpr int H = decltype(heads)::value; head + H <= last; head += H)
                attend<T, H>(q(t) + head * size, keys, values, count, size, float(m.attention_cap),
                             found.at(t * m.heads + head, chunk, size));
        };
        attend_some(std::integral_constant<int, 4>());
        attend_some(std::integral_constant<int, 3>());
        attend_some(std::integral_constant<int, 1>());
    }

    // This thread's share of h, the input of w2.
    void activate(const Weight& w, const void* bias) {
        int64_t F = m.ffn_dim, begin = share(F, 0, GRAIN), count = share(F, 1, GRAIN) - begin;
        float *gate = own.gate, *up = own.up;
        for (int64_t t = 0; t < tokens.count; t++) {
            float* h = all.h + t * F + begin;
            take<T>(w, tokens.count, all.gate_up, t, 2 * F, bias, begin, count, gate);
            take<T>(w, tokens.count, all.gate_up, t, 2 * F, bias, F + begin, count, up);
            for (int64_t n = 0; n < count; n += LANES) store(gate + n, gated(load(gate + n), load(up + n), m.tanh_gate));
            for (int64_t n = 0; n < count; n++) h[n] = rounded<T>(gate[n]);
        }
        barrier();
    }
};

void run(int type, const Model& model, const Tokens& tokens, float* logits, int threads) {
    static thread_local Shared shared;
    shared.fit(model, tokens.count, *std::max_element(tokens.position, tokens.position + tokens.count) + 1);
    Shared& all = shared;  // the calling thread's
#pragma omp parallel num_threads(threads)
    {
        static thread_local Private own;
        own.fit(model, tokens.count);
        Worker worker{omp_get_thread_num(), omp_get_num_threads()};
        with_type(type, [&](auto zero) { Step<decltype(zero)>(model, tokens, all, own, worker).run(logits); });
    }
    soft_cap(logits, tokens.wanted, model.vocab_size, float(model.output_cap));
}

}  // namespace

// logits [vocab_size] after `token` at `position`, whose keys and values go to the cache.
extern "C" void teal_decode_step(const Model* model, int type, int64_t token, int64_t position, float* logits,
                                 int threads) {
    run(type, *model, {&token, &position, 1, false, 1}, logits, threads);
}

// logits [count, vocab_size] after tokens [count] at positions [count], the next ones of as many sequences.
extern "C" void teal_batch_step(const Model* model, int type, const int64_t* tokens, const int64_t* positions,
                                int64_t count, float* logits, int threads) {
    run(type, *model, {tokens, positions, count, false, count}, logits, threads);
}

// Dense steps of tokens [count] from `position` on, all at once; logits [wanted, vocab_size] after the last ones.
extern "C" void teal_dense_steps(const Model* model, int type, const int64_t* tokens, int64_t count, int64_t position,
                                 int64_t wanted, float* logits, int threads) {
    std::vector<int64_t> positions(count);
    std::iota(positions.begin(), positions.end(), position);
    run(type, *model, {tokens, positions.data(), count, true, wanted}, logits, threads);
}

// Bytes of Layer and Model, which cpu_step.py compares with its own.
extern "C" void teal_struct_sizes(int64_t* sizes) { sizes[0] = sizeof(Layer), sizes[1] = sizeof(Model); }
