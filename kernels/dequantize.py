"""teal::dequantize: a weight in int8 or four-bit groups as floats, for products with many tokens.

weight [K, N] in int8, or in four-bit groups of `group` (kernels/int4.py), with its scale [N] fp32. Returns [K, N] in
`dtype`.
"""

from ctypes import c_int64

import torch
from torch import Tensor

from teal_fast.kernels.backend import jit, register, tl, triton
from teal_fast.kernels.checks import takes
from teal_fast.kernels.native import library, pointer
from teal_fast.kernels.packed import WEIGHT_ARGUMENTS, WEIGHT_TABLE, PackedWeight, bits, check_weight, load_rows

BLOCK_K, BLOCK_N = 16, 256


def dequantize_reference(weight: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    return (weight.values() * weight.scale).to(dtype)


@jit
def _dequantize_kernel(
    packed_ptr, scale_ptr, y_ptr, K, N, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    column = tl.program_id(1) * BLOCK_N
    n = column + tl.arange(0, BLOCK_N)
    y = load_rows(packed_ptr, k, k < K, column, N, BLOCK_N, BITS, GROUP)
    y *= tl.load(scale_ptr + n, mask=n < N, other=0.0)[None, :]
    place = k.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=(k < K)[:, None] & (n < N)[None, :])


def _dequantize_cuda(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    y = _dequantize_fake(weight, dtype)
    K, N = y.shape
    grid = (triton.cdiv(K, BLOCK_K), triton.cdiv(N, BLOCK_N))
    _dequantize_kernel[grid](weight.packed, weight.scale, y, K, N, BLOCK_K, BLOCK_N, weight.bits, weight.group)
    return y


def _dequantize_cpu(packed, scale, group, dtype) -> Tensor:
    native = library()
    if native is None or dtype != torch.float32:
        return dequantize_reference(PackedWeight(packed, scale, group), dtype)
    K, N = len(packed), len(scale)
    y = scale.new_empty(K, N)
    native.teal_dequantize(
        bits(packed), *map(pointer, (packed, scale, y)), *map(c_int64, (K, N, group)), torch.get_num_threads()
    )
    return y


def _dequantize_fake(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    return weight.scale.new_empty(weight.packed.shape[0], weight.N, dtype=dtype)


_check = takes("dequantize", WEIGHT_TABLE, "N")
_dequantize = register(
    "dequantize",
    f"({WEIGHT_ARGUMENTS}, ScalarType dtype) -> Tensor",
    cuda=_dequantize_cuda,
    cpu=_dequantize_cpu,
    fake=_dequantize_fake,
    bundle=lambda f: lambda *flat: f(PackedWeight(*flat[:3]), flat[3]),
)


def dequantize(weight: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [K, N], as above. Raises ValueError on what does not fit."""
    _check(*weight[:2], N=check_weight("dequantize", weight, None))
    return _dequantize(*weight, dtype)
