"""A weight in blocks (kernels/blocks.py) as ops take it, which know tensors and numbers alone, and as C++ does."""

import ctypes
import functools
from collections.abc import Sequence
from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from teal_fast.kernels.block_planes import BLOCK
from teal_fast.kernels.blocks import BLOCK_TYPES, SUPER, Blocks, BlockType
from teal_fast.kernels.native import pointer

Parts = Sequence[tuple[Blocks, int]]  # a weight's, beside each other, each with its outputs, without padding
KINDS = list(BLOCK_TYPES)  # as csrc/blocks.h numbers them
TENSORS = 6  # of a part: two planes, scale, minimum and their scales, of which some are None


class Part(ctypes.Structure):
    """`Part` of csrc/blocks.h. It holds addresses alone: the tensors must be kept."""

    _fields_ = [
        *((name, c_int64) for name in ("type", "K", "N")),
        *((name, c_void_p) for name in ("plane0", "plane1")),
        *((name, c_void_p) for name in ("scale", "minimum", "super_scale", "super_minimum")),
    ]


def tensors_of(blocks: Blocks) -> list[Tensor | None]:
    return [*(*blocks.planes, None)[:2], *blocks[2:]]


def blocks_of(tensors: Sequence[Tensor | None], kind: int) -> Blocks:
    """`tensors_of` undone."""
    planes = tuple(plane for plane in tensors[:2] if plane is not None)
    return Blocks(BLOCK_TYPES[KINDS[kind]], planes, *tensors[2:])


def part_of(tensors: Sequence[Tensor | None], kind: int, K: int, N: int) -> Part:
    """For C++. N: the outputs without padding. Raises ValueError on tensors that are not such a part's."""
    found = [None if tensor is None else (*tensor.shape, tensor.dtype) for tensor in tensors]
    if found != (expected := layout_of(BLOCK_TYPES[KINDS[kind]], K, tensors[2].shape[1])):
        raise ValueError(f"a weight in {KINDS[kind]} has tensors {expected}, got {found}")
    assert all(tensor is None or tensor.is_contiguous() for tensor in tensors)
    return Part(kind, K, N, *(pointer(tensor).value for tensor in tensors))


@functools.cache
def layout_of(kind: BlockType, K: int, N: int) -> list[tuple | None]:
    """Shape and dtype of each tensor of `tensors_of`, as `Blocks` says. N counts padding."""
    planes = [(K, N * bits // 8, torch.uint8) for bits in kind.planes]
    above = (K // SUPER, N, torch.float16) if kind.nested else None
    scale = (K // kind.scale_block, N, torch.int8 if kind.nested else torch.float16)
    minimum = (K // BLOCK, N, torch.uint8 if kind.nested else torch.float16) if kind.minimum else None
    return [*(*planes, None)[:2], scale, minimum, above, above if kind.minimum else None]


def parts_of(weight: Parts) -> ctypes.Array:
    """All of them for C++."""
    each = [part_of(tensors_of(blocks), KINDS.index(blocks.kind.name), blocks.K, N) for blocks, N in weight]
    return (Part * len(each))(*each)
