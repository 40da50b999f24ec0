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

from teal_fast.kernels.blocks import (
    BLOCK,
    BLOCK_TYPES,
    NARROW,
    STRIP,
    SUPER,
    Blocks,
    BlockType,
    dequantize_blocks,
    places,
)

NAMES = ("scale", "minimum", "super_scale", "super_minimum")
VALUES_AT_ONCE = 2**22  # dequantized at a time: 16 MB of fp32, where an output layer may take gigabytes


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
        padded, half = N + -N % NARROW, torch.float16
        planes = tuple(torch.empty(K // BLOCK, BLOCK * padded * bits // 8, dtype=torch.uint8) for bits in kind.planes)
        scale = torch.empty(K // kind.scale_block, padded, dtype=torch.int8 if kind.nested else half)
        minimum = torch.empty(K // BLOCK, padded, dtype=torch.uint8 if kind.nested else half)
        above = torch.empty(K // SUPER, padded, dtype=half)
        return cls(
            Blocks(
                kind,
                planes,
                scale,
                minimum if kind.minimum else None,
                above if kind.nested else None,
                above.clone() if kind.nested and kind.minimum else None,
            ),
            N,
        )

    @property
    def blocks(self) -> Blocks:
        planes = tuple(getattr(self, f"plane{i}") for i in range(len(self.kind.planes)))
        return Blocks(self.kind, planes, *(getattr(self, name) for name in NAMES))

    def pieces(self) -> Iterator[Tensor]:
        """The values, fp32 [K, n] of n outputs at a time."""
        step = max(VALUES_AT_ONCE // self.blocks.K // STRIP, 1) * STRIP
        for begin, end in pairwise([*range(0, self.N, step), self.N]):
            yield dequantize_blocks(some_outputs(self.blocks, begin, begin + step))[:, : end - begin]

    def columns(self, outputs: Tensor) -> Tensor:
        """fp32 [K, T] of the outputs [T]; of others nothing is read."""
        blocks, codes, shift = self.blocks, 0, 0
        strip = outputs // STRIP * STRIP
        width = (blocks.N - strip).clamp(max=STRIP)
        place = places(STRIP).to(outputs.device)[outputs % STRIP]
        for plane, bits in zip(blocks.planes, self.kind.planes, strict=True):
            row = width * bits // 8
            rows = torch.arange(BLOCK, device=outputs.device)[:, None] * row
            stored = plane[:, BLOCK * strip * bits // 8 + rows + place % row]  # [K / BLOCK, BLOCK, T]
            codes = codes | (stored >> (place // row * bits).byte() & (2**bits - 1)) << shift
            shift += bits
        return dequantize_blocks(_with(blocks, (), outputs), codes.flatten(0, 1))


def some_outputs(blocks: Blocks, begin: int, end: int) -> Blocks:
    """The outputs from `begin` to before `end`, multiples of STRIP or beyond the last; tensors are shared."""
    planes = zip(blocks.planes, blocks.kind.planes, strict=True)
    part = tuple(plane[:, BLOCK * begin * bits // 8 : BLOCK * end * bits // 8] for plane, bits in planes)
    return _with(blocks, part, slice(begin, end))


def _with(blocks: Blocks, planes: tuple[Tensor, ...], outputs: Tensor | slice) -> Blocks:
    kind, _, *scales = blocks
    return Blocks(kind, planes, *(None if scale is None else scale[:, outputs] for scale in scales))


class BlockWeight(nn.Module):
    """A linear layer's weight [K, N] in parts, one behind the other along the outputs.

    format: what the file's mixture of types is called.
    """

    scale, operand = None, None

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

    def pieces(self) -> Iterator[Tensor]:
        """The values, fp32 [K, n] of n outputs at a time."""
        for part in self.parts:
            yield from part.pieces()

    def dequantize(self) -> Tensor:
        """fp32 [K, N]."""
        device, begin = self.parts[0].scale.device, 0
        whole = torch.empty(self.in_features, self.out_features, device=device)
        for piece in self.pieces():
            whole[:, begin : (begin := begin + piece.shape[1])] = piece
        return whole

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        wide = x.float() if x.device.type == "cpu" else x
        y = Product.apply(wide, self)
        return (y if bias is None else y + bias).to(x.dtype)

    def sparse_matvec(self, x: Tensor, threshold: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.matmul(x.masked_fill(x.abs() <= threshold, 0), bias)


class Product(torch.autograd.Function):
    """x [..., K] times a weight, in x's dtype. For the gradient by x it is dequantized anew, instead of being kept."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: BlockWeight) -> Tensor:
        context.weight = weight
        return torch.cat([F.linear(x, piece.to(x.dtype).t()) for piece in weight.pieces()], -1)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        begin, found = 0, 0
        for piece in context.weight.pieces():
            part = gradient[..., begin : (begin := begin + piece.shape[1])]
            found = found + F.linear(part, piece.to(gradient.dtype))
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
        return table.columns(tokens.flatten()).t().to(self.dtype).reshape(*tokens.shape, -1)


class BlockOutput(nn.Module):
    """The output layer: logits [..., vocab] of x [..., dim], in x's dtype."""

    def __init__(self, weight: BlockWeight):
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.matmul(x)


def in_blocks(model: nn.Module) -> bool:
    """Whether any of a model's weights, its output layer or its embeddings are in blocks."""
    return any(isinstance(module, BlockWeight) for module in model.modules())
