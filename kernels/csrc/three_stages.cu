// A decode step's layer as three launches, each of one CTA a multiprocessor, on Hopper and later GPUs: q/k/v of the normed
// residual; attention and o; norm, gate, up and down. Attention over more than SHORT positions gets a launch of its own
// before o. At the end stage_output: logits, and the likeliest token, in whose place stage_draw draws one where that is
// asked for. Of a model that is cut over several GPUs, each has its share of heads and of the MLP; stage_sum adds up their
// updates, stage_gather brings their logits together.
//
// Sums over CTAs are exact (add_on_grid), so that a step has the same bits whatever the order of its additions. What a
// kernel reads before wait_for_producers was made before the step: weights, thresholds, grids, the cache's past.
#include "stages_attention.cuh"
#include "stages_draw.cuh"
#include "stages_ranks.cuh"
#include "stages_sums.cuh"

// The residual with the layer's updates before: every CTA reads it, each writes its share of it.
STAGE stage_qkv(const __grid_constant__ Step S, const __grid_constant__ Layer L, const int number) {
    constexpr int C = columns(BITS_A), SEGMENTS = cdiv(ROW_QKV, SEGMENT), EACH = CTAS_QKV * WARPS / SEGMENTS;  // warps
    constexpr int PITCH = C / 4 * 33;
    static_assert(EACH >= WARPS, "a CTA has two segments at most");
    Shared& s = shared();
    const int t = threadIdx.x, lane = t & 31, warp = t >> 5, number_of_warp = blockIdx.x * WARPS + warp;
    const int segment = least(number_of_warp / EACH, SEGMENTS - 1), turn = number_of_warp - segment * EACH;
    const int first = least(blockIdx.x * WARPS / EACH, SEGMENTS - 1), last = least((blockIdx.x * WARPS + WARPS - 1) / EACH, SEGMENTS - 1);
    const int border = first == last ? WARPS : last * EACH - blockIdx.x * WARPS;  // the first warp of the second
    launch_dependents();
    Norm norm;
    norm.prepare(L.attention_norm, L.qkv_threshold);
    float4 scale[2], grid[2];
#pragma unroll
    for (int i = 0; i < 2; i++)
        if (const int column = (i ? last : first) * 32 * C + 4 * t; t < 8 * C && column < QKV) {
            grid[i] = load4(L.qkv_grid + column);
            scale[i] = BITS_A <= 8 ? load4(L.qkv_scale + column) : make_float4(1, 1, 1, 1);
        }
    wait_for_producers();
    const float *from = S.residual[number & 1], *before = S.o_update[~number & 1];
    float* to = S.residual[~number & 1];
    const u16* embedding = S.embedding + __ldcg(S.token) * DIM;
    if (number == 0)
        for (int k = blockIdx.x * THREADS + t; k < DIM; k += CTAS_QKV * THREADS) S.o_update[0][k] = 0;
    norm.compute(s, [&](int k, float* x) {
        if (number == 0) widen(__ldg((const uint4*)(embedding + k)), x);
        else add_updates(from, before, S.mlp_update, k, x);
        if (k / 8 % gridDim.x == blockIdx.x)
#pragma unroll
            for (int i = 0; i < 8; i++) to[k + i] = x[i];
    }, S.eps);
    const int n = norm.list<BITS_A>(s);
    const int byte = segment * SEGMENT + lane * PIECE, rows = turn < EACH && byte < ROW_QKV ? n : 0;
    Sum<BITS_A> y;
    walk<UNROLL_A, ROW_QKV>(y, s.list, rows, turn, EACH, L.wqkv + byte);
    store(y, s.part + warp * PITCH + lane, 33, norm.fixed.unit);
    if constexpr (BITS_A <= 8)
        if (turn == 0 && byte < ROW_QKV)
            add_outliers<BITS_A, ROW_QKV>(s.part + warp * PITCH + lane, 33, s.list + n + 1, norm.fixed.apart, L.wqkv + byte);
    __syncthreads();
    if (t >= 8 * C) return;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int column = (i ? last : first) * 32 * C + 4 * t;
        if ((i && first == last) || column >= QKV) continue;
        float4 a = make_float4(0, 0, 0, 0);
        for (int w = i ? border : 0; w < (i ? WARPS : border); w++)
            a = plus(a, s.part[w * PITCH + t % (C / 4) * 33 + t / (C / 4)]);
        add_on_grid<ADDENDS_QKV>(S.qkv + column, BITS_A <= 8 ? times(a, scale[i]) : a, grid[i], S.beyond);
    }
}

__device__ __forceinline__ int first_position(const Layer& L, int position) {
    return L.window > 0 ? most(0, position + 1 - (int)L.window) : 0;
}

// Partial results of long contexts: a CTA has a key/value head, up to eight of its heads, and a share of the positions.
STAGE stage_attention(const __grid_constant__ Step S, const __grid_constant__ Layer L) {
    Shared& s = shared();
    const int split = blockIdx.x % SPLITS, kv = blockIdx.x / SPLITS % KV_HEADS, batch = blockIdx.x / SPLITS / KV_HEADS;
    const int t = threadIdx.x, position = (int)__ldcg(S.position), begin = first_position(L, position);
    const int head = kv * SHARING + batch * QUERIES, heads = least(QUERIES, SHARING - batch * QUERIES);
    launch_dependents();
    if (position + 1 - begin <= SHORT) return wait_for_producers();
    Attention<QUERIES, Split> attention(S, L, kv, begin, position, Split{split, begin / Split::ROUND});
    Projection<QUERIES> projection;
    projection.prepare(S, L, head, heads, kv, position);
    wait_for_producers();
    projection.rotate(s, S);
    if (split == 0 && batch == 0) remember(s, S, L, kv, position);
    float sums[QUERIES], largest[QUERIES], exponentials[QUERIES];
    attention.compute(s);
    attention.gather(s, split == 0, sums, largest, exponentials);
    if (t < HEAD_DIM)
#pragma unroll
        for (int j = 0; j < QUERIES; j++)
            if (j < heads) {
                float* to = S.partial + ((i64)(head + j) * SPLITS + split) * RESULT;
                to[t] = sums[j];
                if (t == 0) to[HEAD_DIM] = largest[j], to[HEAD_DIM + 1] = exponentials[j];
            }
}

// SHARERS CTAs compute the same head, or merge what stage_attention found of it, and each multiplies its share of o's rows.
STAGE stage_o(const __grid_constant__ Step S, const __grid_constant__ Layer L, const int number) {
    Shared& s = shared();
    const int t = threadIdx.x, head = blockIdx.x / SHARERS, share = blockIdx.x % SHARERS, kv = head / SHARING;
    const int position = (int)__ldcg(S.position), begin = first_position(L, position);
    const bool is_short = position + 1 - begin <= SHORT;
    launch_dependents();
    Attention<1, Whole> attention(S, L, kv, begin, is_short ? position : -1, Whole{begin});
    Projection<1> projection;
    if (is_short) projection.prepare(S, L, head, 1, kv, position);
    const Columns columns{L.o_scale, L.o_bias, L.o_grid};
    columns.prepare(s);
    const float threshold = t < HEAD_DIM ? __ldg(L.o_threshold + head * HEAD_DIM + t) : 0;
    wait_for_producers();
    for (int k = blockIdx.x * THREADS + t; k < DIM; k += CTAS_O * THREADS)  // the MLP and the next o add to them
        S.mlp_update[k] = 0, S.o_update[~number & 1][k] = 0;
    float y, largest, exponentials;
    if (is_short) {
        projection.rotate(s, S);
        if (share == 0 && head % SHARING == 0) remember(s, S, L, kv, position);
        attention.compute(s);
        attention.gather(s, true, &y, &largest, &exponentials);
        y /= exponentials;
    } else {
        y = merge(s, S, head);
    }
    Fixed fixed;
    const int n = short_list<BITS_A, HEAD_DIM>(s, t < HEAD_DIM ? rounded(y) : 0, threshold, fixed);
    add_rows<BITS_A, UNROLL_A, ROW_O, ADDENDS_O>(
        s, n, share, SHARERS, fixed, L.wo + (i64)head * HEAD_DIM * ROW_O, nullptr, columns, S.o_update[number & 1], S.beyond);
}

// A CTA owns CHANNELS of the MLP: gate and up of all rows, then its own rows of down. Nothing of it crosses CTAs but sums.
STAGE stage_mlp(const __grid_constant__ Step S, const __grid_constant__ Layer L, const int number) {
    Shared& s = shared();
    const int t = threadIdx.x, channel = blockIdx.x * CHANNELS + t;
    const int slot = t / WIDTH, piece = t % PIECES, half = t % WIDTH / PIECES, column = blockIdx.x * CHANNELS + piece * C_MLP;
    const int first_group = BITS_M == 4 ? blockIdx.x * CHANNELS / most(GROUP, 1) : 0;
    launch_dependents();
    Norm norm;
    norm.prepare(L.ffn_norm, L.gate_up_threshold);
    const Columns columns{L.down_scale, L.down_bias, L.down_grid};
    columns.prepare(s);
    const bool has_channel = t < CHANNELS && channel < FFN;
    const float threshold = has_channel ? __ldg(L.down_threshold + channel) : 0;
    float gate_scale = 1, up_scale = 1, gate_bias = 0, up_bias = 0;
    if (BITS_M <= 8 && has_channel) gate_scale = __ldg(L.gate_up_scale + channel), up_scale = __ldg(L.gate_up_scale + FFN + channel);
    if (L.gate_up_bias && has_channel) gate_bias = half_at(L.gate_up_bias, channel), up_bias = half_at(L.gate_up_bias, FFN + channel);
    if constexpr (BITS_M == 4) {  // scales of all rows, in eights, of this CTA's groups; and of its own rows
        for (int i = t; i < 2 * MLP_GROUPS * DIM / 8; i += THREADS) {
            const int row = i / (DIM / 8), group = first_group + row % most(MLP_GROUPS, 1);
            const i64 from = (row / most(MLP_GROUPS, 1) * GROUPS_MLP + group) * (i64)DIM + i % (DIM / 8) * 8;
            if (group < GROUPS_MLP) copy(s.gate_up_groups + 8 * i, L.gate_up_groups + from);
        }
        constexpr int AT_ONCE = GROUPS_OUT % 8 == 0 ? 8 : GROUPS_OUT % 2 == 0 ? 2 : 1, PER_ROW = GROUPS_OUT / AT_ONCE;
        for (int i = t; i < CHANNELS * PER_ROW; i += THREADS)
            if (const int k = blockIdx.x * CHANNELS + i / PER_ROW; k < FFN)
                copy<2 * AT_ONCE>(s.down_groups + i * AT_ONCE,
                                  (const u16*)(L.w2 + (i64)k * ROW_DOWN + DIM / 2) + i % PER_ROW * AT_ONCE);
    }
    wait_for_producers();
    for (int k = blockIdx.x * THREADS + t; k < QKV; k += CTAS_MLP * THREADS) S.qkv[k] = 0;  // the next layer adds to it
    copies_arrive();  // the norm's barriers come after
    norm.compute(
        s, [&](int k, float* x) { add_updates(S.residual[~number & 1], S.o_update[number & 1], nullptr, k, x); }, S.eps);
    int n = norm.list<BITS_M>(s);
    {
        const int rows = slot < SLOTS && column < FFN ? n : 0;
        const u8* base = L.w13 + (i64)(half * FFN + column) * BITS_M / 8;
        const u16* scales = BITS_M == 4 ? s.gate_up_groups + (half * MLP_GROUPS + column / most(GROUP, 1) - first_group) * DIM : nullptr;
        Sum<BITS_M> y;
        walk<UNROLL_M, ROW_MLP, 1>(y, s.list, rows, slot, SLOTS, base, scales);
        float4* sums = s.part + slot * BOTH + t % WIDTH;
        if (slot < SLOTS) store(y, sums, WIDTH, norm.fixed.unit);
        if constexpr (BITS_M <= 8)
            if (slot == 0 && column < FFN)
                add_outliers<BITS_M, ROW_MLP, 1>(sums, WIDTH, s.list + n + 1, norm.fixed.apart, base, scales);
    }
    __syncthreads();
    constexpr int TEAMS = least(THREADS / BOTH, SLOTS);
    static_assert(TEAMS >= 1, "too many channels a CTA");
    if (const int q = t % BOTH, team = t / BOTH; team < TEAMS) {
        float4 a = make_float4(0, 0, 0, 0);
        for (int i = team; i < SLOTS; i += TEAMS) a = plus(a, s.part[i * BOTH + q]);
        s.some[team * BOTH + q] = a;
    }
    __syncthreads();
    float x = 0;
    if (has_channel) {
        const float* sums = (const float*)s.some + (t % C_MLP / 4 * WIDTH + t / C_MLP) * 4 + t % 4;
        float gate = 0, up = 0;
#pragma unroll
        for (int i = 0; i < TEAMS; i++) gate += sums[4 * i * BOTH], up += sums[4 * (i * BOTH + PIECES)];
        gate = gate * gate_scale + gate_bias, up = up * up_scale + up_bias;
        x = rounded(gate / (1 + __expf(-gate)) * up);
    }
    Fixed fixed;
    n = short_list<BITS_M, CHANNELS>(s, x, has_channel ? threshold : 1, fixed);
    add_rows<BITS_M, UNROLL_M, ROW_DOWN, ADDENDS_MLP, GROUPS_OUT>(
        s, n, 0, 1, fixed, L.w2 + (i64)blockIdx.x * CHANNELS * ROW_DOWN, s.down_groups, columns, S.mlp_update, S.beyond);
}
