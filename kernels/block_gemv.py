"""teal::block_gemv: y = W (x ⊙ 1[|x| > t]) + bias for one token, of a weight in llama.cpp's blocks (kernels/blocks.py).

x [K]; threshold [K] fp32, as of sparse_gemv; the weight [K, N] is a list of parts beside each other along the outputs,
each of one type; bias [N] in x's dtype, or none; y [N] in x's dtype.

In C++ x is rounded to whole numbers, 8 bits of the largest kept one of BLOCK inputs, so that whole numbers are summed;
NaN and infinity make all of y NaN. Rows of skipped channels are not read, nor are scales of blocks without a kept one.
"""

from ctypes import c_int64

import torch
import torch.nn.functional as F
from torch import Tensor

from teal_fast.kernels.backend import register
from teal_fast.kernels.block_operand import KINDS, TENSORS, Part, Parts, blocks_of, part_of, tensors_of
from teal_fast.kernels.block_planes import NARROW
from teal_fast.kernels.blocks import dequantize_blocks
from teal_fast.kernels.native import TYPES, library, pointer


def block_gemv_reference(x: Tensor, parts: Parts, threshold: Tensor, bias: Tensor | None = None) -> Tensor:
    kept = x.float().masked_fill(x.float().abs() <= threshold, 0)
    y = torch.cat([kept @ dequantize_blocks(blocks)[:, :N] for blocks, N in parts])
    return (y if bias is None else y + bias).to(x.dtype)


def _of_parts(tensors: list[Tensor | None]) -> list[list[Tensor | None]]:
    return [tensors[i : i + TENSORS] for i in range(0, len(tensors), TENSORS)]


def _block_gemv_torch(x, threshold, tensors, kinds, outputs, bias) -> Tensor:
    """It widens the weight: for a device or machine without the C++ kernels."""
    kept = x.masked_fill(x.abs() <= threshold, 0)
    parts = [dequantize_blocks(blocks_of(*part)) for part in zip(_of_parts(tensors), kinds, strict=True)]
    weight = torch.cat([part[:, :N] for part, N in zip(parts, outputs, strict=True)], 1)
    y = F.linear(kept.float(), weight.t())
    return (y if bias is None else y + bias).to(x.dtype)


def _block_gemv_cpu(x, threshold, tensors, kinds, outputs, bias) -> Tensor:
    if (native := library()) is None or x.dtype not in TYPES:
        return _block_gemv_torch(x, threshold, tensors, kinds, outputs, bias)
    y, K = x.new_empty(sum(outputs)), len(x)
    each = zip(_of_parts(tensors), kinds, outputs, strict=True)
    parts = (Part * len(kinds))(*(part_of(of_part, kind, K, N) for of_part, kind, N in each))
    native.teal_block_gemv(
        TYPES[x.dtype], pointer(x), parts, c_int64(len(parts)), *map(pointer, (threshold, bias, y)),
        c_int64(K), c_int64(len(y)), torch.get_num_threads(),
    )  # fmt: skip
    return y


_block_gemv = register(
    "block_gemv",
    "(Tensor x, Tensor threshold, Tensor?[] tensors, int[] kinds, int[] outputs, Tensor? bias) -> Tensor",
    cuda=_block_gemv_torch,
    cpu=_block_gemv_cpu,
    fake=lambda x, threshold, tensors, kinds, outputs, bias: x.new_empty(sum(outputs)),
)


def block_gemv(x: Tensor, parts: Parts, threshold: Tensor, bias: Tensor | None = None) -> Tensor:
    """y [N]: the kept channels of x [K] times the weight [K, N], plus bias. Raises ValueError on what does not fit."""
    _check(x, parts, threshold, bias)
    tensors = [tensor for blocks, _ in parts for tensor in tensors_of(blocks)]
    kinds = [KINDS.index(blocks.kind.name) for blocks, _ in parts]
    return _block_gemv(x, threshold, tensors, kinds, [N for _, N in parts], bias)


def _check(x: Tensor, parts: Parts, threshold: Tensor, bias: Tensor | None) -> None:
    K, N = parts[0][0].K, sum(N for _, N in parts)
    found = [tensor for tensor in (x, threshold, bias) if tensor is not None]
    shapes = [list(tensor.shape) for tensor in found]
    fits = shapes == [[K], [K], [N]][: len(shapes)] and all(tensor.is_contiguous() for tensor in found)
    fits = fits and threshold.dtype == torch.float32 and (bias is None or bias.dtype == x.dtype)
    fits = fits and all(blocks.K == K and 0 <= blocks.N - n < NARROW for blocks, n in parts)
    if not (fits and x.dtype.is_floating_point):
        said = ", ".join(f"{shape} {tensor.dtype}" for shape, tensor in zip(shapes, found, strict=True))
        inside = [(blocks.K, blocks.N, n) for blocks, n in parts]
        raise ValueError(
            "block_gemv takes contiguous x [K] dtype, threshold [K] fp32, bias [N] dtype or none, and parts of "
            f"K = {K} inputs and N = {N} outputs in all, got {said}, parts {inside}"
        )
