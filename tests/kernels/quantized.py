"""Random weights in int8 and in four-bit groups, and how far sums of them may be off: for tests of their kernels."""

from typing import NamedTuple

import torch
from torch import Tensor

from teal_fast.kernels.int4 import pack_int4
from teal_fast.kernels.packed import PackedWeight
from teal_fast.tests.kernels.compacted import DEVICE


class Quantized(NamedTuple):
    packed: Tensor
    scale: Tensor  # [N]
    group: int  # 0: int8
    value: Tensor  # [K, N] fp32, whole numbers
    row_scale: Tensor  # [K, N] fp32: what value is multiplied by before scale

    @property
    def weight(self) -> PackedWeight:
        """As kernels take it."""
        return PackedWeight(self.packed, self.scale, self.group)

    def dense(self) -> Tensor:
        return self.value * self.row_scale * self.scale


def quantized(K: int, N: int, group: int, seed: int = 0) -> Quantized:
    """Weights [K, N] about as large as 1, on both sides of 0 to the very ends; group 0 is int8."""
    generator = torch.Generator().manual_seed(seed)
    scale = 0.5 + torch.rand(N, generator=generator)
    if group == 0:
        packed = torch.randint(-128, 128, (K, N), generator=generator).to(torch.int8)
        parts = packed, scale / 74, group, packed.float(), torch.ones(K, N)
    else:
        values = torch.randint(16, (K, N), generator=generator).to(torch.uint8)
        row_scale = (0.25 + 0.75 * torch.rand(K, N // group, generator=generator)).bfloat16()
        packed, wide = pack_int4(values, row_scale), row_scale.float().repeat_interleave(group, dim=1)
        parts = packed, scale / 2.8, group, values.float() - 8, wide
    return Quantized(*(part.to(DEVICE) if isinstance(part, Tensor) else part for part in parts))


def poison(packed: Tensor, dropped: Tensor) -> Tensor:
    """The rows with those dropped at the far end of their range, and with scales of NaN in rows of four bits."""
    return torch.where(dropped[:, None], torch.iinfo(packed.dtype).max, packed)


def order(x: Tensor, weight: Quantized) -> Tensor:
    """[N]: what fp32 may be off in x [K] times the weight, by the order of its sums.

    A sum is rounded by 2^-24 of what it has reached; four of the largest such errors are more than all of them make.
    """
    return 2**-22 * (8 if weight.group else 128) * (x.abs() @ weight.row_scale) * weight.scale


def fixed(x: Tensor, weight: Quantized) -> Tensor:
    """[N]: what may be off besides when entries become one of 2^15 - 1 levels: half a level of the largest, each."""
    return 2**-16 * 1.01 * x.abs().max() * ((x != 0).float() @ weight.value.abs()) * weight.scale


def factors(x: Tensor, weight: Quantized) -> Tensor:
    """[N]: what is off in x [K] times rows of four bits when C++ rounds x times a row's scale to a whole factor.

    It is off by at most 1/254 of the largest of 8 rows (127 is that one's factor). Such errors are independent, with a
    standard deviation of 1/sqrt(3) of the most: twice the root of the sum of squares is 3.5 of them, and more than the
    plain sum for up to 4 rows.
    """
    largest = (x.abs()[:, None] * weight.row_scale).amax(0)
    return 2 / 254 * largest * (weight.value * (x != 0)[:, None]).norm(dim=0) * weight.scale
