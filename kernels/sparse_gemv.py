"""teal::sparse_gemv: y = W (x ⊙ 1[|x| > t]) + bias for one token, reading only the kept rows of the transposed weight.

x [K]; weight [K, N] (kernels/packed.py) in x's dtype or quantized; threshold [K] fp32, in units of |x|, one an input
channel: below 0 it keeps the channel always; bias [N] in x's dtype, or none. y [N] in x's dtype, accumulated in fp32.
Kept is what is not |x| <= t, so that NaN travels on as in a dense layer. Source: TEAL, arXiv:2408.14690.
"""

from ctypes import c_int64

import torch
import torch.nn.functional as F
from torch import Tensor

from teal_fast.kernels.backend import jit, register, tl, triton
from teal_fast.kernels.checks import takes
from teal_fast.kernels.native import TYPES, library, pointer
from teal_fast.kernels.packed import WEIGHT_ARGUMENTS, WEIGHT_TABLE, PackedWeight, bits, check_weight, load_rows

BLOCK_K, BLOCK_N = 32, 128  # untuned
CPU_BAGS = 4  # partial sums without C++, in x's dtype; not the number of threads, on which no result may depend


def sparse_gemv_reference(x: Tensor, weight: PackedWeight, threshold: Tensor, bias: Tensor | None = None) -> Tensor:
    kept = (x.float().abs() <= threshold).logical_not()
    return finish(x[kept].float() @ weight.values(kept), bias, weight.scale).to(x.dtype)


@jit
def _sparse_gemv_kernel(
    x_ptr, packed_ptr, threshold_ptr, partial_ptr, K, N, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0).to(tl.int64)
    k = split * BLOCK_K + tl.arange(0, BLOCK_K)
    column = tl.program_id(1) * BLOCK_N
    x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)  # [BLOCK_K]
    dropped = tl.abs(x) <= tl.load(threshold_ptr + k, mask=k < K, other=0.0)
    kept = (k < K) & (dropped == 0)
    w = load_rows(packed_ptr, k, kept, column, N, BLOCK_N, BITS, GROUP)
    y = tl.sum(w * tl.where(kept, x, 0.0)[:, None], axis=0)  # [BLOCK_N]
    n = column + tl.arange(0, BLOCK_N)
    tl.store(partial_ptr + split * N + n, y, mask=n < N)


def _sparse_gemv_cuda(x: Tensor, weight: PackedWeight, threshold: Tensor, bias: Tensor | None = None) -> Tensor:
    splits, N = triton.cdiv(len(x), BLOCK_K), weight.N
    partial = x.new_empty(splits, N, dtype=torch.float32)
    _sparse_gemv_kernel[splits, triton.cdiv(N, BLOCK_N)](
        x, weight.packed, threshold, partial, len(x), N, BLOCK_K, BLOCK_N, weight.bits, weight.group
    )
    return finish(partial.sum(0), bias, weight.scale).to(x.dtype)  # one fixed order: the same bits every time


def _sparse_gemv_cpu(x, packed, scale, group, threshold, bias) -> Tensor:
    if (native := library()) is None or x.dtype not in TYPES:
        return _sparse_gemv_torch(x, PackedWeight(packed, scale, group), threshold, bias)
    y = x.new_empty(packed.shape[1] if scale is None else len(scale))
    native.teal_sparse_gemv(
        TYPES[x.dtype], bits(packed), *map(pointer, (x, packed, threshold, scale, bias, y)),
        *map(c_int64, (len(x), len(y), group)), torch.get_num_threads(),
    )  # fmt: skip
    return y


def _sparse_gemv_torch(x: Tensor, weight: PackedWeight, threshold: Tensor, bias: Tensor | None = None) -> Tensor:
    kept = (x.abs() <= threshold).logical_not_().nonzero().squeeze(1)
    if weight.scale is not None:
        return finish(x[kept].float() @ weight.values(kept), bias, weight.scale).to(x.dtype)
    # A weighted embedding bag gathers and sums the kept rows in one pass, in fp32: 1.8x as fast as indexing and a
    # product in fp32 and 4 to 90x in bf16 (576x960 to 4096x14336, Zen 3).
    bags = torch.tensor([kept.numel() * bag // CPU_BAGS for bag in range(CPU_BAGS)])
    y = F.embedding_bag(kept, weight.packed, bags, mode="sum", per_sample_weights=x[kept])
    return finish(y.sum(0), bias, None)


def finish(y: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    """Sums [..., N] times the weight's scale, plus bias."""
    y = y if scale is None else y * scale
    return y if bias is None else y + bias


_check = takes("sparse_gemv", f"x [K] dtype; {WEIGHT_TABLE}; threshold [K] fp32; bias [N] dtype or none", "N")
_sparse_gemv = register(
    "sparse_gemv",
    f"(Tensor x, {WEIGHT_ARGUMENTS}, Tensor threshold, Tensor? bias) -> Tensor",
    cuda=_sparse_gemv_cuda,
    cpu=_sparse_gemv_cpu,
    fake=lambda x, weight, threshold, bias: x.new_empty(weight.N),
    bundle=lambda f: lambda x, *flat: f(x, PackedWeight(*flat[:3]), *flat[3:]),
)


def sparse_gemv(x: Tensor, weight: PackedWeight, threshold: Tensor, bias: Tensor | None = None) -> Tensor:
    """y [N]: the kept channels of x [K] times the weight [K, N], plus bias. Raises ValueError on what does not fit."""
    _check(x, *weight[:2], threshold, bias, N=check_weight("sparse_gemv", weight, x.dtype))
    return _sparse_gemv(x, *weight, threshold, bias)
