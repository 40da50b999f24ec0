"""teal::merge_spans: the second half of a few tokens' attention: the sums of spans, merged.

acc [S, T, H, D], peak and total [S, T, H] fp32 over SPAN positions each, as verify_attention.py leaves them; positions
[T] int64, window: 0 for all positions. y [T, H D] in `dtype`. Spans are added in steps that lie at fixed places.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from teal_fast.kernels.backend import gdc_launch_dependents, gdc_wait, jit, launch_options, register, tl
from teal_fast.kernels.checks import takes
from teal_fast.kernels.verify_attention import SPAN

STEP = 16  # spans


def attention_reference(
    qkv, turn, positions, k_cache, v_cache, q_norm, k_norm, heads: int, window: int, eps: float
) -> Tensor:
    """y [T, H D] fp32 of verify_attention's arguments, whose caches are written as well."""
    (kv_heads, length, D), (cos, sin) = k_cache.shape, turn[:, :, None]
    q, k, v = qkv.float().view(len(qkv), -1, D).split([heads, kv_heads, kv_heads], dim=1)
    if q_norm is not None:
        q, k = F.rms_norm(q, (D,), q_norm.float(), eps), F.rms_norm(k, (D,), k_norm.float(), eps)
    q, k = (torch.cat((a * cos - b * sin, b * cos + a * sin), -1) for a, b in (x.chunk(2, dim=-1) for x in (q, k)))
    k_cache[:, positions] = k.to(k_cache.dtype).transpose(0, 1)
    v_cache[:, positions] = v.to(v_cache.dtype).transpose(0, 1)
    at, place = torch.arange(length, device=qkv.device), positions[:, None]
    seen = (at <= place) & ((at > place - window) if window else True)
    keys, values = (x.float().nan_to_num().repeat_interleave(heads // kv_heads, 0) for x in (k_cache, v_cache))
    y = F.scaled_dot_product_attention(q.transpose(0, 1), keys, values, attn_mask=seen)
    return y.transpose(0, 1).reshape(len(qkv), -1)


@jit
def _merge_spans_kernel(
    acc_ptr, peak_ptr, total_ptr, positions_ptr, y_ptr, window, T: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    SPAN: tl.constexpr, STEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token, head, d = tl.program_id(0), tl.program_id(1), tl.arange(0, D)
    gdc_launch_dependents(PDL)  # whose first weights then come meanwhile
    position = tl.load(positions_ptr + token)  # which no launch of the pass writes
    gdc_wait(PDL)
    first, last = tl.where(window > 0, tl.maximum(position + 1 - window, 0), 0) // SPAN, position // SPAN
    m, s, acc = tl.full((1,), float("-inf"), tl.float32), tl.zeros((1,), tl.float32), tl.zeros((D,), tl.float32)
    for start in tl.range(first // STEP * STEP, last + 1, STEP):
        span = start + tl.arange(0, STEP)
        there = (span >= first) & (span <= last)
        cell = (span * T + token) * HEADS + head
        peak = tl.load(peak_ptr + cell, mask=there, other=float("-inf"))
        m_new = tl.maximum(m, tl.max(peak, axis=0))
        weight, fade = tl.exp(peak - m_new), tl.exp(m - m_new)
        s = s * fade + tl.sum(tl.load(total_ptr + cell, mask=there, other=0.0) * weight, axis=0)
        part = tl.load(acc_ptr + cell[:, None] * D + d[None, :], mask=there[:, None], other=0.0)
        acc = acc * fade + tl.sum(part * weight[:, None], axis=0)
        m = m_new
    tl.store(y_ptr + (token * HEADS + head) * D + d, (acc / s).to(y_ptr.dtype.element_ty))


def _merge_spans_cuda(acc: Tensor, peak: Tensor, total: Tensor, positions: Tensor, window: int, dtype) -> Tensor:
    y, (_, T, heads, D) = _merge_spans_fake(acc, peak, total, positions, window, dtype), acc.shape
    _merge_spans_kernel[(T, heads)](
        acc, peak, total, positions, y, window, T, heads, D, SPAN, STEP, num_warps=4, **launch_options(acc)
    )
    return y


def _merge_spans_fake(acc: Tensor, peak: Tensor, total: Tensor, positions: Tensor, window: int, dtype) -> Tensor:
    return acc.new_empty(acc.shape[1], acc.shape[2] * acc.shape[3], dtype=dtype)


_check = takes("merge_spans", "acc [S, T, H, D] fp32; peak [S, T, H] fp32; total [S, T, H] fp32; positions [T] int64")
_merge_spans = register(
    "merge_spans",
    "(Tensor acc, Tensor peak, Tensor total, Tensor positions, int window, ScalarType dtype) -> Tensor",
    cuda=_merge_spans_cuda,
    fake=_merge_spans_fake,
)


def merge_spans(acc: Tensor, peak: Tensor, total: Tensor, positions: Tensor, window: int, dtype: torch.dtype) -> Tensor:
    """y [T, H D], as above. Raises ValueError on what does not fit."""
    _check(acc, peak, total, positions)
    return _merge_spans(acc, peak, total, positions, window, dtype)
