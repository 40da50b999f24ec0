"""TODO."""

import torch
from torch import Tensor, nn

from teal_fast.kernels.compact_gemv import compact_gemv
from teal_fast.kernels.compact_vector import CompactVector
from teal_fast.kernels.dequantize import dequantize
from teal_fast.kernels.gate_up import gate_up
from teal_fast.kernels.int4 import pack_int4, row_bytes
from teal_fast.kernels.packed import ALIGNMENT, PackedWeight
from teal_fast.kernels.quantized_gemm import MOST_TOKENS, quantized_gemm
from teal_fast.kernels.sparse_gemv import sparse_gemv
from teal_fast.weights.dense import _linear
from teal_fast.weights.grids import TINY, Int4Grid, Int8Grid


class QuantizedWeight(nn.Module):
    """What int8 and int4 share: a scale [N] fp32, and products by kernels that tell formats by their dtype."""

    format: str

    def __init__(self, packed: Tensor, scale: Tensor, group: int = 0):
        super().__init__()
        self.packed = nn.Parameter(packed.contiguous(), requires_grad=False)
        self.scale = nn.Parameter(scale.contiguous(), requires_grad=False)
        self.in_features, self.out_features, self.group = len(packed), len(scale), group

    @property
    def operand(self) -> PackedWeight:
        """The weight as kernels take it."""
        return PackedWeight(self.packed, self.scale, self.group)

    def dequantize(self) -> Tensor:
        return dequantize(self.operand)

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The weight is dequantized for it: a tile at a time for few tokens on CUDA, else one layer's as a whole.

        The former has no gradient; where one is wanted (probe.py) it is not used.
        """
        if x.is_cuda and not x.requires_grad and 0 < x.shape[:-1].numel() <= MOST_TOKENS:
            return quantized_gemm(x.reshape(-1, x.shape[-1]), self.operand, bias).view(*x.shape[:-1], -1)
        dtype = torch.float32 if x.device.type == "cpu" else x.dtype
        return _linear(x, dequantize(self.operand, dtype), bias)

    def sparse_matvec(self, x: Tensor, threshold: Tensor, bias: Tensor | None = None) -> Tensor:
        return sparse_gemv(x, self.operand, threshold, bias)

    def compact_matvec(self, x: CompactVector, semaphores: Tensor) -> Tensor:
        return compact_gemv(x, self.operand, semaphores)

    def compact_gate_up(self, x: CompactVector, threshold: Tensor, semaphores: Tensor) -> CompactVector:
        return gate_up(x, self.operand, threshold, semaphores)


class Int8Weight(QuantizedWeight):
    """Rows [K, N] of int8, symmetric, with one fp32 scale [N] an output channel: w[k, n] = packed[k, n] scale[n]."""

    format = "int8"

    @staticmethod
    def grid(weight: Tensor, group: int, importance: Tensor | None = None) -> Int8Grid:
        """Raises ValueError when the kernels take no such number of outputs."""
        check_outputs(weight.shape[1])
        return Int8Grid.fit(weight, importance)

    @classmethod
    def from_codes(cls, grid: Int8Grid, codes: Tensor) -> "Int8Weight":
        return cls(codes, grid.scale)

    @classmethod
    def empty(cls, K: int, N: int, group: int) -> "Int8Weight":
        check_outputs(N)
        return cls(torch.empty(K, N, dtype=torch.int8), torch.empty(N))


class Int4Weight(QuantizedWeight):
    """Rows of four-bit values with a bf16 scale for every `group` outputs (kernels/int4.py), and a scale [N] fp32.

    w[k, n] = (value[k, n] - 8) row_scale[k, n // group] scale[n]. Row scales, at most 1, lie in their row, so that a
    skipped channel skips them too; those of the outputs even out what would else be a group of large and small weights.
    """

    format = "int4"

    @staticmethod
    def grid(weight: Tensor, group: int, importance: Tensor | None = None) -> Int4Grid:
        """Raises ValueError when groups of that size do not fit."""
        row_bytes(weight.shape[1], group)
        return Int4Grid.fit(weight, group)

    @classmethod
    def from_codes(cls, grid: Int4Grid, values: Tensor, scales: Tensor) -> "Int4Weight":
        # At most 1, so that a GPU's fixed point holds x times any of them. A power of two moves without rounding.
        power = scales.float().abs().amax(0).clamp(min=TINY).log2().ceil().exp2()
        rows = pack_int4(values, (scales / power).bfloat16())
        return cls(rows, grid.scale * power.repeat_interleave(grid.group), grid.group)

    @classmethod
    def empty(cls, K: int, N: int, group: int) -> "Int4Weight":
        return cls(torch.empty(K, row_bytes(N, group), dtype=torch.uint8), torch.empty(N), group)


def check_outputs(N: int) -> None:
    """Raises ValueError unless rows of N int8 values are whole 16 bytes, which GPUs load at once."""
    if N % ALIGNMENT:
        raise ValueError(f"{N} outputs are no multiple of {ALIGNMENT}, as int8 needs: leave this model unquantized")
