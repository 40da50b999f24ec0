"""A weight in blocks (kernels/blocks.py) as ops take it, which know tensors and numbers alone, and as C++ does."""

import ctypes
from collections.abc import Sequence
from ctypes import c_int64, c_void_p

from torch import Tensor

from teal_fast.kernels.blocks import BLOCK_TYPES, Blocks
from teal_fast.kernels.native import pointer

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
    """For C++. N: the outputs without padding."""
    return Part(kind, K, N, *(pointer(tensor).value for tensor in tensors))
