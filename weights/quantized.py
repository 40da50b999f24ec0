"""Quantized weights: int8 with a scale per output, int4 with a scale per group of outputs in each input channel.

int4's groups lie along the outputs, not along the inputs as is usual: a skipped input channel then skips its scales
too, which lie in its row beside its codes. This file ties the layout in memory to the kernels; choosing codes and
scales is the matter of grids.py.
"""

from functools import partial

import torch
from torch import Tensor, nn

from teal_fast.kernels.dequantize import dequantize
from teal_fast.kernels.few_token_gemm import MOST_TOKENS as FEW_TOKENS
from teal_fast.kernels.few_token_gemm import few_token_gemm
from teal_fast.kernels.int4 import pack_int4, row_bytes, row_scales
from teal_fast.kernels.packed import ALIGNMENT, PackedWeight
from teal_fast.kernels.quantized_gemm import MOST_TOKENS, quantized_gemm
from teal_fast.weights.dense import RowSkippingWeight
from teal_fast.weights.grids import EPSILON, Int4Grid, Int8Grid
from teal_fast.weights.product import product_by_columns


class QuantizedWeight(RowSkippingWeight):
    """What int8 and int4 have in common: a scale fp32 [N], and kernels that tell the formats apart by dtype.

    packed: the codes, one row per input channel; group: outputs that share a row scale, 0 for int8.
    """

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
        return dequantize(self.operand, 0, self.out_features)

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Computes x [..., K] -> [..., N] in x's dtype from the dequantized weight.

        On CUDA kernels dequantize values on the way, for up to MOST_TOKENS tokens and where no gradient is needed
        (calibration/probe.py needs one); otherwise the whole weight is dequantized into a temporary copy.
        """
        if x.is_cuda and not x.requires_grad and 0 < (tokens := x.shape[:-1].numel()) <= MOST_TOKENS:
            gemm = few_token_gemm if tokens <= FEW_TOKENS else quantized_gemm
            return gemm(x.reshape(-1, x.shape[-1]), self.operand, bias).view(*x.shape[:-1], -1)
        return product_by_columns(x, partial(dequantize, self.operand), self.out_features, bias)


class Int8Weight(QuantizedWeight):
    """Symmetric int8: w[k, n] = packed[k, n] scale[n]. packed: int8 [K, N]; scale: fp32 [N]."""

    format = "int8"

    @staticmethod
    def grid(weight: Tensor, group: int, importance: Tensor | None = None) -> Int8Grid:
        """The grid of weight [K, N]. Raises ValueError when N does not suit the kernels."""
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
    """Int4 in groups of outputs: w[k, n] = (code[k, n] - 8) row_scale[k, n // group] scale[n].

    packed: uint8 [K, bytes], each row holding its codes and its bf16 row scales (kernels/int4.py); scale: fp32 [N].
    |row_scale| <= 1. Output scales even out the sizes of the outputs, whose groups share row scales (Int4Grid).
    """

    format = "int4"

    @staticmethod
    def grid(weight: Tensor, group: int, importance: Tensor | None = None) -> Int4Grid:
        """The grid of weight [K, N]; importance is not used. Raises ValueError when N does not divide into groups."""
        row_bytes(weight.shape[1], group)
        return Int4Grid.fit(weight, group)

    @classmethod
    def from_codes(cls, grid: Int4Grid, codes: Tensor, row_scales: Tensor) -> "Int4Weight":
        # Row scales move below 1, because the CUDA kernels hold x row_scale in fixed point. Powers of two move from a
        # group's row scales to its output scales without rounding.
        power = row_scales.float().abs().amax(0).clamp(min=EPSILON).log2().ceil().exp2()
        packed = pack_int4(codes, (row_scales / power).bfloat16())
        return cls(packed, grid.scale * power.repeat_interleave(grid.group), grid.group)

    def row_scales(self) -> tuple[Tensor, Tensor]:
        """Scales bf16 [K, N / group] out of the rows, and the bytes that follow them, zeros."""
        values, scales = self.out_features // 2, 2 * (self.out_features // self.group)
        return row_scales(self.packed, self.out_features, self.group), self.packed[:, values + scales :]

    @classmethod
    def empty(cls, K: int, N: int, group: int) -> "Int4Weight":
        return cls(torch.empty(K, row_bytes(N, group), dtype=torch.uint8), torch.empty(N), group)


def check_outputs(N: int) -> None:
    """Raises ValueError unless rows of N int8 values are whole 16 bytes, which GPUs load at once."""
    if N % ALIGNMENT:
        raise ValueError(f"{N} outputs are no multiple of {ALIGNMENT}, as int8 needs: leave this model unquantized")
