"""teal::output_gemm: logits of a few tokens by an output layer.

x [T, K]; weight [V, K] in x's dtype, or int8 with scale [V] fp32; a vocabulary entry is a contiguous row. y [T, V] fp32
= x weight^T, each logit times its scale. A program takes some logits of all tokens; a token's bits are its own.
"""

import torch
from torch import Tensor

from teal_fast.kernels.backend import (
    INTERPRETED,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    launch_options,
    register,
    tl,
    triton,
)
from teal_fast.kernels.checks import takes

TOKENS = 16  # that tl.dot wants at least; fewer fill the first columns
BLOCK_V, BLOCK_K, WARPS, STAGES = 64, 128, 4, 4


def output_gemm_reference(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    y = x.float() @ weight.float().t()
    return y if scale is None else y * scale


@jit
def _output_gemm_kernel(
    x_ptr, weight_ptr, scale_ptr, y_ptr, T, V, K, SCALED: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
    TOKENS: tl.constexpr, STAGES: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    v, t = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V), tl.arange(0, TOKENS)
    dtype = tl.float32 if UPCAST else x_ptr.dtype.element_ty  # Triton's interpreter cannot multiply bf16
    row = weight_ptr + v.to(tl.int64)[:, None] * K
    y = tl.zeros((BLOCK_V, TOKENS), tl.float32)
    gdc_wait(PDL)
    for begin in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = begin + tl.arange(0, BLOCK_K)
        w = tl.load(row + k[None, :], mask=(v < V)[:, None] & (k < K)[None, :], other=0)
        x = tl.load(x_ptr + t[None, :] * K + k[:, None], mask=(t < T)[None, :] & (k < K)[:, None], other=0.0)
        y += tl.dot(w.to(dtype), x.to(dtype), input_precision="ieee")
    if SCALED:
        y *= tl.load(scale_ptr + v, mask=v < V, other=0.0)[:, None]
    gdc_launch_dependents(PDL)
    tl.store(y_ptr + t[None, :].to(tl.int64) * V + v[:, None], y, mask=(t < T)[None, :] & (v < V)[:, None])


def _output_gemm_cuda(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    y, (T, K), V = _output_gemm_fake(x, weight, scale), x.shape, weight.shape[0]
    _output_gemm_kernel[(triton.cdiv(V, BLOCK_V),)](
        x, weight, scale, y, T, V, K, scale is not None, BLOCK_V, BLOCK_K, TOKENS, STAGES, INTERPRETED,
        num_warps=WARPS, **launch_options(x),
    )  # fmt: skip
    return y


def _output_gemm_fake(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)


_check = takes("output_gemm", "x [T, K] dtype; weight [V, K]; scale [V] fp32 or none")
_output_gemm = register(
    "output_gemm",
    "(Tensor x, Tensor weight, Tensor? scale) -> Tensor",
    cuda=_output_gemm_cuda,
    fake=_output_gemm_fake,
)


def output_gemm(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """y [T, V] fp32, as above. Raises ValueError on what does not fit."""
    _check(x, weight, scale)
    if len(x) > TOKENS or weight.dtype != (x.dtype if scale is None else torch.int8):
        found = f"{len(x)} tokens, weight {weight.dtype}"
        raise ValueError(f"output_gemm takes up to {TOKENS} tokens, a weight in their dtype or in int8, got {found}")
    return _output_gemm(x, weight, scale)
