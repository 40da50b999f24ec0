"""What a sparse layer asks of its weight, whatever its format, and the unquantized weight that answers it.

A weight lies as [K, N]: each input channel is one contiguous row, so that a dropped channel's row is never read. The
protocol keeps formats out of the layers (sparse_model.py) and of the engine. Quantized weights are in quantized.py.
"""

from typing import Protocol

from torch import Tensor, nn

from teal_fast.kernels.compact_gemv import compact_gemv
from teal_fast.kernels.compact_vector import CompactVector
from teal_fast.kernels.gate_up import gate_up
from teal_fast.kernels.packed import PackedWeight
from teal_fast.kernels.sparse_gemm import MOST_TOKENS, sparse_gemm
from teal_fast.kernels.sparse_gemv import sparse_gemv
from teal_fast.weights.product import product, product_by_columns, product_dtype


class Weight(Protocol):
    """A linear layer's weight [K, N] in some format, and the products with it that decoding and prompts need.

    The matvecs skip rows: `sparse_matvec` those with |x| <= threshold, on any device; the two `compact` ones, on CUDA
    only and not of weights in blocks, all rows but those that a vector's list of kept channels names. `sparse_matmul`
    drops each token's own channels, whatever it reads for it.
    """

    in_features: int
    out_features: int
    format: str
    row_bytes: int  # what is not read of a channel that is skipped

    def dequantize(self) -> Tensor: ...  # [K, N]
    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor: ...  # x [..., K] -> [..., N], every channel
    def sparse_matvec(self, x: Tensor, threshold: Tensor, bias: Tensor | None = None) -> Tensor: ...  # x [K] -> [N]
    def sparse_matmul(self, x: Tensor, threshold: Tensor, bias: Tensor | None = None) -> Tensor: ...  # [M, K] -> [M, N]
    def compact_matvec(self, x: CompactVector, semaphores: Tensor) -> Tensor: ...  # fp32 [N], on CUDA
    # SiLU(gate) ⊙ up, compacted, on CUDA, of rows whose columns are gate and up
    def compact_gate_up(self, x: CompactVector, threshold: Tensor, semaphores: Tensor) -> CompactVector: ...


class RowSkippingWeight(nn.Module):
    """The products that skip rows: they are the same for every format, since kernels take the weight as its operand."""

    packed: Tensor
    scale: Tensor | None  # fp32 [N]: each output is multiplied by its own; None: by 1
    operand: PackedWeight

    @property
    def row_bytes(self) -> int:
        return self.packed[0].nbytes

    def sparse_matvec(self, x: Tensor, threshold: Tensor, bias: Tensor | None = None) -> Tensor:
        return sparse_gemv(x, self.operand, threshold, bias)

    def sparse_matmul(self, x: Tensor, threshold: Tensor, bias: Tensor | None = None) -> Tensor:
        # On a CPU the same kernel over all rows is 1.2 to 1.4x slower for 2 tokens at 50 % and as fast for 8, PyTorch's
        # product 6x slower or more (batch-cpu.json, Zen 3). On an H200 a layer of Llama-3-8B in bf16 took 179 us for 2
        # tokens when rows were united and 163 densely, in int8 220 and 114 (batch-h200.json).
        if x.device.type == "cpu" and len(x) <= MOST_TOKENS:
            return sparse_gemm(x, self.operand, threshold, bias)
        return self.matmul(x.masked_fill(x.abs() <= threshold, 0), bias)

    def compact_matvec(self, x: CompactVector, semaphores: Tensor) -> Tensor:
        return compact_gemv(x, self.operand, semaphores)

    def compact_gate_up(self, x: CompactVector, threshold: Tensor, semaphores: Tensor) -> CompactVector:
        return gate_up(x, self.operand, threshold, semaphores)


class DenseWeight(RowSkippingWeight):
    """An unquantized weight [K, N] in fp32, bf16 or fp16."""

    format, scale = "dense", None

    def __init__(self, packed: Tensor):
        super().__init__()
        self.packed = nn.Parameter(packed.contiguous(), requires_grad=False)
        self.in_features, self.out_features = packed.shape

    @property
    def operand(self) -> PackedWeight:
        """The weight as kernels take it."""
        return PackedWeight(self.packed)

    def dequantize(self) -> Tensor:
        return self.packed

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if product_dtype(x) == self.packed.dtype:
            return product(x, self.packed, bias)
        return product_by_columns(
            x, lambda begin, end, dtype: self.packed[:, begin:end].to(dtype), self.out_features, bias
        )
