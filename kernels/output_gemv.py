"""teal::output_gemv: logits of one token by an output layer in int8, a dense GEMV.

x [K]; weight [V, K] int8, a vocabulary entry a contiguous row; scale [V] fp32. y [V] fp32 = scale ⊙ (weight x). On the
CPU x is rounded to 16-bit fixed point first (csrc/quantized.h), and sums are exact.
"""

from ctypes import c_int64

import torch
from torch import Tensor

from teal_fast.kernels.backend import (
    gdc_launch_dependents,
    gdc_wait,
    jit,
    launch_options,
    offset_type,
    register,
    tl,
    triton,
)
from teal_fast.kernels.checks import takes
from teal_fast.kernels.native import TYPES, library, pointer

BLOCK_V, BLOCK_K, WARPS = 8, 2048, 4  # 128,256 x 4,096 on an H200: 84 % of the read rate, as (4, 4096, 4) and others


def output_gemv_reference(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return (weight.float() @ x.float()) * scale


@jit
def _output_gemv_kernel(
    x_ptr, weight_ptr, scale_ptr, y_ptr, V, K, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, OFFSET: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    row = weight_ptr + v.to(OFFSET)[:, None] * K
    y = tl.zeros((BLOCK_V,), dtype=tl.float32)
    gdc_wait(PDL)
    for begin in tl.range(0, K, BLOCK_K, num_stages=1):
        k = begin + tl.arange(0, BLOCK_K)
        mask = (v < V)[:, None] & (k < K)[None, :]
        w = tl.load(row + k[None, :], mask=mask, other=0, eviction_policy="evict_first")
        x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        y += tl.sum(w.to(tl.float32) * x[None, :], axis=1)
    gdc_launch_dependents(PDL)
    tl.store(y_ptr + v, y * tl.load(scale_ptr + v, mask=v < V, other=0.0), mask=v < V)


def _output_gemv_cuda(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    y = torch.empty_like(scale)
    V, K = weight.shape
    _output_gemv_kernel[(triton.cdiv(V, BLOCK_V),)](
        x, weight, scale, y, V, K, BLOCK_V, BLOCK_K, offset_type(weight), num_warps=WARPS, **launch_options(weight)
    )
    return y


def _output_gemv_cpu(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    native = library()
    if native is None or x.dtype not in TYPES:
        return output_gemv_reference(x, weight, scale)
    y = torch.empty_like(scale)
    native.teal_output_gemv(
        TYPES[x.dtype], *map(pointer, (x, weight, scale, y)), *map(c_int64, weight.shape), torch.get_num_threads()
    )
    return y


_check = takes("output_gemv", "x [K] dtype; weight [V, K] int8; scale [V] fp32")
_output_gemv = register(
    "output_gemv",
    "(Tensor x, Tensor weight, Tensor scale) -> Tensor",
    cuda=_output_gemv_cuda,
    cpu=_output_gemv_cpu,
    fake=lambda x, weight, scale: torch.empty_like(scale),
)


def output_gemv(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """y [V] fp32, as above. Raises ValueError on what does not fit."""
    _check(x, weight, scale)
    return _output_gemv(x, weight, scale)
