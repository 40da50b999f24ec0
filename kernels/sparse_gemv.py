"""teal::sparse_gemv: y = W (x ⊙ keep) + bias for one token, reading only the kept rows of the transposed weight.

x [K]; weight [K, N] row-major (an input channel is one contiguous row) in x's dtype, or int8, or four-bit rows in
groups of `group` (kernels/int4.py), the last two with a scale [N] fp32, one an output; threshold [K] fp32, compared
with |x|, one number per input channel: below 0 keeps the channel always; bias [N] in x's dtype, or none. y [N] in x's
dtype, accumulated in fp32; the CPU's code is csrc/sparse_gemv.cpp.
A channel is kept unless |x| <= threshold, so that NaN travels on as in a dense layer. Source: TEAL, arXiv:2408.14690.
"""

from ctypes import c_int64

import torch
import torch.nn.functional as F
from torch import Tensor

from teal_fast.kernels.backend import jit, tl, triton
from teal_fast.kernels.native import TYPES, library, pointer
from teal_fast.kernels.rows import bits, check_bias, check_rows, load_rows, outputs, to_float

BLOCK_K, BLOCK_N = 32, 128  # untuned
CPU_BAGS = 4  # partial sums without C++, in x's dtype; not the number of threads, on which no result may depend


def sparse_gemv_reference(
    x: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    group: int = 0,
) -> Tensor:
    kept = (x.float().abs() <= threshold).logical_not()
    y = x[kept].float() @ to_float(weight[kept], outputs(weight, scale), group)
    y = y if scale is None else y * scale
    return (y if bias is None else y + bias.float()).to(x.dtype)


@jit
def _sparse_gemv_kernel(
    x_ptr, weight_ptr, threshold_ptr, partial_ptr, K, N, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0).to(tl.int64)
    k = split * BLOCK_K + tl.arange(0, BLOCK_K)
    column = tl.program_id(1) * BLOCK_N
    x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)  # [BLOCK_K]
    dropped = tl.abs(x) <= tl.load(threshold_ptr + k, mask=k < K, other=0.0)
    kept = (k < K) & (dropped == 0)
    w = load_rows(weight_ptr, k, kept, column, N, BLOCK_N, BITS, GROUP)
    y = tl.sum(w * tl.where(kept, x, 0.0)[:, None], axis=0)  # [BLOCK_N]
    n = column + tl.arange(0, BLOCK_N)
    tl.store(partial_ptr + split * N + n, y, mask=n < N)


def _sparse_gemv_cuda(
    x: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None, scale: Tensor | None, group: int
) -> Tensor:
    (K,), N = x.shape, outputs(weight, scale)
    splits = triton.cdiv(K, BLOCK_K)
    partial = torch.empty(splits, N, dtype=torch.float32, device=x.device)
    grid = (splits, triton.cdiv(N, BLOCK_N))
    _sparse_gemv_kernel[grid](x, weight, threshold, partial, K, N, BLOCK_K, BLOCK_N, bits(weight), group)
    return _finish(partial.sum(0), bias, scale).to(x.dtype)  # one fixed order: the same bits every time


def _sparse_gemv_cpu(
    x: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None, scale: Tensor | None, group: int
) -> Tensor:
    native = library()
    if native is None or x.dtype not in TYPES:
        return _sparse_gemv_torch(x, weight, threshold, bias, scale, group)
    y = x.new_empty(outputs(weight, scale))
    native.teal_sparse_gemv(
        TYPES[x.dtype], bits(weight), *map(pointer, (x, weight, threshold, scale, bias, y)),
        *map(c_int64, (len(x), len(y), group)), torch.get_num_threads(),
    )  # fmt: skip
    return y


def _sparse_gemv_torch(
    x: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    group: int = 0,
) -> Tensor:
    kept = (x.abs() <= threshold).logical_not_().nonzero().squeeze(1)
    if scale is not None:
        return _finish(x[kept].float() @ to_float(weight[kept], len(scale), group), bias, scale).to(x.dtype)
    # A weighted embedding bag gathers and sums the kept rows in one pass, in fp32: 1.8x as fast as indexing and a
    # product in fp32 and 4 to 90x in bf16 (576x960 to 4096x14336, Zen 3).
    bags = torch.tensor([kept.numel() * bag // CPU_BAGS for bag in range(CPU_BAGS)])
    return _finish(F.embedding_bag(kept, weight, bags, mode="sum", per_sample_weights=x[kept]).sum(0), bias, None)


def _finish(y: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    y = y if scale is None else y * scale
    return y if bias is None else y + bias


def _sparse_gemv_fake(
    x: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None, scale: Tensor | None, group: int
) -> Tensor:
    return x.new_empty(outputs(weight, scale))


torch.library.define(
    "teal::sparse_gemv",
    "(Tensor x, Tensor weight, Tensor threshold, Tensor? bias, Tensor? scale, int group) -> Tensor",
)
torch.library.impl("teal::sparse_gemv", "CUDA", _sparse_gemv_cuda)
torch.library.impl("teal::sparse_gemv", "CPU", _sparse_gemv_cpu)
torch.library.register_fake("teal::sparse_gemv", _sparse_gemv_fake)


def sparse_gemv(
    x: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    group: int = 0,
) -> Tensor:
    """y [N]: the kept channels of x [K] times weight [K, N], plus bias. Raises ValueError on what does not fit."""
    if x.ndim != 1 or weight.ndim != 2 or threshold.shape != x.shape or weight.shape[0] != x.shape[0]:
        shapes = f"{list(x.shape)}, {list(weight.shape)}, {list(threshold.shape)}"
        raise ValueError(f"sparse_gemv takes x [K], weight [K, N], threshold [K], got {shapes}")
    if not x.is_floating_point() or threshold.dtype != torch.float32:
        raise ValueError(f"sparse_gemv takes floating x and an fp32 threshold, got {x.dtype}, {threshold.dtype}")
    N = check_rows("sparse_gemv", x, weight, scale, group)
    check_bias("sparse_gemv", x, bias, N)
    if not all(tensor is None or tensor.is_contiguous() for tensor in (x, weight, threshold, bias, scale)):
        raise ValueError("sparse_gemv takes contiguous tensors, got a strided view")
    return torch.ops.teal.sparse_gemv(x, weight, threshold, bias, scale, group)
