"""TODO."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teal_fast.kernels.output_gemv import output_gemv
from teal_fast.weights.grids import Int8Grid


class Int8Output(nn.Module):
    """The output layer in int8: rows [vocab, dim] as an nn.Linear has them, one scale each; never sparse."""

    def __init__(self, weight: Tensor, scale: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        self.scale = nn.Parameter(scale.contiguous(), requires_grad=False)

    @classmethod
    def pack(cls, weight: Tensor) -> "Int8Output":
        grid = Int8Grid.fit(weight.t())
        return cls(grid.round(weight.t().float())[0].t(), grid.scale)

    @classmethod
    def empty(cls, vocab_size: int, dim: int) -> "Int8Output":
        return cls(torch.empty(vocab_size, dim, dtype=torch.int8), torch.empty(vocab_size))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim] -> logits [..., vocab] in x's type."""
        if x.numel() == x.shape[-1]:
            return output_gemv(x.flatten(), self.weight, self.scale).to(x.dtype).view(*x.shape[:-1], -1)
        return F.linear(x.float(), output_weight(self)).to(x.dtype)


def output_weight(output: nn.Module) -> Tensor:
    """The output layer's weight as fp32 [vocab, dim]."""
    return output.weight * output.scale[:, None] if isinstance(output, Int8Output) else output.weight.float()
