"""teal::decode_attention: rotary embedding, cache update and attention of one token.

qkv [(H + 2 H_kv) D] fp32, the q, k and v projections; frequencies [D / 2] fp32; k_cache, v_cache [H_kv,
max_seq_length, D], whose row input_pos is written; input_pos [1] int64, the token's position; H heads. Grouped-query
attention over positions 0 … input_pos, the last `window` of them when window > 0; its cost follows input_pos, not
max_seq_length.

A program takes one key/value head and a share of the positions (flash decoding,
https://crfm.stanford.edu/2023/10/12/flashdecoding.html). Returns what kernels/merge_attention.py merges: acc [H,
shares, D] fp32, unnormalised sums of values, and peak, total [H, shares] fp32, the largest score and the sum of
exponentials; a share without positions has peak -inf and leaves the rest undefined.
"""

import math

import torch
from torch import Tensor

from teal_fast.kernels.backend import INTERPRETED, gdc_launch_dependents, gdc_wait, jit, launch_options, tl

BLOCK_T = 32  # positions a step; with 2 warps and 16 or 32 shares the best of a sweep on an H200, 2026-11-24
PROGRAMS = 128  # about one a multiprocessor
GROUP = 16  # rows that tl.dot wants; the heads that share a key/value head fill the first few


def decode_attention_reference(
    qkv: Tensor, frequencies: Tensor, k_cache: Tensor, v_cache: Tensor, input_pos: Tensor, heads: int, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As one share."""
    kv_heads, _, D = k_cache.shape
    position = int(input_pos)
    q, k, v = qkv.view(-1, D).split([heads, kv_heads, kv_heads])
    cos, sin = (position * frequencies).cos(), (position * frequencies).sin()

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    k_cache[:, position], v_cache[:, position] = rotate(k).to(k_cache.dtype), v.to(v_cache.dtype)
    begin = max(0, position + 1 - window) if window else 0
    keys, values = k_cache[:, begin : position + 1].float(), v_cache[:, begin : position + 1].float()
    scores = (rotate(q).view(kv_heads, -1, D) @ keys.transpose(1, 2) / math.sqrt(D)).view(heads, 1, -1)
    peak = scores.amax(-1)
    weights = (scores - peak[..., None]).exp()
    acc = weights.view(kv_heads, heads // kv_heads, -1) @ values
    return acc.view(heads, 1, D), peak, weights.sum(-1)


@jit
def _decode_attention_kernel(
    qkv_ptr, frequencies_ptr, k_cache_ptr, v_cache_ptr, input_pos_ptr, acc_ptr, peak_ptr, total_ptr,
    max_seq_length, window, scale, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr,
    SHARES: tl.constexpr, BLOCK_T: tl.constexpr, GROUP: tl.constexpr,
    UPCAST: tl.constexpr, PDL: tl.constexpr,
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
    first = begin + share * mine
    last = tl.minimum(first + mine, position)
    m = tl.full((GROUP,), float("-inf"), tl.float32)
    s = tl.zeros((GROUP,), tl.float32)
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
            p = tl.exp(scores - m_new[:, None])
            fade = tl.exp(m - m_new)
            s = s * fade + tl.sum(p, axis=1)
            p = p.to(dtype).to(dot_type)
            acc = acc * fade[:, None] + tl.dot(p, v.to(dot_type), input_precision="ieee")
            m = m_new
        if share == 0:  # the token itself: its key and value go to the cache, and take part from registers
            at_k = (HEADS + head) * D + d
            k1 = tl.load(qkv_ptr + at_k)
            k2 = tl.load(qkv_ptr + at_k + HALF)
            v_new = tl.load(qkv_ptr + (HEADS + KV_HEADS + head) * D + full).to(dtype)
            low, high = (k1 * cos - k2 * sin).to(dtype), (k2 * cos + k1 * sin).to(dtype)
            cell = base + position * D
            room = position < max_seq_length
            tl.store(k_cache_ptr + cell + d, low, mask=room & (d < HALF))
            tl.store(k_cache_ptr + cell + HALF + d, high, mask=room & (d < HALF))
            tl.store(v_cache_ptr + cell + full, v_new, mask=room & (full < D))
            score = tl.sum(q_low.to(tl.float32) * low.to(tl.float32)[None, :], axis=1)
            score += tl.sum(q_high.to(tl.float32) * high.to(tl.float32)[None, :], axis=1)
            m_new = tl.maximum(m, score)
            p = tl.exp(score - m_new)
            fade = tl.exp(m - m_new)
            s = s * fade + p
            acc = acc * fade[:, None] + p[:, None] * v_new.to(tl.float32)[None, :]
            m = m_new
    gdc_launch_dependents(PDL)
    cell = (head * SHARING + g) * SHARES + share
    tl.store(peak_ptr + cell, m, mask=used)
    if (first < last) | (share == 0):
        tl.store(total_ptr + cell, s, mask=used)
        tl.store(acc_ptr + cell[:, None] * D + full[None, :], acc, mask=used[:, None])


def _decode_attention_cuda(
    qkv: Tensor, frequencies: Tensor, k_cache: Tensor, v_cache: Tensor, input_pos: Tensor, heads: int, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    kv_heads, max_seq_length, D = k_cache.shape
    acc, peak, total = _decode_attention_fake(qkv, frequencies, k_cache, v_cache, input_pos, heads, window)
    _decode_attention_kernel[(kv_heads, peak.shape[1])](
        qkv, frequencies, k_cache, v_cache, input_pos, acc, peak, total, max_seq_length, window, 1 / math.sqrt(D),
        heads, kv_heads, D, peak.shape[1], BLOCK_T, GROUP, INTERPRETED, num_warps=2,
        **launch_options(qkv),
    )  # fmt: skip
    return acc, peak, total


def _decode_attention_fake(
    qkv: Tensor, frequencies: Tensor, k_cache: Tensor, v_cache: Tensor, input_pos: Tensor, heads: int, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    kv_heads, _, D = k_cache.shape
    shares = min(64, max(4, 1 << (PROGRAMS // kv_heads - 1).bit_length()))
    return qkv.new_empty(heads, shares, D), qkv.new_empty(heads, shares), qkv.new_empty(heads, shares)


torch.library.define(
    "teal::decode_attention",
    "(Tensor qkv, Tensor frequencies, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor input_pos, int heads, int window)"
    " -> (Tensor, Tensor, Tensor)",
)
torch.library.impl("teal::decode_attention", "CUDA", _decode_attention_cuda)
torch.library.register_fake("teal::decode_attention", _decode_attention_fake)


def decode_attention(
    qkv: Tensor, frequencies: Tensor, k_cache: Tensor, v_cache: Tensor, input_pos: Tensor, heads: int, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Acc, peak and total, as above. Raises ValueError on what does not fit."""
    kv_heads, _, D = k_cache.shape
    if qkv.shape != ((heads + 2 * kv_heads) * D,) or v_cache.shape != k_cache.shape or heads % kv_heads:
        shapes = [list(t.shape) for t in (qkv, k_cache, v_cache)]
        raise ValueError(f"decode_attention takes qkv [(H + 2 H_kv) D] and caches [H_kv, T, D], got {shapes}")
    if D & (D - 1) or D < 32 or heads // kv_heads > GROUP or frequencies.shape != (D // 2,):
        raise ValueError(f"decode_attention takes heads of 32, 64, 128 … channels, up to {GROUP} a group, got {D}")
    if qkv.dtype != torch.float32 or input_pos.dtype != torch.int64 or k_cache.dtype != v_cache.dtype:
        raise ValueError("decode_attention takes fp32 qkv, int64 input_pos and caches of one dtype")
    if not all(t.is_contiguous() for t in (qkv, frequencies, k_cache, v_cache)):
        raise ValueError("decode_attention takes contiguous tensors, got a strided view")
    return torch.ops.teal.decode_attention(qkv, frequencies, k_cache, v_cache, input_pos, heads, window)
