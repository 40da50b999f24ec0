"""teal::add_norm: residual add and RMSNorm of a few tokens.

residual [T, K] fp32; update [T, K], what the layer before adds, or none, in the dtype of norm_weight [K]. Returns the
new residual [T, K] fp32 and its norm [T, K] in that dtype. A program takes a token, whose bits are its own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from teal_fast.kernels.backend import gdc_launch_dependents, gdc_wait, jit, launch_options, register, tl, triton
from teal_fast.kernels.checks import takes


def add_norm_reference(
    residual: Tensor, update: Tensor | None, norm_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    residual = residual.clone() if update is None else residual + update.float()
    return residual, F.rms_norm(residual, residual.shape[1:], norm_weight.float(), eps).to(norm_weight.dtype)


@jit
def _add_norm_kernel(
    residual_ptr, update_ptr, norm_weight_ptr, out_ptr, x_ptr, K, eps, ADD: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    k = tl.arange(0, BLOCK_K)
    norm = tl.load(norm_weight_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    at = tl.program_id(0) * K + k
    gdc_launch_dependents(PDL)  # whose first weights then come meanwhile
    gdc_wait(PDL)
    r = tl.load(residual_ptr + at, mask=k < K, other=0.0)
    if ADD:
        r += tl.load(update_ptr + at, mask=k < K, other=0.0).to(tl.float32)
    x = r * tl.rsqrt(tl.sum(r * r, axis=0) / K + eps) * norm
    tl.store(out_ptr + at, r, mask=k < K)
    tl.store(x_ptr + at, x.to(x_ptr.dtype.element_ty), mask=k < K)


def _add_norm_cuda(residual: Tensor, update: Tensor | None, norm_weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out, x = _add_norm_fake(residual, update, norm_weight, eps)
    T, K = residual.shape
    block = triton.next_power_of_2(K)
    _add_norm_kernel[(T,)](
        residual, update, norm_weight, out, x, K, eps, update is not None, block,
        num_warps=max(4, min(16, block // 256)), **launch_options(residual),
    )  # fmt: skip
    return out, x


def _add_norm_fake(residual: Tensor, update: Tensor | None, norm_weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(residual), torch.empty_like(residual, dtype=norm_weight.dtype)


_check = takes("add_norm", "residual [T, K] fp32; norm_weight [K] dtype; update [T, K] dtype or none")
_add_norm = register(
    "add_norm",
    "(Tensor residual, Tensor? update, Tensor norm_weight, float eps) -> (Tensor, Tensor)",
    cuda=_add_norm_cuda,
    fake=_add_norm_fake,
)


def add_norm(residual: Tensor, update: Tensor | None, norm_weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The new residual and its norm, as above. Raises ValueError on what does not fit."""
    _check(residual, norm_weight, update)
    return _add_norm(residual, update, norm_weight, eps)
