"""TODO."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from teal_fast.weights.dense import Weight
from teal_fast.weights.grids import Grid
from teal_fast.weights.quantized import Int4Weight, Int8Weight

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Format:
    """A format of storage as a checkpoint's metadata name it; `group`: outputs that share a scale in int4.

    A checkpoint in int4 has attention's weights in int8: they are a quarter, and in int4 they lose more than the
    others.
    """

    name: str
    group: int = 0

    def metadata(self) -> dict[str, str]:
        """What a checkpoint's metadata say of it; files/load.py reads them."""
        return {"weights": self.name} | ({"group": str(self.group)} if self.group else {})

    def within(self, name: str) -> "Format":
        """The format of the layer called so."""
        return Format("int8") if ".attention." in name else self

    def empty(self, K: int, N: int) -> Weight:
        """A weight [K, N] of this format that is yet to be filled."""
        return QUANTIZED[self.name].empty(K, N, self.group)

    def pack(
        self,
        weight: Tensor,
        importance: Tensor | None = None,
        rounded: Callable[[Tensor, Grid], tuple[Tensor, ...]] | None = None,
    ) -> Weight:
        """weight [K, N] on this format's grid: rounded to nearest, or as `rounded` does (quantization/gptq.py).

        importance [K]: of an input channel's squared error where the grid's scales are chosen. Raises on a misfit.
        """
        grid = QUANTIZED[self.name].grid(weight, self.group, importance)
        codes = rounded(weight, grid) if rounded else grid.round(weight.float())
        return QUANTIZED[self.name].from_codes(grid, *codes)


QUANTIZED = {"int8": Int8Weight, "int4": Int4Weight}
