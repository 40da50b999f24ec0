"""How a linear layer's weight is stored, and the products that every form of storage offers.

In every form an input channel is one contiguous row, so that skipping a channel skips one run of memory. `Form.pack`
makes a quantized one of a weight [K, N].
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.compact_gemv import compact_gemv
from kernels.gate_up import gate_up
from kernels.int4 import pack_int4, row_bytes
from kernels.output_gemv import output_gemv
from kernels.quantized_gemm import MOST_TOKENS, quantized_gemm
from kernels.rows import ALIGNMENT
from kernels.sparse_gemv import sparse_gemv
from kernels.widen import widen
from rounding import TINY, Int4Grid, Int8Grid, feed_back

Kept = tuple[Tensor, Tensor, Tensor]  # index, value, count of a vector's kept channels: kernels/compact_gemv.py


class Weight(Protocol):
    rows: Tensor
    scale: Tensor | None  # fp32 [N], times what the rows give
    in_features: int
    out_features: int
    form: str

    def dequantize(self) -> Tensor: ...  # [K, N]
    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor: ...  # x [..., K] -> [..., N], every channel
    def sparse_matvec(self, x: Tensor, threshold: Tensor, bias: Tensor | None = None) -> Tensor: ...  # x [K] -> [N]
    def compact_matvec(
        self, kept: Kept, arrived: Tensor
    ) -> Tensor: ...  # fp32 [N], on CUDA; counts: kernels/arrivals.py
    # SiLU(gate) ⊙ up, compacted, on CUDA, of rows whose columns are gate and up
    def compact_gate_up(self, kept: Kept, threshold: Tensor, arrived: Tensor) -> Kept: ...


class DenseWeight(nn.Module):
    """Rows [K, N] in fp32, bf16 or fp16."""

    form, scale = "dense", None

    def __init__(self, rows: Tensor):
        super().__init__()
        self.rows = nn.Parameter(rows.contiguous(), requires_grad=False)
        self.in_features, self.out_features = rows.shape

    def dequantize(self) -> Tensor:
        return self.rows

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return _linear(x, self.rows, bias)

    def sparse_matvec(self, x: Tensor, threshold: Tensor, bias: Tensor | None = None) -> Tensor:
        return sparse_gemv(x, self.rows, threshold, bias)

    def compact_matvec(self, kept: Kept, arrived: Tensor) -> Tensor:
        return compact_gemv(*kept, self.rows, None, 0, arrived)

    def compact_gate_up(self, kept: Kept, threshold: Tensor, arrived: Tensor) -> Kept:
        return gate_up(*kept, self.rows, threshold, None, 0, arrived)


class QuantizedWeight(nn.Module):
    """What int8 and int4 share: a scale [N] fp32, and products by kernels that know a form by the type of its rows."""

    form: str

    def __init__(self, rows: Tensor, scale: Tensor, group: int = 0):
        super().__init__()
        self.rows = nn.Parameter(rows.contiguous(), requires_grad=False)
        self.scale = nn.Parameter(scale.contiguous(), requires_grad=False)
        self.in_features, self.out_features, self.group = len(rows), len(scale), group

    def dequantize(self) -> Tensor:
        return widen(self.rows, self.scale, self.group)

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The weight is widened for it: a tile at a time for few tokens on CUDA, else a copy of one layer's.

        The former has no gradient; where one is wanted (probe.py) it is not used.
        """
        if x.is_cuda and not x.requires_grad and 0 < x.shape[:-1].numel() <= MOST_TOKENS:
            tokens = x.reshape(-1, x.shape[-1])
            return quantized_gemm(tokens, self.rows, self.scale, bias, self.group).view(*x.shape[:-1], -1)
        dtype = torch.float32 if x.device.type == "cpu" else x.dtype
        return _linear(x, widen(self.rows, self.scale, self.group, dtype), bias)

    def sparse_matvec(self, x: Tensor, threshold: Tensor, bias: Tensor | None = None) -> Tensor:
        return sparse_gemv(x, self.rows, threshold, bias, self.scale, self.group)

    def compact_matvec(self, kept: Kept, arrived: Tensor) -> Tensor:
        return compact_gemv(*kept, self.rows, self.scale, self.group, arrived)

    def compact_gate_up(self, kept: Kept, threshold: Tensor, arrived: Tensor) -> Kept:
        return gate_up(*kept, self.rows, threshold, self.scale, self.group, arrived)


class Int8Weight(QuantizedWeight):
    """Rows [K, N] of int8, symmetric, with one fp32 scale [N] an output channel: w[k, n] = rows[k, n] scale[n]."""

    form = "int8"

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

    form = "int4"

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


def _linear(x: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] times rows [K, N], plus bias, in x's type."""
    if x.device.type == "cpu" and x.dtype != torch.float32:
        # A CPU without bf16 matrix instructions multiplies bf16 9x slower than fp32 (512x576x1536 on Zen 3).
        return F.linear(x.float(), rows.float().t(), None if bias is None else bias.float()).to(x.dtype)
    return F.linear(x, rows.t(), bias)


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


@dataclass(frozen=True)
class Form:
    """A form of storage as a checkpoint's metadata name it; `group`: outputs that share a scale in int4.

    A checkpoint in int4 has attention's weights in int8: they are a quarter, and in int4 they lose more than the
    others.
    """

    name: str
    group: int = 0

    @classmethod
    def read(cls, metadata: dict[str, str]) -> "Form | None":
        """The form of quantized weights, None of others. Raises ValueError on an unknown one."""
        name = metadata.get("weights")
        if name == "int4" and metadata.get("row_scales") != "at most 1":
            raise ValueError("the checkpoint's int4 weights are of an earlier version: quantize it again")
        if name not in (None, *QUANTIZED):
            raise ValueError(f"the checkpoint's weights are {name}, unknown here: is it from a later version?")
        return None if name is None else cls(name, int(metadata.get("group", 0)))

    def metadata(self) -> dict[str, str]:
        return {"weights": self.name} | ({"group": str(self.group), "row_scales": "at most 1"} if self.group else {})

    def within(self, name: str) -> "Form":
        """The form of the layer called so."""
        return Form("int8") if ".attention." in name else self

    def empty(self, K: int, N: int) -> Weight:
        """A weight [K, N] of this form that is yet to be filled."""
        return QUANTIZED[self.name].empty(K, N, self.group)

    def pack(self, weight: Tensor, hessian: Tensor | None = None) -> Weight:
        """weight [K, N] rounded: to nearest, or for inputs with these second moments [K, K]. Raises on a misfit."""
        importance = None if hessian is None else hessian.diagonal()
        grid = QUANTIZED[self.name].grid(weight, self.group, importance)
        codes = grid.round(weight.float()) if hessian is None else feed_back(weight, hessian, grid)
        return QUANTIZED[self.name].from_codes(grid, *codes)


QUANTIZED = {"int8": Int8Weight, "int4": Int4Weight}


def output_weight(output: nn.Module) -> Tensor:
    """The output layer's weight as fp32 [vocab, dim]."""
    return output.weight * output.scale[:, None] if isinstance(output, Int8Output) else output.weight.float()
