"""The grids of a model's reproducible sums: how finely each column of q/k/v, o's and the MLP's updates is added up.

Addends that are whole multiples of a column's grid have the same sum in any order, as long as all partial sums are
below 2^24 grids. So a grid is a power of two, as fine as leaves room for addends, as many as there may be, that are
each as large as twice what the column's sum was at most on a fixed text (fixed_text.py). What is larger is added
rightly all the same, but the promise is lost then: it is counted (kernels/csrc/stages_base.cuh).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from teal_fast.engine.fixed_text import largest_sums
from teal_fast.model import Transformer


class Grids(NamedTuple):
    """1.5 · 2^23 times each column's grid, fp32: adding it to a number and taking it off again rounds to the grid."""

    qkv: Tensor
    o: Tensor
    down: Tensor


def measure_grids(model: Transformer, addends: tuple[int, int, int]) -> list[Grids]:
    """Each layer's grids for sums of at most so many addends."""
    return [Grids(*map(grid_constant, largest, addends)) for largest in largest_sums(model)]


def grid_constant(largest: Tensor, addends: int) -> Tensor:
    """Of columns [N] whose sums of so many addends were at most so large: 1.5 · 2^23 times their grids, fp32."""
    least = max(largest.median().item(), torch.finfo(torch.float32).tiny * 2**64)  # what was small may not stay so
    held = largest.clamp(min=least)
    return 1.5 * 2.0 ** ((addends - 1).bit_length()) * held.log2().ceil().exp2()
