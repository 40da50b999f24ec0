"""Vectors given by their kept channels, for the tests of the kernels that make and take them."""

import torch
from torch import Tensor

from teal_fast.kernels.backend import INTERPRETED
from teal_fast.kernels.compact_vector import CompactVector

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REPEATS = 1 if INTERPRETED else 3  # of what must give the same bits: the interpreter runs programs in one order only


def expand(vector: CompactVector, size: int) -> Tensor:
    """The vector [size] fp32 that a compact one stands for; each slot must ascend."""
    x = torch.zeros(size, device=vector.value.device)
    for k, kept, n in zip(vector.index, vector.value, vector.count.tolist(), strict=True):
        assert (k[:n].diff() > 0).all(), "a slot's channels must ascend"
        x[k[:n].long()] = kept[:n].float()
    return x


def compact(x: Tensor, threshold: Tensor, slots: int = 1) -> CompactVector:
    """x [K] in slots of equal width; what lies past a slot's count is poison."""
    width = -(-len(x) // slots)
    index = torch.full((slots, width), 1 << 30, dtype=torch.int32, device=x.device)
    value = torch.full((slots, width), torch.nan, dtype=x.dtype, device=x.device)
    count = torch.zeros(slots, dtype=torch.int32, device=x.device)
    for slot in range(slots):
        part = slice(slot * width, (slot + 1) * width)
        kept = (x[part].abs() <= threshold[part]).logical_not().nonzero().squeeze(1)
        index[slot, : len(kept)], value[slot, : len(kept)] = slot * width + kept, x[part][kept]
        count[slot] = len(kept)
    return CompactVector(index, value, count)


def dropped_rows(vector: CompactVector, K: int) -> Tensor:
    """[K]: whether a channel is not in the vector."""
    dropped = torch.ones(K, dtype=torch.bool, device=DEVICE)
    for k, n in zip(vector.index, vector.count.tolist(), strict=True):
        dropped[k[:n].long()] = False
    return dropped


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def pairwise(first: list, second: list, third: list) -> list[tuple]:
    """Cases that hold every pair of values of two of the lists, `third` being no longer than the others."""
    return [(a, b, third[(i + j) % len(third)]) for i, a in enumerate(first) for j, b in enumerate(second)]
