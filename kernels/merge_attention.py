"""teal::merge_attention: one token's attention output from the shares of kernels/decode_attention.py, compacted.

acc [H, shares, D], peak and total [H, shares] fp32; threshold [H D] fp32 for the output, which is rounded to `dtype`.
Returns the output in slots, one a head, as kernels/compact_gemv.py takes them: index [H, D] int32, value [H, D], count
[H] int32, the kept channels of each from the left. Shares are added in a fixed order.
"""

import torch
from torch import Tensor

from teal_fast.kernels.backend import gdc_launch_dependents, gdc_wait, jit, launch_options, tl


def merge_attention_reference(
    acc: Tensor, peak: Tensor, total: Tensor, threshold: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    weight = (peak - peak.amax(-1, keepdim=True)).exp()
    acc, total = acc.masked_fill((weight == 0)[..., None], 0), total.masked_fill(weight == 0, 0)
    y = ((acc * weight[..., None]).sum(1) / (total * weight).sum(1, keepdim=True)).to(dtype)
    index, value, count = _merge_attention_fake(acc, peak, total, threshold, dtype)
    for head, (row, limit) in enumerate(zip(y, threshold.view(y.shape), strict=True)):
        kept = (row.abs() <= limit).logical_not().nonzero().squeeze(1)
        index[head, : len(kept)], value[head, : len(kept)] = head * len(row) + kept, row[kept]
        count[head] = len(kept)
    return index, value, count


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
) -> tuple[Tensor, Tensor, Tensor]:
    index, value, count = _merge_attention_fake(acc, peak, total, threshold, dtype)
    heads, shares, D = acc.shape
    _merge_attention_kernel[(heads,)](
        acc, peak, total, threshold, index, value, count, D, shares, num_warps=1, **launch_options(acc)
    )
    return index, value, count


def _merge_attention_fake(
    acc: Tensor, peak: Tensor, total: Tensor, threshold: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    heads, _, D = acc.shape
    index = acc.new_empty(heads, D, dtype=torch.int32)
    return index, acc.new_empty(heads, D, dtype=dtype), index.new_empty(heads)


torch.library.define(
    "teal::merge_attention",
    "(Tensor acc, Tensor peak, Tensor total, Tensor threshold, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
)
torch.library.impl("teal::merge_attention", "CUDA", _merge_attention_cuda)
torch.library.register_fake("teal::merge_attention", _merge_attention_fake)


def merge_attention(
    acc: Tensor, peak: Tensor, total: Tensor, threshold: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Index, value and count, as above. Raises ValueError on what does not fit."""
    heads, shares, D = acc.shape
    if peak.shape != (heads, shares) or total.shape != peak.shape or threshold.shape != (heads * D,):
        shapes = [list(t.shape) for t in (acc, peak, total, threshold)]
        raise ValueError(f"merge_attention takes acc [H, S, D], peak, total [H, S], threshold [H D], got {shapes}")
    if D & (D - 1) or shares & (shares - 1):
        raise ValueError(f"merge_attention takes shares and channels that are powers of two, got {shares} and {D}")
    return torch.ops.teal.merge_attention(acc, peak, total, threshold, dtype)
