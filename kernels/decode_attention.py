"""teal::decode_attention: rotary embedding, cache update and attention of one token: flash decoding's first half.

qkv [(H + 2 H_kv) D] fp32, the q, k and v projections; frequencies [D / 2] fp32; k_cache, v_cache [H_kv, T, D], whose
row input_pos [1] int64 is written; H heads. Grouped-query attention over positions 0 … input_pos, the last `window` of
them when window > 0; its cost follows input_pos, not T. A program takes one key/value head and one of S shares of the
positions (https://crfm.stanford.edu/2023/10/12/flashdecoding.html). Returns acc [H, S, D] fp32, unnormalised sums of
values, and peak, total [H, S] fp32, the largest score and the sum of exponentials: without positions -inf, undefined.
"""

import math

import torch
from torch import Tensor

from teal_fast.kernels.backend import INTERPRETED, gdc_launch_dependents, gdc_wait, jit, launch_options, register, tl
from teal_fast.kernels.checks import takes

BLOCK_T = 32  # positions a step; with 2 warps and 16 or 32 shares the best of a sweep on an H200, 2026-11-24
PROGRAMS = 128  # about one a multiprocessor
GROUP = 16  # rows that tl.dot wants; the heads that share a key/value head fill the first few


def decode_attention_reference(
    qkv: Tensor, frequencies: Tensor, k_cache: Tensor, v_cache: Tensor, input_pos: Tensor, heads: int, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As one share."""
    (kv_heads, _, D), position = k_cache.shape, int(input_pos)
    x, v = qkv.view(-1, D).split([heads + kv_heads, kv_heads])
    low, high = x.chunk(2, dim=-1)
    cos, sin = (position * frequencies).cos(), (position * frequencies).sin()
    q, k = torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).split([heads, kv_heads])
    k_cache[:, position], v_cache[:, position] = k.to(k_cache.dtype), v.to(v_cache.dtype)
    begin = max(0, position + 1 - window) if window else 0
    keys, values = k_cache[:, begin : position + 1].float(), v_cache[:, begin : position + 1].float()
    scores = (q.view(kv_heads, -1, D) @ keys.transpose(1, 2) / math.sqrt(D)).view(heads, 1, -1)
    peak = scores.amax(-1)
    weights = (scores - peak[..., None]).exp()
    return (weights.view(kv_heads, -1, weights.shape[-1]) @ values).view(heads, 1, D), peak, weights.sum(-1)


@jit
def _decode_attention_kernel(
    qkv_ptr, frequencies_ptr, k_cache_ptr, v_cache_ptr, input_pos_ptr, acc_ptr, peak_ptr, total_ptr,
    max_seq_length, window, scale, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, SHARES: tl.constexpr,
    BLOCK_T: tl.constexpr, GROUP: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    head, share = tl.program_id(0), tl.program_id(1)
    HALF: tl.constexpr = D // 2
    SHARING: tl.constexpr = HEADS // KV_HEADS
    dtype = k_cache_ptr.dtype.element_ty
    dot_type = tl.float32 if UPCAST else dtype  # Triton's interpreter cannot multiply bf16
    d, full, g = tl.arange(0, HALF), tl.arange(0, D), tl.arange(0, GROUP)
    used = g < SHARING
    frequencies = tl.load(frequencies_ptr + d)
    gdc_wait(PDL)
    position = tl.load(input_pos_ptr)
    begin = tl.where(window > 0, tl.maximum(position + 1 - window, 0), 0)
    blocks = (position - begin + BLOCK_T - 1) // BLOCK_T  # of earlier positions
    mine = (blocks + SHARES - 1) // SHARES * BLOCK_T
    first, last = begin + share * mine, tl.minimum(begin + share * mine + mine, position)
    m, s = tl.full((GROUP,), float("-inf"), tl.float32), tl.zeros((GROUP,), tl.float32)
    acc = tl.zeros((GROUP, D), tl.float32)
    if (first < last) | (share == 0):
        angle = position.to(tl.float32) * frequencies
        cos, sin = tl.cos(angle), tl.sin(angle)
        at = (head * SHARING + g)[:, None] * D + d[None, :]
        q1 = tl.load(qkv_ptr + at, mask=used[:, None], other=0.0)
        q2 = tl.load(qkv_ptr + at + HALF, mask=used[:, None], other=0.0)
        q_low = ((q1 * cos - q2 * sin) * scale).to(dtype).to(dot_type)
        q_high = ((q2 * cos + q1 * sin) * scale).to(dtype).to(dot_type)
        base = head.to(tl.int64) * max_seq_length * D
        for start in tl.range(first, last, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)
            row = base + t.to(tl.int64) * D
            k_low = tl.load(k_cache_ptr + row[None, :] + d[:, None], mask=(t < last)[None, :], other=0.0)
            k_high = tl.load(k_cache_ptr + row[None, :] + d[:, None] + HALF, mask=(t < last)[None, :], other=0.0)
            v = tl.load(v_cache_ptr + row[:, None] + full[None, :], mask=(t < last)[:, None], other=0.0)
            scores = tl.dot(q_low, k_low.to(dot_type), input_precision="ieee")
            scores += tl.dot(q_high, k_high.to(dot_type), input_precision="ieee")
            scores = tl.where((t < last)[None, :], scores, float("-inf"))
            m_new = tl.maximum(m, tl.max(scores, axis=1))
            p, fade = tl.exp(scores - m_new[:, None]), tl.exp(m - m_new)
            s = s * fade + tl.sum(p, axis=1)
            p = p.to(dtype).to(dot_type)
            acc = acc * fade[:, None] + tl.dot(p, v.to(dot_type), input_precision="ieee")
            m = m_new
        if share == 0:  # the token itself: its key and value go to the cache, and take part from registers
            at_k = (HEADS + head) * D + d
            k1, k2 = tl.load(qkv_ptr + at_k), tl.load(qkv_ptr + at_k + HALF)
            v_new = tl.load(qkv_ptr + (HEADS + KV_HEADS + head) * D + full).to(dtype)
            low, high = (k1 * cos - k2 * sin).to(dtype), (k2 * cos + k1 * sin).to(dtype)
            cell, room = base + position * D, position < max_seq_length
            tl.store(k_cache_ptr + cell + d, low, mask=room & (d < HALF))
            tl.store(k_cache_ptr + cell + HALF + d, high, mask=room & (d < HALF))
            tl.store(v_cache_ptr + cell + full, v_new, mask=room & (full < D))
            score = tl.sum(q_low.to(tl.float32) * low.to(tl.float32)[None, :], axis=1)
            score += tl.sum(q_high.to(tl.float32) * high.to(tl.float32)[None, :], axis=1)
            m_new = tl.maximum(m, score)
            p, fade = tl.exp(score - m_new), tl.exp(m - m_new)
            s = s * fade + p
            acc = acc * fade[:, None] + p[:, None] * v_new.to(tl.float32)[None, :]
            m = m_new
    gdc_launch_dependents(PDL)
    cell = (head * SHARING + g) * SHARES + share
    tl.store(peak_ptr + cell, m, mask=used)
    if (first < last) | (share == 0):
        tl.store(total_ptr + cell, s, mask=used)
        tl.store(acc_ptr + cell[:, None] * D + full[None, :], acc, mask=used[:, None])


def _decode_attention_cuda(qkv, frequencies, k_cache, v_cache, input_pos, heads, window) -> tuple[Tensor, ...]:
    kv_heads, length, D = k_cache.shape
    shares = _decode_attention_fake(qkv, frequencies, k_cache, v_cache, input_pos, heads, window)
    _decode_attention_kernel[(kv_heads, shares[0].shape[1])](
        qkv, frequencies, k_cache, v_cache, input_pos, *shares, length, window, 1 / math.sqrt(D), heads, kv_heads, D,
        shares[0].shape[1], BLOCK_T, GROUP, INTERPRETED, num_warps=2, **launch_options(qkv),
    )  # fmt: skip
    return shares


def _decode_attention_fake(qkv, frequencies, k_cache, v_cache, input_pos, heads, window) -> tuple[Tensor, ...]:
    kv_heads, _, D = k_cache.shape
    shares = min(64, max(4, 1 << (PROGRAMS // kv_heads - 1).bit_length()))
    return qkv.new_empty(heads, shares, D), qkv.new_empty(heads, shares), qkv.new_empty(heads, shares)


_check = takes(
    "decode_attention",
    "k_cache [H_kv, T, D] dtype; v_cache [H_kv, T, D] dtype; qkv [(H + 2 * H_kv) * D] fp32; frequencies [D // 2] fp32;"
    " input_pos [1] int64",
    "H",
)
_decode_attention = register(
    "decode_attention",
    "(Tensor qkv, Tensor frequencies, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor input_pos, int heads, int window)"
    " -> (Tensor, Tensor, Tensor)",
    cuda=_decode_attention_cuda,
    fake=_decode_attention_fake,
)


def decode_attention(
    qkv: Tensor, frequencies: Tensor, k_cache: Tensor, v_cache: Tensor, input_pos: Tensor, heads: int, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Acc, peak and total, as above. Raises ValueError on what does not fit."""
    _check(k_cache, v_cache, qkv, frequencies, input_pos, H=heads)
    kv_heads, _, D = k_cache.shape
    if D & (D - 1) or D < 32 or heads % kv_heads or heads // kv_heads > GROUP:
        raise ValueError(f"decode_attention takes D of 32, 64 … and H / H_kv to {GROUP}, got {D}, {heads} / {kv_heads}")
    return _decode_attention(qkv, frequencies, k_cache, v_cache, input_pos, heads, window)
