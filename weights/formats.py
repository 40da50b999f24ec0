"""The formats of quantized weights as values: what a checkpoint's metadata say, and how a weight is made from them.

A further format is one class in quantized.py, one grid in grids.py and one line in QUANTIZED. DTYPES are the
computation types; the dtype of an unquantized weight is not a Format. GGUF's types differ from layer to layer, and the
embeddings have one too, so that their BlockFormat names each: those of a GGUF file, or of one of our mixtures
(quantization/mixtures.py).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from teal_fast.kernels.blocks import BLOCK_TYPES
from teal_fast.weights.block_grids import BlockGrid
from teal_fast.weights.blocks import BlockEmbedding, BlockOutput, BlockPart, BlockWeight
from teal_fast.weights.dense import DenseWeight, Weight
from teal_fast.weights.grids import Grid
from teal_fast.weights.output import Int8Output
from teal_fast.weights.quantized import Int4Weight, Int8Weight

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Format:
    """A quantized checkpoint's format: int8, int4 or output8; group: how many outputs share a row scale in int4.

    In an int4 checkpoint the attention's weights are int8: they are a quarter of the weights, and in int4 they cost
    more quality than the others. In output8 only the output layer is quantized, to int8 as in both others.
    """

    name: str
    group: int = 0

    def metadata(self) -> dict[str, str]:
        """What a checkpoint's metadata say of it; files/load.py reads them."""
        return {"weights": self.name} | ({"group": str(self.group)} if self.group else {})

    def layer(self, name: str, K: int, N: int) -> Weight:
        """The weight [K, N] of the layer with this module name, as `empty` makes it."""
        return self.within(name).empty(K, N)

    def ends(self, embedding: nn.Embedding, output: nn.Linear) -> tuple[nn.Module, nn.Module]:
        """What stands for the embeddings and the output layer, its tensors yet to be filled."""
        return embedding, Int8Output.empty(*output.weight.shape)

    def pack_end(self, name: str, weight: Tensor) -> nn.Module:
        """The quantized weight [vocab, dim] of the output layer, rounded to nearest."""
        return Int8Output.pack(weight)

    def within(self, name: str) -> "Format":
        """The format of one layer of the checkpoint, by its module name."""
        return Format("int8") if self.name == "int4" and ".attention." in name else self

    def empty(self, K: int, N: int) -> Weight:
        """A weight [K, N] in this format whose tensors are yet to be filled. Raises ValueError on a misfit of N."""
        if self.name == OUTPUT8:
            return DenseWeight(torch.empty(K, N))
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
        if self.name == OUTPUT8:
            return DenseWeight(weight)
        grid = QUANTIZED[self.name].grid(weight, self.group, importance)
        codes = round_to(weight, grid) if round_to else grid.round(weight.float())
        return QUANTIZED[self.name].from_codes(grid, *codes)


QUANTIZED, OUTPUT8 = {"int8": Int8Weight, "int4": Int4Weight}, "output8"
FORMATS = (*QUANTIZED, OUTPUT8)  # that a `Format` has
EMBEDDINGS, OUTPUT = "tok_embeddings", "output"


@dataclass(frozen=True)
class BlockFormat:
    """The format of a GGUF file's own values; what is in no block type stays dense.

    name: what the file calls its mixture of types, as Q4_K_M. parts: type and outputs of each part, by module name.
    dtype: what is computed in.
    """

    name: str
    parts: dict[str, tuple[tuple[str, int], ...]]
    dtype: torch.dtype

    def metadata(self) -> dict[str, str]:
        """What a checkpoint's metadata say of it; files/load.py reads them. Releases before version 3 refuse it."""
        dtype = next(name for name, dtype in DTYPES.items() if dtype == self.dtype)
        about = {"version": "3", "weights": "gguf", "name": self.name, "dtype": dtype}
        return about | {"parts": json.dumps(self.parts, separators=(",", ":"))}

    def layer(self, name: str, K: int, N: int) -> Weight:
        """The weight [K, N] of a module, its tensors yet to be filled. Raises ValueError where the parts misfit."""
        if (parts := self.parts.get(name)) is None:
            return DenseWeight(torch.empty(K, N))
        if (outputs := sum(part[1] for part in parts)) != N:
            raise ValueError(f"{name} has {outputs} outputs, expected {N}")
        return BlockWeight.empty(K, parts, self.name)

    def within(self, name: str) -> "LayerBlocks | None":
        """The format of one layer of the checkpoint, by its module name; None of one that stays dense."""
        return LayerBlocks(self.name, self.parts[name]) if name in self.parts else None

    def pack_end(self, name: str, weight: Tensor) -> nn.Module:
        """The quantized weight [vocab, dim] of the embeddings or of the output layer, rounded to nearest."""
        return self.within(name).pack(weight.t())

    def ends(self, embedding: nn.Embedding, output: nn.Linear) -> tuple[nn.Module, nn.Module]:
        """What stands for the embeddings and the output layer, of tied ones both over one weight."""
        tied, (vocab, dim) = output.weight is embedding.weight, embedding.weight.shape
        if OUTPUT in self.parts:
            output = BlockOutput(self.layer(OUTPUT, dim, len(output.weight)))  # a rank's has a part of the vocabulary
        if EMBEDDINGS in self.parts:
            weight = self.layer(EMBEDDINGS, dim, vocab)
            embedding, output = BlockEmbedding(weight, self.dtype), BlockOutput(weight) if tied else output
        return embedding, output


@dataclass(frozen=True)
class LayerBlocks:
    """What BlockFormat says of one layer."""

    name: str
    parts: tuple[tuple[str, int], ...]

    def pack(
        self,
        weight: Tensor,
        importance: Tensor | None = None,
        round_to: Callable[[Tensor, Grid], tuple[Tensor, ...]] | None = None,
    ) -> Weight:
        """Quantizes weight [K, N], part by part; see `Format.pack`."""
        packed = []
        for columns, (name, N) in zip(weight.split([N for _, N in self.parts], dim=1), self.parts, strict=True):
            grid = BlockGrid.fit(BLOCK_TYPES[name], columns, importance)
            (codes,) = round_to(columns, grid) if round_to else grid.round(columns)
            packed.append(BlockPart(grid.blocks(codes), N))
        return BlockWeight(packed, self.name)
