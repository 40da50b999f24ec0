"""A vector by its kept channels, as kernels hand it to one another: stream compaction, in slots.

A program that makes a part of the vector has a slot of its own, so that no program waits for another. One slot of width
K is a plain list.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# An op's rows in a table of kernels/checks.py, and its arguments in a schema.
VECTOR_TABLE = "index [S, W] int32; value [S, W] dtype; count [S] int32"
VECTOR_ARGUMENTS = "Tensor index, Tensor value, Tensor count"


class CompactVector(NamedTuple):
    """A slot's kept channels are its first `count`, in ascending order; what lies behind them is undefined."""

    index: Tensor  # [slots, width] int32
    value: Tensor  # [slots, width]
    count: Tensor  # [slots] int32


def empty_vector(like: Tensor, slots: int, width: int, dtype: torch.dtype) -> CompactVector:
    """A vector on `like`'s device, for a kernel to fill."""
    index = like.new_empty(slots, width, dtype=torch.int32)
    return CompactVector(index, like.new_empty(slots, width, dtype=dtype), index.new_empty(slots))


def compact_reference(x: Tensor, threshold: Tensor, width: int) -> CompactVector:
    """The channels of x [K] but those with |x| <= threshold, `width` channels a slot; NaN is kept."""
    y = empty_vector(x, -(-len(x) // width), width, x.dtype)
    for slot, (part, limit) in enumerate(zip(x.split(width), threshold.split(width), strict=True)):
        kept = (part.abs() <= limit).logical_not().nonzero().squeeze(1)
        y.index[slot, : len(kept)], y.value[slot, : len(kept)] = slot * width + kept, part[kept]
        y.count[slot] = len(kept)
    return y
