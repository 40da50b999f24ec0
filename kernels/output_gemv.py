"""teal::output_gemv: logits of one token by an output layer in int8, which reads every row.

x [K]; rows [V, K] int8, a vocabulary entry a contiguous row; scale [V] fp32. y [V] fp32 = scale ⊙ (rows x). On the CPU
x is rounded to 16-bit fixed point first (csrc/quantized.h), and sums are exact.
"""

from ctypes import c_int64

import torch
from torch import Tensor

from teal_fast.kernels.backend import gdc_launch_dependents, gdc_wait, jit, launch_options, offset_type, tl, triton
from teal_fast.kernels.native import TYPES, library, pointer

BLOCK_V, BLOCK_K, WARPS = 8, 2048, 4  # 128,256 x 4,096 on an H200: 84 % of the read rate, as (4, 4096, 4) and others


def output_gemv_reference(x: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    return (rows.float() @ x.float()) * scale


@jit
def _output_gemv_kernel(
    x_ptr, rows_ptr, scale_ptr, y_ptr, V, K, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, OFFSET: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    row = rows_ptr + v.to(OFFSET)[:, None] * K
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


def _output_gemv_cuda(x: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    y = torch.empty_like(scale)
    V, K = rows.shape
    _output_gemv_kernel[(triton.cdiv(V, BLOCK_V),)](
        x, rows, scale, y, V, K, BLOCK_V, BLOCK_K, offset_type(rows), num_warps=WARPS, **launch_options(rows)
    )
    return y


def _output_gemv_cpu(x: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    native = library()
    if native is None or x.dtype not in TYPES:
        return output_gemv_reference(x, rows, scale)
    y = torch.empty_like(scale)
    native.teal_output_gemv(
        TYPES[x.dtype], *map(pointer, (x, rows, scale, y)), *map(c_int64, rows.shape), torch.get_num_threads()
    )
    return y


def _output_gemv_fake(x: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(scale)


torch.library.define("teal::output_gemv", "(Tensor x, Tensor rows, Tensor scale) -> Tensor")
torch.library.impl("teal::output_gemv", "CUDA", _output_gemv_cuda)
torch.library.impl("teal::output_gemv", "CPU", _output_gemv_cpu)
torch.library.register_fake("teal::output_gemv", _output_gemv_fake)


def output_gemv(x: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    """y [V] fp32, as above. Raises ValueError on what does not fit."""
    if rows.ndim != 2 or x.shape != rows.shape[1:] or scale.shape != rows.shape[:1]:
        shapes = [list(t.shape) for t in (x, rows, scale)]
        raise ValueError(f"output_gemv takes x [K], rows [V, K], scale [V], got {shapes}")
    if not x.is_floating_point() or rows.dtype != torch.int8 or scale.dtype != torch.float32:
        raise ValueError(f"output_gemv takes int8 rows and an fp32 scale, got {rows.dtype}, {scale.dtype}")
    if not all(t.is_contiguous() for t in (x, rows, scale)):
        raise ValueError("output_gemv takes contiguous tensors, got a strided view")
    return torch.ops.teal.output_gemv(x, rows, scale)
