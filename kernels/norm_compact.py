"""teal::norm_compact: residual add, RMSNorm, and stream compaction of what comes out by its thresholds.

residual [K] fp32; update [K] fp32, what the layer before adds, or none; norm_weight [K], whose dtype x takes; threshold
[K] fp32, in units of |x|. Returns the new residual [K] fp32 and x as a compact vector of one slot.

Every program reads all of the residual and counts the kept channels before its own slice, so that one launch makes one
contiguous list, the same every time. Compaction costs hardly more than the norm that must exist anyway.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from teal_fast.kernels.backend import gdc_launch_dependents, gdc_wait, jit, launch_options, register, tl, triton
from teal_fast.kernels.checks import takes
from teal_fast.kernels.compact_vector import CompactVector, compact_reference, empty_vector

SLICE = 128  # channels a program writes


def norm_compact_reference(
    residual: Tensor, update: Tensor | None, norm_weight: Tensor, threshold: Tensor, eps: float
) -> tuple[Tensor, CompactVector]:
    residual = residual.clone() if update is None else residual + update
    x = F.rms_norm(residual, residual.shape, norm_weight.float(), eps).to(norm_weight.dtype)
    return residual, compact_reference(x, threshold, len(x))


@jit
def _norm_compact_kernel(
    residual_ptr, update_ptr, norm_weight_ptr, threshold_ptr, out_ptr, index_ptr, value_ptr, count_ptr,
    K, eps, ADD: tl.constexpr, BLOCK_K: tl.constexpr, SLICE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    k = tl.arange(0, BLOCK_K)
    begin = tl.program_id(0) * SLICE
    own = begin + tl.arange(0, SLICE)
    dtype = norm_weight_ptr.dtype.element_ty
    norm = tl.load(norm_weight_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    norm_own = tl.load(norm_weight_ptr + own, mask=own < K, other=0.0).to(tl.float32)
    limit = tl.load(threshold_ptr + k, mask=k < K, other=0.0)
    limit_own = tl.load(threshold_ptr + own, mask=own < K, other=0.0)
    gdc_wait(PDL)
    r = tl.load(residual_ptr + k, mask=k < K, other=0.0)
    r_own = tl.load(residual_ptr + own, mask=own < K, other=0.0)
    if ADD:
        r += tl.load(update_ptr + k, mask=k < K, other=0.0)
        r_own += tl.load(update_ptr + own, mask=own < K, other=0.0)
    tl.store(out_ptr + own, r_own, mask=own < K)
    scale = tl.rsqrt(tl.sum(r * r, axis=0) / K + eps)
    x = (r * scale * norm).to(dtype)
    x_own = (r_own * scale * norm_own).to(dtype)
    dropped = tl.abs(x.to(tl.float32)) <= limit
    before = tl.sum(((dropped == 0) & (k < begin) & (k < K)).to(tl.int32), axis=0)
    kept = ((tl.abs(x_own.to(tl.float32)) <= limit_own) == 0) & (own < K)
    place = before + tl.cumsum(kept.to(tl.int32), axis=0) - 1
    gdc_launch_dependents(PDL)
    tl.store(index_ptr + place, own, mask=kept)
    tl.store(value_ptr + place, x_own, mask=kept)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(count_ptr, before + tl.sum(kept.to(tl.int32), axis=0))


def _norm_compact_cuda(
    residual: Tensor, update: Tensor | None, norm_weight: Tensor, threshold: Tensor, eps: float
) -> tuple[Tensor, ...]:
    outputs = _norm_compact_fake(residual, update, norm_weight)
    (K,) = residual.shape
    _norm_compact_kernel[(triton.cdiv(K, SLICE),)](
        residual, update, norm_weight, threshold, *outputs,
        K, eps, update is not None, triton.next_power_of_2(K), SLICE, num_warps=4, **launch_options(residual),
    )  # fmt: skip
    return outputs


def _norm_compact_fake(residual: Tensor, update: Tensor | None, norm_weight: Tensor, *_) -> tuple[Tensor, ...]:
    return torch.empty_like(residual), *empty_vector(residual, 1, residual.shape[0], norm_weight.dtype)


_check = takes("norm_compact", "residual [K] fp32; update [K] fp32 or none; norm_weight [K] dtype; threshold [K] fp32")
_norm_compact = register(
    "norm_compact",
    "(Tensor residual, Tensor? update, Tensor norm_weight, Tensor threshold, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    cuda=_norm_compact_cuda,
    fake=_norm_compact_fake,
)


def norm_compact(
    residual: Tensor, update: Tensor | None, norm_weight: Tensor, threshold: Tensor, eps: float
) -> tuple[Tensor, CompactVector]:
    """The new residual and x, as above. Raises ValueError on what does not fit."""
    _check(residual, update, norm_weight, threshold)
    residual, *x = _norm_compact(residual, update, norm_weight, threshold, eps)
    return residual, CompactVector(*x)
