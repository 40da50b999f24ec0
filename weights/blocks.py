"""Weights whose values are a GGUF file's own, in llama.cpp's block formats (kernels/blocks.py).

A layer of ours may be made of several tensors of the file, in different types: q, k and v, of which v often has more
bits. It is then made of parts, each with some of the outputs; tensors of one type beside each other are one part.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teal_fast.kernels.block_gemv import block_gemv
from teal_fast.kernels.block_operand import KINDS, Parts, blocks_of, layout_of
from teal_fast.kernels.block_planes import NARROW, STRIP
from teal_fast.kernels.block_values import block_columns, block_outputs
from teal_fast.kernels.blocks import BLOCK_TYPES, Blocks, BlockType
from teal_fast.weights.product import product, product_dtype

NAMES = ("scale", "minimum", "super_scale", "super_minimum")
VALUES_AT_ONCE = 2**22  # dequantized at a time: 8 MB of bf16, where an output layer may take gigabytes


class BlockPart(nn.Module):
    """Some outputs of a weight, all of one type. N: without padding."""

    def __init__(self, blocks: Blocks, N: int):
        super().__init__()
        self.kind, self.N = blocks.kind, N
        for i, plane in enumerate(blocks.planes):
            self.register_parameter(f"plane{i}", nn.Parameter(plane, requires_grad=False))
        for name in NAMES:
            tensor = getattr(blocks, name)
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))

    @classmethod
    def empty(cls, kind: BlockType, K: int, N: int) -> "BlockPart":
        """A part whose tensors are yet to be filled. Raises ValueError on inputs that the type does not divide."""
        if K % kind.inputs:
            raise ValueError(f"{K} inputs are no multiple of {kind.inputs}, as {kind.name} needs")
        layout = layout_of(kind, K, N + -N % NARROW)
        tensors = [None if place is None else torch.empty(place[:-1], dtype=place[-1]) for place in layout]
        return cls(blocks_of(tensors, KINDS.index(kind.name)), N)

    @property
    def blocks(self) -> Blocks:
        planes = tuple(getattr(self, f"plane{i}") for i in range(len(self.kind.planes)))
        return Blocks(self.kind, planes, *(getattr(self, name) for name in NAMES))

    def pieces(self, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
        """The values [K, n] of n outputs at a time."""
        step = max(VALUES_AT_ONCE // self.blocks.K // STRIP, 1) * STRIP
        for begin, end in pairwise([*range(0, self.N, step), self.N]):
            yield block_columns(self.blocks, begin, end, dtype)


class BlockWeight(nn.Module):
    """A linear layer's weight [K, N] in parts, one behind the other along the outputs.

    format: what the file's mixture of types is called.
    """

    def __init__(self, parts: Sequence[BlockPart], format: str = "gguf"):
        super().__init__()
        self.format = format
        self.parts = nn.ModuleList(parts)
        self.in_features, self.out_features = parts[0].blocks.K, sum(part.N for part in parts)

    @classmethod
    def empty(cls, K: int, parts: Sequence[tuple[str, int]], format: str = "gguf") -> "BlockWeight":
        """parts: type and outputs of each. Raises ValueError as `BlockPart.empty` does."""
        return cls([BlockPart.empty(BLOCK_TYPES[name], K, N) for name, N in parts], format)

    @property
    def row_bytes(self) -> int:
        """What is not read of a channel that is skipped: its codes. Scales are read with the other channels' block."""
        return sum(plane.nbytes for part in self.parts for plane in part.blocks.planes) // self.in_features

    def pieces(self, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
        """The values [K, n] of n outputs at a time."""
        for part in self.parts:
            yield from part.pieces(dtype)

    @property
    def operand(self) -> Parts:
        """The weight as kernels take it."""
        return [(part.blocks, part.N) for part in self.parts]

    @property
    def device(self) -> torch.device:
        return self.parts[0].scale.device

    @property
    def nbytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.parameters())

    def dequantize(self) -> Tensor:
        """fp32 [K, N]."""
        device, begin = self.parts[0].scale.device, 0
        whole = torch.empty(self.in_features, self.out_features, device=device)
        for piece in self.pieces():
            whole[:, begin : (begin := begin + piece.shape[1])] = piece
        return whole

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        wide = x.to(product_dtype(x))
        y = Product.apply(wide, self) if x.requires_grad else by_pieces(wide, self)
        return (y if bias is None else y + bias).to(x.dtype)

    def sparse_matvec(self, x: Tensor, threshold: Tensor, bias: Tensor | None = None) -> Tensor:
        return block_gemv(x, self.operand, threshold, bias)

    def sparse_matmul(self, x: Tensor, threshold: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.matmul(x.masked_fill(x.abs() <= threshold, 0), bias)


def by_pieces(x: Tensor, weight: BlockWeight) -> Tensor:
    """x [..., K] times a weight, in x's dtype, a few of its outputs at a time."""
    y, begin = x.new_empty(*x.shape[:-1], weight.out_features), 0  # not torch.cat, which holds all products beside it
    for piece in weight.pieces(x.dtype):
        y[..., begin : (begin := begin + piece.shape[1])] = product(x, piece)
    return y


class Product(torch.autograd.Function):
    """`by_pieces`, for whose gradient by x the weight is dequantized anew, instead of being kept."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: BlockWeight) -> Tensor:
        context.weight = weight
        return by_pieces(x, weight)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        begin, found = 0, 0
        for piece in context.weight.pieces(gradient.dtype):
            part = gradient[..., begin : (begin := begin + piece.shape[1])]
            found = found + F.linear(part, piece)
        return found, None


class BlockEmbedding(nn.Module):
    """Token embeddings [vocab, dim] as a weight of `dim` inputs and `vocab` outputs; of a tied model the output's too.

    dtype: of what it gives.
    """

    def __init__(self, weight: BlockWeight, dtype: torch.dtype):
        super().__init__()
        self.weight, self.dtype = weight, dtype

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [...] -> [..., dim]."""
        (table,) = self.weight.parts
        rows = block_outputs(table.blocks, tokens.flatten(), self.dtype)
        return rows.view(*tokens.shape, -1)


class BlockOutput(nn.Module):
    """The output layer: logits [..., vocab] of x [..., dim], in x's dtype."""

    def __init__(self, weight: BlockWeight):
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == x.shape[-1] and not x.requires_grad:
            everything = x.new_full((x.numel(),), -1, dtype=torch.float32)  # below every |x|
            return self.weight.sparse_matvec(x.flatten(), everything).view(*x.shape[:-1], -1)
        return self.weight.matmul(x)


def in_blocks(model: nn.Module) -> bool:
    """Whether any of a model's weights, its output layer or its embeddings are in blocks."""
    return any(isinstance(module, BlockWeight) for module in model.modules())
