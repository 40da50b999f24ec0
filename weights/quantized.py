"""TODO."""

import torch
from torch import Tensor, nn

from teal_fast.kernels.compact_gemv import compact_gemv
from teal_fast.kernels.dequantize import widen
from teal_fast.kernels.gate_up import gate_up
from teal_fast.kernels.int4 import pack_int4, row_bytes, row_scales
from teal_fast.kernels.quantized_gemm import MOST_TOKENS, quantized_gemm
from teal_fast.kernels.rows import ALIGNMENT
from teal_fast.kernels.sparse_gemv import sparse_gemv
from teal_fast.weights.dense import Kept, _linear
from teal_fast.weights.grids import TINY, Int4Grid, Int8Grid


class QuantizedWeight(nn.Module):
    """What int8 and int4 share: a scale [N] fp32, and products by kernels that tell formats by their dtype."""

    format: str

    def __init__(self, packed: Tensor, scale: Tensor, group: int = 0):
        super().__init__()
        self.packed = nn.Parameter(packed.contiguous(), requires_grad=False)
        self.scale = nn.Parameter(scale.contiguous(), requires_grad=False)
        self.in_features, self.out_features, self.group = len(packed), len(scale), group

    def dequantize(self) -> Tensor:
        return widen(self.packed, self.scale, self.group)

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The weight is widened for it: a tile at a time for few tokens on CUDA, else a copy of one layer's.

        The former has no gradient; where one is wanted (probe.py) it is not used.
        """
        if x.is_cuda and not x.requires_grad and 0 < x.shape[:-1].numel() <= MOST_TOKENS:
            tokens = x.reshape(-1, x.shape[-1])
            return quantized_gemm(tokens, self.packed, self.scale, bias, self.group).view(*x.shape[:-1], -1)
        dtype = torch.float32 if x.device.type == "cpu" else x.dtype
        return _linear(x, widen(self.packed, self.scale, self.group, dtype), bias)

    def sparse_matvec(self, x: Tensor, threshold: Tensor, bias: Tensor | None = None) -> Tensor:
        return sparse_gemv(x, self.packed, threshold, bias, self.scale, self.group)

    def compact_matvec(self, kept: Kept, arrived: Tensor) -> Tensor:
        return compact_gemv(*kept, self.packed, self.scale, self.group, arrived)

    def compact_gate_up(self, kept: Kept, threshold: Tensor, arrived: Tensor) -> Kept:
        return gate_up(*kept, self.packed, threshold, self.scale, self.group, arrived)


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

    def row_scales(self, rows: int | None = None) -> tuple[Tensor, Tensor]:
        """Scales bf16 [R, N / group] of the first `rows` rows, or of all, and the bytes that follow them, zeros."""
        values, scales = self.out_features // 2, 2 * (self.out_features // self.group)
        part = self.packed[:rows]
        return row_scales(part, self.out_features, self.group), part[:, values + scales :]

    @classmethod
    def empty(cls, K: int, N: int, group: int) -> "Int4Weight":
        return cls(torch.empty(K, row_bytes(N, group), dtype=torch.uint8), torch.empty(N), group)


def check_outputs(N: int) -> None:
    """Raises ValueError unless rows of N int8 values are whole 16 bytes, which GPUs load at once."""
    if N % ALIGNMENT:
        raise ValueError(f"{N} outputs are no multiple of {ALIGNMENT}, as int8 needs: leave this model unquantized")
