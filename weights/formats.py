"""The formats of quantized weights as values: what a checkpoint's metadata say, and how a weight is made from them.

A further format is one class in quantized.py, one grid in grids.py and one line in QUANTIZED. DTYPES are the
computation types; the dtype of an unquantized weight is not a Format.
"""

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
    """A quantized checkpoint's format, "int8" or "int4"; group: how many outputs share a row scale in int4, else 0.

    In an int4 checkpoint the attention's weights are int8: they are a quarter of the weights, and in int4 they cost
    more quality than the others.
    """

    name: str
    group: int = 0

    def metadata(self) -> dict[str, str]:
        """What a checkpoint's metadata say of it; files/load.py reads them."""
        return {"weights": self.name} | ({"group": str(self.group)} if self.group else {})

    def within(self, name: str) -> "Format":
        """The format of one layer of the checkpoint, by its module name."""
        return Format("int8") if ".attention." in name else self

    def empty(self, K: int, N: int) -> Weight:
        """A weight [K, N] in this format whose tensors are yet to be filled. Raises ValueError on a misfit of N."""
        return QUANTIZED[self.name].empty(K, N, self.group)

    def pack(
        self,
        weight: Tensor,
        importance: Tensor | None = None,
        round_to: Callable[[Tensor, Grid], tuple[Tensor, ...]] | None = None,
    ) -> Weight:
        """Quantizes weight [K, N] to this format.

        round_to: rounds a weight to a grid, as `gptq_round` does; by default each entry goes to its nearest code.
        importance: fp32 [K], what a squared error in an input channel counts when int8 scales are chosen. Raises
        ValueError when N does not suit the format.
        """
        grid = QUANTIZED[self.name].grid(weight, self.group, importance)
        codes = round_to(weight, grid) if round_to else grid.round(weight.float())
        return QUANTIZED[self.name].from_codes(grid, *codes)


QUANTIZED = {"int8": Int8Weight, "int4": Int4Weight}
