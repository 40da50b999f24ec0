"""teal::verify_attention: rotary embedding, cache update and attention of a few tokens, in spans of positions.

qkv [T, (H + 2 H_kv) D], the q, k and v projections; turn [2, T, D / 2] fp32, cosines and sines of the tokens' angles;
positions [T] int64, whose rows of k_cache, v_cache [H_kv, L, D] are written first; q_norm, k_norm [D]: RMSNorm of each
head before it is turned, or none. Each token attends over the positions up to its own, the last `window` of them when
window > 0. Returns acc [S, T, H, D] fp32, unnormalised sums of values over each SPAN positions, and peak, total
[S, T, H] fp32, as decode_attention.py's; only spans that a token attends over mean something (merge_spans.py).

Spans lie at fixed places and a program takes all tokens of one key/value head, each in a row of its own. So a token's
bits depend neither on the tokens beside it, nor on its row, nor on how long the cache is. T tokens may stand at one
position if they are the same. Cost follows the positions, not L.
"""

import math

import torch
from torch import Tensor

from teal_fast.kernels.backend import INTERPRETED, gdc_launch_dependents, gdc_wait, jit, launch_options, register, tl
from teal_fast.kernels.checks import takes

SPAN, BLOCK_T = 128, 64  # positions: of a partial sum, of a step
SHARES = 16  # programs a key/value head, which take spans by turns
WARPS = 4


@jit
def _turned(at, turn, used, norm_ptr, d, eps, T: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr):
    """Halves of heads' vectors [n, D / 2] fp32, normed if need be, and turned; zero where they are not used."""
    low = tl.load(at, mask=used[:, None], other=0.0).to(tl.float32)
    high = tl.load(at + D // 2, mask=used[:, None], other=0.0).to(tl.float32)
    cos, sin = tl.load(turn), tl.load(turn + T * D // 2)
    if NORM:
        size = tl.rsqrt((tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)) / D + eps)[:, None]
        low = low * size * tl.load(norm_ptr + d).to(tl.float32)[None, :]
        high = high * size * tl.load(norm_ptr + D // 2 + d).to(tl.float32)[None, :]
    return low * cos - high * sin, high * cos + low * sin


@jit
def _verify_attention_kernel(
    qkv_ptr, turn_ptr, positions_ptr, k_cache_ptr, v_cache_ptr, q_norm_ptr, k_norm_ptr, acc_ptr, peak_ptr, total_ptr,
    length, window, scale, eps, T: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr, BLOCK_T: tl.constexpr, SHARES: tl.constexpr,
    NORM: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    head, share = tl.program_id(0), tl.program_id(1)
    HALF: tl.constexpr = D // 2
    SHARING: tl.constexpr = HEADS // KV_HEADS
    WIDTH: tl.constexpr = (HEADS + 2 * KV_HEADS) * D
    dtype = k_cache_ptr.dtype.element_ty
    dot_type = tl.float32 if UPCAST else dtype  # Triton's interpreter cannot multiply bf16
    d, full, i = tl.arange(0, HALF), tl.arange(0, D), tl.arange(0, T)
    row = tl.arange(0, ROWS)
    token, query = tl.minimum(row // GROUP, T - 1), head * SHARING + row % GROUP
    used = (row // GROUP < T) & (row % GROUP < SHARING)
    base = head.to(tl.int64) * length * D
    gdc_launch_dependents(PDL)  # whose first weights then come meanwhile
    position, p = tl.load(positions_ptr + i), tl.load(positions_ptr + token)  # which no launch of the pass writes
    gdc_wait(PDL)
    # All programs of a head write the same keys and values, so that each can read them at once.
    of_k = qkv_ptr + i[:, None] * WIDTH + (HEADS + head) * D + d[None, :]
    turn = turn_ptr + i[:, None] * HALF + d[None, :]
    low, high = _turned(of_k, turn, i < T, k_norm_ptr, d, eps, T, D, NORM)
    cell, room = base + position[:, None] * D, (position < length)[:, None]
    v_new = tl.load(qkv_ptr + i[:, None] * WIDTH + (HEADS + KV_HEADS + head) * D + full[None, :])
    tl.store(k_cache_ptr + cell + d[None, :], low.to(dtype), mask=room)
    tl.store(k_cache_ptr + cell + HALF + d[None, :], high.to(dtype), mask=room)
    tl.store(v_cache_ptr + cell + full[None, :], v_new.to(dtype), mask=room)
    of_q = qkv_ptr + token[:, None] * WIDTH + query[:, None] * D + d[None, :]
    turn = turn_ptr + token[:, None] * HALF + d[None, :]
    low, high = _turned(of_q, turn, used, q_norm_ptr, d, eps, T, D, NORM)
    low, high = (low * scale).to(dtype).to(dot_type), (high * scale).to(dtype).to(dot_type)
    begin = tl.where(window > 0, tl.maximum(p + 1 - window, 0), 0)
    last, first = tl.max(p, axis=0), tl.min(begin, axis=0) // SPAN
    tl.debug_barrier()
    for span in tl.range(first + share, last // SPAN + 1, SHARES):
        m, s = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((ROWS, D), tl.float32)
        for start in tl.range(span * SPAN, tl.minimum(span * SPAN + SPAN, last + 1), BLOCK_T, num_stages=2):
            t = start + tl.arange(0, BLOCK_T)
            line, there = base + t.to(tl.int64) * D, t <= last
            k_low = tl.load(k_cache_ptr + line[None, :] + d[:, None], mask=there[None, :], other=0.0)
            k_high = tl.load(k_cache_ptr + line[None, :] + d[:, None] + HALF, mask=there[None, :], other=0.0)
            v = tl.load(v_cache_ptr + line[:, None] + full[None, :], mask=there[:, None], other=0.0)
            scores = tl.dot(low, k_low.to(dot_type), input_precision="ieee")
            scores += tl.dot(high, k_high.to(dot_type), input_precision="ieee")
            seen = (t[None, :] <= p[:, None]) & (t[None, :] >= begin[:, None])
            scores = tl.where(seen, scores, float("-inf"))
            m_new = tl.maximum(m, tl.max(scores, axis=1))
            finite = tl.where(m_new == float("-inf"), 0.0, m_new)  # of rows that have seen nothing yet
            weight, fade = tl.exp(scores - finite[:, None]), tl.exp(m - finite)
            s = s * fade + tl.sum(weight, axis=1)
            weight = weight.to(dtype).to(dot_type)
            acc = acc * fade[:, None] + tl.dot(weight, v.to(dot_type), input_precision="ieee")
            m = m_new
        sums = (span * T + token) * HEADS + query
        tl.store(peak_ptr + sums, m, mask=used)
        tl.store(total_ptr + sums, s, mask=used)
        tl.store(acc_ptr + sums[:, None] * D + full[None, :], acc, mask=used[:, None])


def _verify_attention_cuda(
    qkv, turn, positions, k_cache, v_cache, q_norm, k_norm, heads, window, eps
) -> tuple[Tensor, ...]:
    (kv_heads, length, D), T = k_cache.shape, len(positions)
    sums = _verify_attention_fake(qkv, turn, positions, k_cache, v_cache, q_norm, k_norm, heads, window, eps)
    group, shares = 1 << (heads // kv_heads - 1).bit_length(), min(SHARES, len(sums[0]))
    _verify_attention_kernel[(kv_heads, shares)](
        qkv, turn, positions, k_cache, v_cache, q_norm, k_norm, *sums, length, window, 1 / math.sqrt(D), eps, T, heads,
        kv_heads, D, group, max(16, T * group), SPAN, BLOCK_T, shares, q_norm is not None, INTERPRETED,
        num_warps=WARPS, **launch_options(qkv),
    )  # fmt: skip
    return sums


def _verify_attention_fake(qkv, turn, positions, k_cache, v_cache, q_norm, k_norm, heads, *_) -> tuple[Tensor, ...]:
    size = -(-k_cache.shape[1] // SPAN), len(positions), heads
    return tuple(qkv.new_empty(shape, dtype=torch.float32) for shape in ((*size, k_cache.shape[2]), size, size))


_check = takes(
    "verify_attention",
    "k_cache [H_kv, L, D] dtype; v_cache [H_kv, L, D] dtype; positions [T] int64; turn [2, T, D // 2] fp32;"
    " qkv [T, (H + 2 * H_kv) * D] dtype; q_norm [D] dtype or none; k_norm [D] dtype or none",
    "H",
)
_verify_attention = register(
    "verify_attention",
    "(Tensor qkv, Tensor turn, Tensor positions, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? q_norm,"
    " Tensor? k_norm, int heads, int window, float eps) -> (Tensor, Tensor, Tensor)",
    cuda=_verify_attention_cuda,
    fake=_verify_attention_fake,
)


def verify_attention(
    qkv, turn, positions, k_cache, v_cache, q_norm, k_norm, heads: int, window: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Acc, peak and total, as above. Raises ValueError on what does not fit."""
    _check(k_cache, v_cache, positions, turn, qkv, q_norm, k_norm, H=heads)
    kv_heads, _, D = k_cache.shape
    if D & (D - 1) or D < 32 or heads % kv_heads or heads // kv_heads > 16 or len(positions) not in (8, 16):
        found = f"{D}, {heads} / {kv_heads} and {len(positions)}"
        raise ValueError(f"verify_attention takes D of 32, 64 …, H / H_kv to 16, 8 or 16 tokens, got {found}")
    return _verify_attention(qkv, turn, positions, k_cache, v_cache, q_norm, k_norm, heads, window, eps)
