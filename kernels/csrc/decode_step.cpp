// One token through the whole model on the CPU, in one parallel region: see engine/cpu_step.py.
//
// Every thread keeps the residual stream and the lists of kept channels for itself: to compute them again is cheaper
// than to wait for one another. What they share is written by all, each its share, and read by all after a barrier; at
// least one more barrier lies between that and when it is written again.
#include <omp.h>

#include "attention.h"
#include "block_gemv.h"
#include "block_values.h"
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
    const void *attention_norm, *ffn_norm, *q_norm, *k_norm;
    Weight wqkv, wo, w13, w2;
    const void *wqkv_bias, *wo_bias, *w13_bias, *w2_bias;
    const float *wqkv_threshold, *wo_threshold, *w13_threshold, *w2_threshold;
    void *k_cache, *v_cache;  // [key/value heads, max_seq_length, head_dim]
    int64_t window;           // 0: the whole context
};

struct Model {  // CpuModel in engine/cpu_step.py
    int64_t dim, heads, kv_heads, head_dim, ffn_dim, vocab_size, max_seq_length, layers;
    double eps;
    Weight embeddings, output;
    const void* norm;
    const float* frequencies;
    const Layer* layer;
    int64_t* kept;  // [layers, 4]: how many channels each product kept of its input
};
}

namespace {

struct Shared {
    Floats qkv, update, gate_up;  // products as partial sums [SPLITS, N]
    Floats values, peak, total;   // attention: [heads, chunks, head_dim], [heads, chunks] twice
    Floats h;                     // [ffn_dim]

    void fit(const Model& m) {
        int64_t chunks = (m.max_seq_length + CHUNK - 1) / CHUNK;
        qkv.resize(SPLITS * (m.heads + 2 * m.kv_heads) * m.head_dim);
        update.resize(SPLITS * m.dim);
        gate_up.resize(SPLITS * 2 * m.ffn_dim);
        values.resize(m.heads * chunks * m.head_dim);
        peak.resize(m.heads * chunks), total.resize(m.heads * chunks);
        h.resize(m.ffn_dim);
    }
};

struct Private {
    Floats residual, x, value, up, cos, sin, q, peak, scratch;
    std::vector<int32_t> index;
    std::vector<blocks::Kept> kept;
    Fixed fixed;

    void fit(const Model& m) {
        int64_t widest = std::max({m.dim, m.ffn_dim, m.heads * m.head_dim});
        residual.resize(m.dim);
        x.resize(widest), value.resize(widest), index.resize(widest), up.resize(m.ffn_dim);
        kept.resize(widest / blocks::BLOCK + 1);
        cos.resize(m.head_dim / 2), sin.resize(m.head_dim / 2);
        q.resize(m.heads * m.head_dim), scratch.resize(m.head_dim);
        peak.resize((m.max_seq_length + CHUNK - 1) / CHUNK);
    }
};

template <class T> class Step {
    const Model& m;
    const int64_t position, width;  // width: outputs of wqkv
    Shared& all;
    Private& own;
    const Worker worker;
    float* const x;  // this thread's input of the next product
    int64_t* counted;  // where the next product's number of kept channels goes

  public:
    Step(const Model& m, int64_t position, Shared& all, Private& own, Worker worker)
        : m(m), position(position), width((m.heads + 2 * m.kv_heads) * m.head_dim), all(all), own(own), worker(worker),
          x(own.x), counted(m.kept) {}

    void run(int64_t token, float* logits) {
        embed(token);
        for (int64_t d = 0; d < m.head_dim / 2; d++) {
            float angle = position * m.frequencies[d];
            own.cos[d] = std::cos(angle), own.sin[d] = std::sin(angle);
        }
        for (int64_t i = 0; i < m.layers; i++) block(m.layer[i]);
        norm((const T*)m.norm);
        put_out(logits);
    }

  private:
    static void barrier() {
#pragma omp barrier
    }
    int64_t share(int64_t n, int end, int64_t grain = 1) { return part(n, worker.id + end, worker.count, grain); }

    void embed(int64_t token) {
        if (m.embeddings.parts) return blocks::look_up_output<T>(*m.embeddings.part, token, (float*)own.residual);
        const T* row = (const T*)m.embeddings.data + token * m.dim;
        for (int64_t k = 0; k < m.dim; k++) own.residual[k] = to_float(row[k]);
    }

    void put_out(float* logits) {
        if (m.output.parts) {
            blocks::keep(x, nullptr, m.dim, own.kept.data());
            return blocks::multiply_many(own.kept.data(), {m.output.part, m.output.parts, m.vocab_size}, logits, worker);
        }
        int64_t first = share(m.vocab_size, 0), last = share(m.vocab_size, 1);
        if (!m.output.scale) {
            arrange<T>(x, m.dim, own.value);
            const T* rows = (const T*)m.output.data + first * m.dim;
            return dot_rows<T, 1>(rows, own.value, m.dim, last - first, logits + first, 0, nullptr);
        }
        own.fixed.set(x, m.dim);
        for (int64_t i = first; i < last; i++)
            logits[i] = own.fixed.times((const int8_t*)m.output.data + i * m.dim, m.output.scale[i]);
    }

    void block(const Layer& layer) {
        norm((const T*)layer.attention_norm);
        product(x, layer.wqkv_threshold, layer.wqkv, m.dim, width, all.qkv);
        attention(layer);
        product(x, layer.wo_threshold, layer.wo, m.heads * m.head_dim, m.dim, all.update);
        add(layer.wo.scale, layer.wo_bias);
        norm((const T*)layer.ffn_norm);
        product(x, layer.w13_threshold, layer.w13, m.dim, 2 * m.ffn_dim, all.gate_up);
        activate(layer.w13.scale, layer.w13_bias);
        product(all.h, layer.w2_threshold, layer.w2, m.ffn_dim, m.dim, all.update);
        add(layer.w2.scale, layer.w2_bias);
    }

    void product(const float* input, const float* threshold, const Weight& w, int64_t K, int64_t N, float* partial) {
        int64_t count = w.parts ? multiply_blocks(input, threshold, w, K, N, partial)
                                : multiply_rows(input, threshold, w, K, N, partial);
        if (worker.id == 0) *counted++ = count;
        barrier();
    }
    int64_t multiply_blocks(const float* input, const float* threshold, const Weight& w, int64_t K, int64_t N,
                            float* partial) {
        int64_t count = blocks::keep(input, threshold, K, own.kept.data());
        blocks::multiply(own.kept.data(), {w.part, w.parts, N}, partial, worker);
        return count;
    }
    int64_t multiply_rows(const float* input, const float* threshold, const Weight& w, int64_t K, int64_t N,
                          float* partial) {
        CompactVector kept = compact(input, threshold, K, own.index.data(), own.value);
        if (w.bits == 4) multiply(kept, Int4Rows((const uint8_t*)w.data, N, w.group), partial, worker);
        else if (w.bits == 8) multiply(kept, Rows<int8_t>{(const int8_t*)w.data, N}, partial, worker);
        else multiply(kept, Rows<T>{(const T*)w.data, N}, partial, worker);
        return kept.count;
    }

    void norm(const T* weight) {  // x: the residual, normalised, as the model's type holds it
        const float* residual = own.residual;
        float scale = 1 / std::sqrt(sum_of_squares(residual, m.dim) / m.dim + float(m.eps));
        for (int64_t k = 0; k < m.dim; k++) x[k] = rounded<T>(residual[k] * scale * to_float(weight[k]));
    }

    void add(const float* scale, const void* bias) {
        collect(all.update, m.dim, scale, (const T*)bias, 0, m.dim, x);
        for (int64_t k = 0; k < m.dim; k++) own.residual[k] += x[k];
    }

    // Head `head` of the q/k/v product into y [head_dim], turned unless it is a value's.
    void project(const Layer& layer, int64_t head, const void* norm, float* y) {
        collect(all.qkv, width, layer.wqkv.scale, (const T*)layer.wqkv_bias, head * m.head_dim, m.head_dim, y);
        if (head >= m.heads + m.kv_heads) return;
        turn(y, (const T*)norm, float(m.eps), own.cos, own.sin, m.head_dim);
    }

    void attention(const Layer& layer) {  // x: what the heads found
        int64_t size = m.head_dim, group = m.heads / m.kv_heads;
        Span span(position, layer.window);
        float scale = 1 / std::sqrt(float(size)), *scratch = own.scratch;
        for (int64_t head = 0; head < m.heads; head++) {
            project(layer, head, layer.q_norm, scratch);
            for (int64_t d = 0; d < size; d++) scratch[d] *= scale;
            arrange<T>(scratch, size, own.q + head * size);
        }
        Found found{all.values, all.peak, all.total, span.chunks};
        int64_t tasks = m.kv_heads * span.chunks;
        for (int64_t task = share(tasks, 0); task < share(tasks, 1); task++) {
            int64_t kv = task / span.chunks, chunk = task % span.chunks;
            int64_t begin = std::max(span.begin, (span.first + chunk) * CHUNK);
            int64_t count = std::min(span.end, (span.first + chunk + 1) * CHUNK) - begin;
            T* keys = (T*)layer.k_cache + (kv * m.max_seq_length + begin) * size;
            T* values = (T*)layer.v_cache + (kv * m.max_seq_length + begin) * size;
            if (chunk == span.chunks - 1) {  // the token itself
                project(layer, m.heads + kv, layer.k_norm, scratch);
                for (int64_t d = 0; d < size; d++) keys[(count - 1) * size + d] = from_float<T>(scratch[d]);
                project(layer, m.heads + m.kv_heads + kv, nullptr, scratch);
                for (int64_t d = 0; d < size; d++) values[(count - 1) * size + d] = from_float<T>(scratch[d]);
            }
            int64_t head = kv * group, last = head + group;
            auto attend_some = [&](auto heads) {
                for (constexpr int H = decltype(heads)::value; head + H <= last; head += H)
                    attend<T, H>(own.q + head * size, keys, values, count, size, found.at(head, chunk, size));
            };
            attend_some(std::integral_constant<int, 4>());
            attend_some(std::integral_constant<int, 3>());
            attend_some(std::integral_constant<int, 1>());
        }
        barrier();
        float* peak = own.peak;
        for (int64_t head = 0; head < m.heads; head++) {
            int64_t at = head * span.chunks;
            std::copy_n(all.peak + at, span.chunks, peak);
            merge(all.values + at * size, peak, all.total + at, span.chunks, size, x + head * size);
        }
        for (int64_t k = 0; k < m.heads * size; k++) x[k] = rounded<T>(x[k]);
    }

    void activate(const float* scale, const void* bias) {  // this thread's share of h = SiLU(gate) * up
        int64_t F = m.ffn_dim, begin = share(F, 0, GRAIN), count = share(F, 1, GRAIN) - begin;
        float *gate = x, *up = own.up;
        collect(all.gate_up, 2 * F, scale, (const T*)bias, begin, count, gate);
        collect(all.gate_up, 2 * F, scale, (const T*)bias, F + begin, count, up);
        for (int64_t n = 0; n < count; n += LANES) {
            vf g = load(gate + n);
            store(gate + n, g / (1.0f + exp(-g)) * load(up + n));
        }
        for (int64_t n = 0; n < count; n++) all.h[begin + n] = rounded<T>(gate[n]);
        barrier();
    }
};

template <class T> void decode_step(const Model& model, int64_t token, int64_t position, float* logits, int threads) {
    static thread_local Shared shared;
    shared.fit(model);
    Shared& all = shared;  // the calling thread's
#pragma omp parallel num_threads(threads)
    {
        static thread_local Private own;
        own.fit(model);
        Step<T>(model, position, all, own, {omp_get_thread_num(), omp_get_num_threads()}).run(token, logits);
    }
}

}  // namespace

// logits [vocab_size] after `token` at `position`, whose keys and values go to the cache.
extern "C" void teal_decode_step(const Model* model, int type, int64_t token, int64_t position, float* logits,
                                 int threads) {
    with_type(type, [&](auto zero) { decode_step<decltype(zero)>(*model, token, position, logits, threads); });
}

// Bytes of Layer and Model, which cpu_step.py compares with its own.
extern "C" void teal_struct_sizes(int64_t* sizes) { sizes[0] = sizeof(Layer), sizes[1] = sizeof(Model); }
