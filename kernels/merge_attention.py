"""teal::merge_attention: the second half of flash decoding: one token's attention output, merged and compacted.

acc [H, S, D], peak and total [H, S] fp32, of S shares: kernels/decode_attention.py; threshold [H D] fp32, in units of
the output's size; the output is rounded to `dtype`. Returns it as a compact vector, one slot a head. Shares are added
in a fixed order.
"""

import torch
from torch import Tensor

from teal_fast.kernels.backend import gdc_launch_dependents, gdc_wait, jit, launch_options, register, tl
from teal_fast.kernels.checks import takes
from teal_fast.kernels.compact_vector import CompactVector, compact_reference, empty_vector


def merge_attention_reference(
    acc: Tensor, peak: Tensor, total: Tensor, threshold: Tensor, dtype: torch.dtype
) -> CompactVector:
    weight = (peak - peak.amax(-1, keepdim=True)).exp()
    acc, total = acc.masked_fill((weight == 0)[..., None], 0), total.masked_fill(weight == 0, 0)
    y = ((acc * weight[..., None]).sum(1) / (total * weight).sum(1, keepdim=True)).to(dtype)
    return compact_reference(y.flatten(), threshold, y.shape[1])


@jit
def _merge_attention_kernel(
    acc_ptr, peak_ptr, total_ptr, threshold_ptr, index_ptr, value_ptr, count_ptr,
    D: tl.constexpr, SHARES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    channel = head * D + tl.arange(0, D)
    limit = tl.load(threshold_ptr + channel)
    gdc_wait(PDL)
    cell = head * SHARES + tl.arange(0, SHARES)
    m = tl.load(peak_ptr + cell)
    weight = tl.exp(m - tl.max(m, axis=0))  # 0 for shares that had no position and left no sums
    s = tl.load(total_ptr + cell, mask=weight > 0, other=0.0)
    at = cell[:, None] * D + tl.arange(0, D)[None, :]
    acc = tl.load(acc_ptr + at, mask=(weight > 0)[:, None], other=0.0)
    y = (tl.sum(acc * weight[:, None], axis=0) / tl.sum(s * weight, axis=0)).to(value_ptr.dtype.element_ty)
    kept = (tl.abs(y.to(tl.float32)) <= limit) == 0
    place = head * D + tl.cumsum(kept.to(tl.int32), axis=0) - 1
    gdc_launch_dependents(PDL)
    tl.store(index_ptr + place, channel, mask=kept)
    tl.store(value_ptr + place, y, mask=kept)
    tl.store(count_ptr + head, tl.sum(kept.to(tl.int32), axis=0))


def _merge_attention_cuda(
    acc: Tensor, peak: Tensor, total: Tensor, threshold: Tensor, dtype: torch.dtype
) -> CompactVector:
    y = _merge_attention_fake(acc, peak, total, threshold, dtype)
    heads, shares, D = acc.shape
    _merge_attention_kernel[(heads,)](acc, peak, total, threshold, *y, D, shares, num_warps=1, **launch_options(acc))
    return y


def _merge_attention_fake(acc: Tensor, *rest) -> CompactVector:
    return empty_vector(acc, acc.shape[0], acc.shape[2], rest[-1])


_check = takes("merge_attention", "acc [H, S, D] fp32; peak [H, S] fp32; total [H, S] fp32; threshold [H * D] fp32")
_merge_attention = register(
    "merge_attention",
    "(Tensor acc, Tensor peak, Tensor total, Tensor threshold, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    cuda=_merge_attention_cuda,
    fake=_merge_attention_fake,
)


def merge_attention(acc: Tensor, peak: Tensor, total: Tensor, threshold: Tensor, dtype: torch.dtype) -> CompactVector:
    """The output, as above. Raises ValueError on what does not fit."""
    _check(acc, peak, total, threshold)
    _, S, D = acc.shape
    if D & (D - 1) or S & (S - 1):
        raise ValueError(f"merge_attention takes S and D that are powers of two, got {S} and {D}")
    return CompactVector(*_merge_attention(acc, peak, total, threshold, dtype))
