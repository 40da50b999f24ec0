"""teal::widen: a weight in int8 or four-bit groups as floats, for products with many tokens.

rows [K, N] int8, or uint8 [K, row_bytes] in groups of `group` (kernels/int4.py); scale [N] fp32. Returns [K, N] in
`dtype`.
"""

from ctypes import c_int64

import torch
from torch import Tensor

from teal_fast.kernels.backend import jit, tl, triton
from teal_fast.kernels.native import library, pointer
from teal_fast.kernels.rows import bits, check_rows, load_rows, to_float

BLOCK_K, BLOCK_N = 16, 256


def widen_reference(rows: Tensor, scale: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    return (to_float(rows, len(scale), group) * scale).to(dtype)


@jit
def _widen_kernel(
    rows_ptr, scale_ptr, y_ptr, K, N, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    column = tl.program_id(1) * BLOCK_N
    n = column + tl.arange(0, BLOCK_N)
    y = load_rows(rows_ptr, k, k < K, column, N, BLOCK_N, BITS, GROUP)
    y *= tl.load(scale_ptr + n, mask=n < N, other=0.0)[None, :]
    place = k.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=(k < K)[:, None] & (n < N)[None, :])


def _widen_cuda(rows: Tensor, scale: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    y = _widen_fake(rows, scale, group, dtype)
    K, N = y.shape
    grid = (triton.cdiv(K, BLOCK_K), triton.cdiv(N, BLOCK_N))
    _widen_kernel[grid](rows, scale, y, K, N, BLOCK_K, BLOCK_N, bits(rows), group)
    return y


def _widen_cpu(rows: Tensor, scale: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    native = library()
    if native is None or dtype != torch.float32:
        return widen_reference(rows, scale, group, dtype)
    y = _widen_fake(rows, scale, group, dtype)
    native.teal_widen(
        bits(rows), *map(pointer, (rows, scale, y)), *map(c_int64, (*y.shape, group)), torch.get_num_threads()
    )
    return y


def _widen_fake(rows: Tensor, scale: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    return scale.new_empty(rows.shape[0], scale.shape[0], dtype=dtype)


torch.library.define("teal::widen", "(Tensor rows, Tensor scale, int group, ScalarType dtype) -> Tensor")
torch.library.impl("teal::widen", "CUDA", _widen_cuda)
torch.library.impl("teal::widen", "CPU", _widen_cpu)
torch.library.register_fake("teal::widen", _widen_fake)


def widen(rows: Tensor, scale: Tensor, group: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [K, N], as above. Raises ValueError on what does not fit."""
    check_rows("widen", scale, rows, scale, group)
    if not (rows.is_contiguous() and scale.is_contiguous()):
        raise ValueError("widen takes contiguous tensors, got a strided view")
    return torch.ops.teal.widen(rows, scale, group, dtype)
