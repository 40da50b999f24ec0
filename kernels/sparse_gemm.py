"""teal::sparse_gemm: y = (x ⊙ 1[|x| > t]) W + bias for the tokens of several sequences, each with a mask of its own.

x [M, K]; the weight [K, N], threshold [K] and bias [N] are as in sparse_gemv.py; y [M, N] in x's dtype, accumulated in
fp32. What is read are the rows that any token keeps, once for all tokens: a token's dropped channels count zero times
their rows. At sparsity s and independent masks that is a share 1 - s ** M of the weight.
"""

from ctypes import c_int64

import torch
from torch import Tensor

from teal_fast.kernels.backend import INTERPRETED, jit, register, tl, triton
from teal_fast.kernels.checks import takes
from teal_fast.kernels.native import TYPES, library, pointer
from teal_fast.kernels.packed import WEIGHT_ARGUMENTS, WEIGHT_TABLE, PackedWeight, bits, check_weight, load_rows
from teal_fast.kernels.sparse_gemv import finish

MOST_TOKENS = 16  # of a call
SMALLEST_TILE = 16  # tokens that tl.dot wants at least
BLOCK_K, BLOCK_N, SPLITS = 32, 128, 8  # untuned


def sparse_gemm_reference(x: Tensor, weight: PackedWeight, threshold: Tensor, bias: Tensor | None = None) -> Tensor:
    y = x.float().masked_fill(x.float().abs() <= threshold, 0) @ weight.values()
    return finish(y, bias, weight.scale).to(x.dtype)


@jit
def _sparse_gemm_kernel(
    x_ptr, packed_ptr, threshold_ptr, partial_ptr, M, K, N, mine, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    split, column = tl.program_id(0), tl.program_id(1) * BLOCK_N
    m, n = tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    dot_type = tl.float32 if UPCAST else x_ptr.dtype.element_ty  # Triton's interpreter cannot multiply bf16
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for begin in tl.range(split * mine, tl.minimum(split * mine + mine, K), BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        inside = (m < M)[:, None] & (k < K)[None, :]
        x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=inside, other=0.0)
        dropped = tl.abs(x.to(tl.float32)) <= tl.load(threshold_ptr + k, mask=k < K, other=0.0)[None, :]
        kept = inside & (dropped == 0)
        any_kept = tl.max(kept.to(tl.int32), axis=0) > 0
        w = load_rows(packed_ptr, k, any_kept, column, N, BLOCK_N, BITS, GROUP)
        y = tl.dot(tl.where(kept, x, 0.0).to(dot_type), w.to(dot_type), y, input_precision="ieee")
    at = (split.to(tl.int64) * M + m)[:, None] * N + n[None, :]
    tl.store(partial_ptr + at, y, mask=(m < M)[:, None] & (n < N)[None, :])


def _sparse_gemm_cuda(x: Tensor, weight: PackedWeight, threshold: Tensor, bias: Tensor | None = None) -> Tensor:
    (M, K), N = x.shape, weight.N
    mine = triton.cdiv(triton.cdiv(K, SPLITS), BLOCK_K) * BLOCK_K  # channels of a split
    partial = x.new_empty(triton.cdiv(K, mine), M, N, dtype=torch.float32)
    _sparse_gemm_kernel[len(partial), triton.cdiv(N, BLOCK_N)](
        x, weight.packed, threshold, partial, M, K, N, mine, SMALLEST_TILE, BLOCK_K, BLOCK_N, weight.bits,
        weight.group, INTERPRETED,
    )  # fmt: skip
    return finish(partial.sum(0), bias, weight.scale).to(x.dtype)  # one fixed order: the same bits every time


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
    cuda=_sparse_gemm_cuda,
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
