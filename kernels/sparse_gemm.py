"""teal::sparse_gemm: y = (x ⊙ 1[|x| > t]) W + bias for the tokens of several sequences, each with a mask of its own.

x [M, K]; the weight [K, N], threshold [K] and bias [N] are as in sparse_gemv.py; y [M, N] in x's dtype, accumulated in
fp32. What is read are the rows that any token keeps, once for all tokens: a token's dropped channels count zero times
their rows. At sparsity s and independent masks that is a share 1 - s ** M of the weight. It is for CPUs: on CUDA the
dense product of masked inputs was faster from 2 tokens on.
"""

from ctypes import c_int64

import torch
from torch import Tensor

from teal_fast.kernels.backend import register
from teal_fast.kernels.checks import takes
from teal_fast.kernels.native import TYPES, library, pointer
from teal_fast.kernels.packed import WEIGHT_ARGUMENTS, WEIGHT_TABLE, PackedWeight, bits, check_weight
from teal_fast.kernels.sparse_gemv import finish

MOST_TOKENS = 16  # of a call


def sparse_gemm_reference(x: Tensor, weight: PackedWeight, threshold: Tensor, bias: Tensor | None = None) -> Tensor:
    y = x.float().masked_fill(x.float().abs() <= threshold, 0) @ weight.values()
    return finish(y, bias, weight.scale).to(x.dtype)


def _sparse_gemm_cpu(x, packed, scale, group, threshold, bias) -> Tensor:
    if (native := library()) is None or x.dtype not in TYPES:
        return _sparse_gemm_torch(x, PackedWeight(packed, scale, group), threshold, bias)
    y = x.new_empty(len(x), packed.shape[1] if scale is None else len(scale))
    native.teal_sparse_gemm(
        TYPES[x.dtype], bits(packed), *map(pointer, (x, packed, threshold, scale, bias, y)),
        *map(c_int64, (*x.shape, y.shape[1], group)), torch.get_num_threads(),
    )  # fmt: skip
    return y


def _sparse_gemm_torch(x: Tensor, weight: PackedWeight, threshold: Tensor, bias: Tensor | None = None) -> Tensor:
    dropped = x.abs() <= threshold
    taken = dropped.all(0).logical_not_().nonzero().squeeze(1)
    y = x.masked_fill(dropped, 0)[:, taken].float() @ weight.values(taken)
    return finish(y, bias, weight.scale).to(x.dtype)


_check = takes("sparse_gemm", f"x [M, K] dtype; {WEIGHT_TABLE}; threshold [K] fp32; bias [N] dtype or none", "N")
_sparse_gemm = register(
    "sparse_gemm",
    f"(Tensor x, {WEIGHT_ARGUMENTS}, Tensor threshold, Tensor? bias) -> Tensor",
    cuda=_sparse_gemm_torch,
    cpu=_sparse_gemm_cpu,
    fake=lambda x, weight, threshold, bias: x.new_empty(x.shape[0], weight.N),
    bundle=lambda f: lambda x, *flat: f(x, PackedWeight(*flat[:3]), *flat[3:]),
)


def sparse_gemm(x: Tensor, weight: PackedWeight, threshold: Tensor, bias: Tensor | None = None) -> Tensor:
    """y [M, N], as above. Raises ValueError on what does not fit."""
    _check(x, *weight[:2], threshold, bias, N=check_weight("sparse_gemm", weight, x.dtype))
    if not 0 < len(x) <= MOST_TOKENS:
        raise ValueError(f"sparse_gemm takes 1 to {MOST_TOKENS} tokens, got {len(x)}")
    return _sparse_gemm(x, *weight, threshold, bias)
