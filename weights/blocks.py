"""Weights whose values are a GGUF file's own, in llama.cpp's block formats (kernels/blocks.py).

A layer of ours may be made of several tensors of the file, in different types: q, k and v, of which v often has more
bits. It is then made of parts, each with some of the outputs; tensors of one type beside each other are one part.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teal_fast.kernels.block_gemv import block_gemv
from teal_fast.kernels.block_values import block_columns, block_outputs
from teal_fast.kernels.blocks import BLOCK, BLOCK_TYPES, NARROW, SUPER, Blocks, BlockType, dequantize_blocks

COLUMNS = 512  # outputs whose weights a prompt's product dequantizes at a time: up to 9 MB of 8,960 inputs in bf16
NAMES = ("scale", "minimum", "super_scale", "super_minimum")


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

    def dequantize(self) -> Tensor:
        """fp32 [K, N]."""
        return dequantize_blocks(self.blocks)[:, : self.N]


class BlockWeight(nn.Module):
    """A linear layer's weight [K, N] in parts, one behind the other along the outputs."""

    format, scale = "gguf", None

    def __init__(self, parts: Sequence[BlockPart]):
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.in_features, self.out_features = parts[0].blocks.K, sum(part.N for part in parts)

    @classmethod
    def empty(cls, K: int, parts: Sequence[tuple[str, int]]) -> "BlockWeight":
        """parts: type and outputs of each. Raises ValueError as `BlockPart.empty` does."""
        return cls([BlockPart.empty(BLOCK_TYPES[name], K, N) for name, N in parts])

    @property
    def operand(self) -> list[tuple[Blocks, int]]:
        """The weight as kernels take it."""
        return [(part.blocks, part.N) for part in self.parts]

    @property
    def device(self) -> torch.device:
        return self.parts[0].scale.device

    @property
    def nbytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.parameters())

    @property
    def row_bytes(self) -> float:
        """Bytes of codes that a kept channel reads. Scales come on top, once for a block of channels of which one is."""
        return sum(plane.nbytes for part in self.parts for plane in part.blocks.planes) / self.in_features

    def dequantize(self) -> Tensor:
        return torch.cat([part.dequantize() for part in self.parts], 1)

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype. No more than COLUMNS outputs' weights are dequantized at a time."""
        dtype = product_dtype(x)
        wide, y = x.to(dtype), []
        for part in self.parts:
            for begin in range(0, part.N, COLUMNS):
                columns = block_columns(part.blocks, begin, min(begin + COLUMNS, part.N), dtype)
                y.append(F.linear(wide, columns.t()).to(x.dtype))
        y = torch.cat(y, -1)
        return y if bias is None else y + bias

    def sparse_matvec(self, x: Tensor, threshold: Tensor, bias: Tensor | None = None) -> Tensor:
        return block_gemv(x, self.operand, threshold, bias)

    def rows(self, outputs: Tensor, dtype: torch.dtype) -> Tensor:
        """Weights [T, K] of outputs int64 [T]."""
        y, first = torch.empty(len(outputs), self.in_features, dtype=dtype, device=outputs.device), 0
        for part in self.parts:
            mine = (outputs >= first) & (outputs < first + part.N)
            y[mine] = block_outputs(part.blocks, outputs[mine] - first, dtype)
            first += part.N
        return y


def product_dtype(x: Tensor) -> torch.dtype:
    """What a prompt is multiplied in: x's dtype where the device has products in it, else fp32."""
    has = x.is_cuda or (x.dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported())
    return x.dtype if has else torch.float32


class BlockEmbedding(nn.Module):
    """Token embeddings [vocab, dim] as a weight of `dim` inputs and `vocab` outputs; of a tied model the output's too.

    dtype: of what it gives.
    """

    def __init__(self, weight: BlockWeight, dtype: torch.dtype):
        super().__init__()
        self.weight, self.dtype = weight, dtype

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [...] -> [..., dim]."""
        return self.weight.rows(tokens.flatten(), self.dtype).view(*tokens.shape, -1)


class BlockOutput(nn.Module):
    """The output layer: logits [..., vocab] of x [..., dim], in x's dtype."""

    def __init__(self, weight: BlockWeight):
        super().__init__()
        self.weight = weight
        everything = torch.full((weight.in_features,), -1.0, device=weight.device)
        self.register_buffer("threshold", everything, persistent=False)  # below every |x|: no channel is skipped

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == x.shape[-1]:
            return self.weight.sparse_matvec(x.flatten(), self.threshold).view(*x.shape[:-1], -1)
        return self.weight.matmul(x)
