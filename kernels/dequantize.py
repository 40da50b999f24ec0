"""teal::dequantize: a weight in int8 or four-bit groups as floats, for products with many tokens.

weight [K, N] in int8, or in four-bit groups of `group` (kernels/int4.py), with its scale [N] fp32. Returns its columns
from `begin` to before `end`, [K, end - begin], in `dtype`; both are multiples of 32, or `end` is N.
"""

from ctypes import c_int64

import torch
from torch import Tensor

from teal_fast.kernels.backend import jit, register, tl, triton
from teal_fast.kernels.checks import takes
from teal_fast.kernels.native import TYPES, library, pointer
from teal_fast.kernels.packed import WEIGHT_ARGUMENTS, WEIGHT_TABLE, PackedWeight, check_weight, load_rows

BLOCK_K, BLOCK_N = 16, 256
WHOLE = 32  # columns: four-bit values lie in pairs of sixteens


def dequantize_reference(weight: PackedWeight, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    return (weight.values() * weight.scale)[:, begin:end].to(dtype)


@jit
def _dequantize_kernel(
    packed_ptr, scale_ptr, y_ptr, K, N, begin, end, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    column = begin + tl.program_id(1) * BLOCK_N
    n = column + tl.arange(0, BLOCK_N)
    y = load_rows(packed_ptr, k, k < K, column, N, BLOCK_N, BITS, GROUP)
    y *= tl.load(scale_ptr + n, mask=n < N, other=0.0)[None, :]
    place = k.to(tl.int64)[:, None] * (end - begin) + (n - begin)[None, :]
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=(k < K)[:, None] & (n < end)[None, :])


def _dequantize_cuda(weight: PackedWeight, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    y = _dequantize_fake(weight, begin, end, dtype)
    K, columns = y.shape
    grid = (triton.cdiv(K, BLOCK_K), triton.cdiv(columns, BLOCK_N))
    _dequantize_kernel[grid](
        weight.packed, weight.scale, y, K, weight.N, begin, end, BLOCK_K, BLOCK_N, weight.bits, weight.group
    )
    return y


def _dequantize_cpu(packed, scale, group, begin, end, dtype) -> Tensor:
    native, weight = library(), PackedWeight(packed, scale, group)
    if native is None:
        return dequantize_reference(weight, begin, end, dtype)
    y = _dequantize_fake(weight, begin, end, dtype)
    sizes = map(c_int64, (len(packed), weight.N, group, begin, end - begin))
    native.teal_dequantize(
        TYPES[dtype], weight.bits, *map(pointer, (packed, scale, y)), *sizes, torch.get_num_threads()
    )
    return y


def _dequantize_fake(weight: PackedWeight, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    return weight.scale.new_empty(weight.packed.shape[0], end - begin, dtype=dtype)


_check = takes("dequantize", WEIGHT_TABLE, "N")
_dequantize = register(
    "dequantize",
    f"({WEIGHT_ARGUMENTS}, int begin, int end, ScalarType dtype) -> Tensor",
    cuda=_dequantize_cuda,
    cpu=_dequantize_cpu,
    fake=_dequantize_fake,
    bundle=lambda f: lambda *flat: f(PackedWeight(*flat[:3]), *flat[3:]),
)


def dequantize(weight: PackedWeight, begin: int, end: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Columns of the weight [K, end - begin], as above. Raises ValueError on what does not fit."""
    _check(*weight[:2], N=check_weight("dequantize", weight, None))
    if not 0 <= begin < end <= weight.N or begin % WHOLE or (end % WHOLE and end < weight.N):
        raise ValueError(f"dequantize takes columns of {weight.N} by multiples of {WHOLE}, got {begin} to {end}")
    return _dequantize(*weight, begin, end, dtype)
