"""The output layer (LM head) in int8.

It is a fifth of a model like the demo and is read whole for every token: TEAL drops inputs of the blocks' layers only.
Its weight is kept as [vocab, dim], one row per logit, unlike the weights of the sparse layers. An unquantized model has
a plain nn.Linear instead.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from teal_fast.kernels.block_operand import Parts
from teal_fast.kernels.output_gemv import output_gemv
from teal_fast.kernels.packed import PackedWeight
from teal_fast.weights.blocks import BlockWeight
from teal_fast.weights.grids import Int8Grid
from teal_fast.weights.product import product_by_columns

PIECE = 2**24  # values of the output layer that are widened at a time: 64 MB


class Int8Output(nn.Module):
    """logits[v] = scale[v] (weight[v] · x). weight: int8 [vocab, dim], row-major; scale: fp32 [vocab]."""

    def __init__(self, weight: Tensor, scale: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        self.scale = nn.Parameter(scale.contiguous(), requires_grad=False)

    @classmethod
    def pack(cls, weight: Tensor) -> "Int8Output":
        """Rounds weight [vocab, dim] to nearest, with the scales of `Int8Grid.fit`."""
        grid = Int8Grid.fit(weight.t())
        return cls(grid.round(weight.t().float())[0].t(), grid.scale)

    @classmethod
    def empty(cls, vocab_size: int, dim: int) -> "Int8Output":
        """An output layer whose tensors are yet to be filled."""
        return cls(torch.empty(vocab_size, dim, dtype=torch.int8), torch.empty(vocab_size))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim] -> logits [..., vocab], in x's dtype."""
        if x.numel() == x.shape[-1]:
            return output_gemv(x.flatten(), self.weight, self.scale).to(x.dtype).view(*x.shape[:-1], -1)
        return product_by_columns(x.float(), self._columns, len(self.scale)).to(x.dtype)

    def _columns(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """[dim, end - begin]: the rows of these logits, dequantized, as columns."""
        return (self.weight[begin:end] * self.scale[begin:end, None]).to(dtype).t()


def output_weight(output: nn.Module) -> Tensor:
    """The output layer's weight, dequantized if need be: fp32 [vocab, dim]."""
    if isinstance(output, Int8Output):
        return output.weight * output.scale[:, None]
    return output.weight.dequantize().t() if isinstance(output.weight, BlockWeight) else output.weight.float()


def output_pieces(output: nn.Module) -> Iterator[Tensor]:
    """The output layer's weight, as `output_weight` gives it, in pieces fp32 [n, dim] of the vocabulary.

    What is fp32 already comes whole.
    """
    if isinstance(output.weight, BlockWeight):
        yield from (piece.t() for piece in output.weight.pieces())
    elif output.weight.dtype == torch.float32:
        yield output.weight.detach()
    else:
        scale = output.scale[:, None] if isinstance(output, Int8Output) else None
        rows = max(PIECE // output.weight.shape[1], 1)
        for begin in range(0, len(output.weight), rows):
            piece = output.weight[begin : begin + rows].detach()
            yield piece.float() if scale is None else piece * scale[begin : begin + rows]


def operand_of(module: nn.Module) -> PackedWeight | Parts:
    """The weight of an embedding or output layer as the CPU's step takes it: a row for each token, or blocks."""
    weight = module.weight
    return weight.operand if isinstance(weight, BlockWeight) else PackedWeight(weight, getattr(module, "scale", None))
