"""Rows of four-bit weights, as every kernel reads them: an input channel's values and scales are one run of memory.

A row of N values in groups of `group` outputs is N / 2 bytes of values, N / group bf16 scales, and zeros up to whole
multiples of 32 bytes. 32 values make 16 bytes: byte i holds value i in its low half and value 16 + i in its high half.
A weight is (value - 8) scale. Groups lie along the outputs, so that a skipped channel skips its scales. Scales are at
most 1 in size, so that the fixed point of kernels/fixed_point.py holds x times any of them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ROW_ALIGNMENT = 32  # bytes
SMALLEST_GROUP = 64  # groups are whole multiples of it


def row_bytes(N: int, group: int) -> int:
    """Bytes of a row. Raises ValueError when N outputs do not fall into such groups."""
    if group <= 0 or group % SMALLEST_GROUP or N % group:
        raise ValueError(
            f"{N} outputs do not fall into groups of {group}: expected a multiple of {SMALLEST_GROUP} dividing them"
        )
    return -(-(N // 2 + 2 * (N // group)) // ROW_ALIGNMENT) * ROW_ALIGNMENT


def pack_int4(values: Tensor, scale: Tensor) -> Tensor:
    """Rows uint8 [K, row_bytes] of values uint8 [K, N] from 0 to 15 and scale bf16 [K, N / group]."""
    K, N = values.shape
    low, high = values.view(K, N // 32, 2, 16).unbind(2)
    row = torch.cat(((low | high << 4).view(K, N // 2), scale.contiguous().view(torch.uint8)), dim=1)
    return F.pad(row, (0, row_bytes(N, N // scale.shape[1]) - row.shape[1]))


def row_scales(packed: Tensor, N: int, group: int) -> Tensor:
    """bf16 [K, N / group] of packed [K, row_bytes]."""
    return packed[:, N // 2 : N // 2 + 2 * (N // group)].contiguous().view(torch.bfloat16)


def unpack_int4(packed: Tensor, N: int, group: int) -> Tensor:
    """fp32 [K, N] of packed [K, row_bytes]."""
    both = packed[:, : N // 2].reshape(-1, N // 32, 1, 16)
    values = torch.cat((both & 15, both >> 4), dim=2).view(-1, N // group, group)
    return ((values.float() - 8) * row_scales(packed, N, group).float()[..., None]).view(-1, N)
