"""teal::block_gemv: y = W (x ⊙ 1[|x| > t]) + bias for one token, of a weight in llama.cpp's blocks (kernels/blocks.py).

x [K]; threshold [K] fp32, as of sparse_gemv; the weight [K, N] is a list of parts beside each other along the outputs,
each of one type; bias [N] in x's dtype, or none; y [N] in x's dtype.

In C++ x is rounded to whole numbers, 8 bits of the largest kept one of BLOCK inputs, so that whole numbers are summed;
NaN and infinity make all of y NaN. Rows of skipped channels are not read, nor are scales of blocks without a kept one.
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_int64, c_void_p

import torch
import torch.nn.functional as F
from torch import Tensor

from teal_fast.kernels.backend import register
from teal_fast.kernels.blocks import BLOCK_TYPES, NARROW, Blocks, dequantize_blocks
from teal_fast.kernels.native import TYPES, library, pointer

KINDS = list(BLOCK_TYPES)  # as csrc/blocks.h numbers them
Parts = Sequence[tuple[Blocks, int]]  # with its outputs, without padding


class CpuPart(ctypes.Structure):
    """`Part` of csrc/blocks.h."""

    _fields_ = [
        *((name, c_int64) for name in ("type", "K", "N")),
        *((name, c_void_p) for name in ("plane0", "plane1")),
        *((name, c_void_p) for name in ("scale", "minimum", "super_scale", "super_minimum")),
    ]

    @classmethod
    def of(cls, blocks: Blocks, N: int) -> "CpuPart":
        """It holds addresses alone: the tensors must be kept."""
        return cls(KINDS.index(blocks.kind.name), blocks.K, N, *(pointer(t).value for t in _tensors(blocks)))


def _tensors(blocks: Blocks) -> tuple[Tensor | None, ...]:
    planes = (*blocks.planes, None)[:2]
    return (*planes, *blocks[2:])


def block_gemv_reference(x: Tensor, parts: Parts, threshold: Tensor, bias: Tensor | None = None) -> Tensor:
    kept = x.float().masked_fill(x.float().abs() <= threshold, 0)
    y = torch.cat([kept @ dequantize_blocks(blocks)[:, :N] for blocks, N in parts])
    return (y if bias is None else y + bias).to(x.dtype)


def _unflatten(tensors: list[Tensor | None], kinds: list[int], outputs: list[int]) -> Parts:
    parts = []
    for i, (kind, N) in enumerate(zip(kinds, outputs, strict=True)):
        *planes, scale, minimum, super_scale, super_minimum = tensors[6 * i : 6 * i + 6]
        planes = tuple(plane for plane in planes if plane is not None)
        blocks = Blocks(BLOCK_TYPES[KINDS[kind]], planes, scale, minimum, super_scale, super_minimum)
        parts.append((blocks, N))
    return parts


def _block_gemv_torch(x, threshold, tensors, kinds, outputs, bias) -> Tensor:
    """It widens the weight: for a device or machine without the C++ kernels."""
    kept = x.masked_fill(x.abs() <= threshold, 0)
    parts = [dequantize_blocks(blocks)[:, :N] for blocks, N in _unflatten(tensors, kinds, outputs)]
    y = F.linear(kept.float(), torch.cat(parts, 1).t())
    return (y if bias is None else y + bias).to(x.dtype)


def _block_gemv_cpu(x, threshold, tensors, kinds, outputs, bias) -> Tensor:
    if (native := library()) is None or x.dtype not in TYPES:
        return _block_gemv_torch(x, threshold, tensors, kinds, outputs, bias)
    flat, y = [pointer(tensor).value for tensor in tensors], x.new_empty(sum(outputs))
    parts = (CpuPart * len(kinds))(
        *((kind, len(x), N, *flat[6 * i : 6 * i + 6]) for i, (kind, N) in enumerate(zip(kinds, outputs, strict=True)))
    )
    native.teal_block_gemv(
        TYPES[x.dtype], pointer(x), parts, c_int64(len(parts)), *map(pointer, (threshold, bias, y)),
        c_int64(len(x)), c_int64(len(y)), torch.get_num_threads(),
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
    tensors = [tensor for blocks, _ in parts for tensor in _tensors(blocks)]
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
