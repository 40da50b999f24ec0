"""What kernels must know of a packed weight [K, N], and a plain load of its rows for Triton.

A row is an input channel, one contiguous run of memory (W transposed, row-major). It holds floats, or int8, or four-bit
values in groups of `group` with their scales (kernels/int4.py); a quantized weight has a scale [N] fp32 besides.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from teal_fast.kernels.backend import jit, tl
from teal_fast.kernels.int4 import row_bytes, unpack_int4

# An op's rows in a table of kernels/checks.py, and its arguments in a schema.
WEIGHT_TABLE = "packed [K, row]; scale [N] fp32 or none"
WEIGHT_ARGUMENTS = "Tensor packed, Tensor? scale, int group"
ALIGNMENT = 16  # bytes that a thread loads at once


def bits(packed: Tensor) -> int:
    """Bits a value: uint8 holds two of four bits."""
    return 4 if packed.dtype == torch.uint8 else 8 * packed.element_size()


class PackedWeight(NamedTuple):
    """packed [K, N] floats or int8, or uint8 [K, row_bytes]; scale fp32 [N] of int8 and int4; group: outputs of int4
    that share a scale of a row."""

    packed: Tensor
    scale: Tensor | None = None
    group: int = 0

    @property
    def N(self) -> int:
        return self.packed.shape[1] if self.scale is None else self.scale.shape[0]

    @property
    def bits(self) -> int:
        return bits(self.packed)

    @property
    def words(self) -> Tensor:
        """packed as kernels/gather_gemv_loop.py takes it: floats, or int32 words."""
        return self.packed if self.packed.is_floating_point() else self.packed.view(torch.int32)

    def values(self, k: Tensor | slice = slice(None)) -> Tensor:
        """fp32 [K, N], or its rows k, without `scale`."""
        rows = self.packed[k]
        return unpack_int4(rows, self.N, self.group) if self.bits == 4 else rows.float()


def check_weight(op: str, weight: PackedWeight, dtype: torch.dtype | None) -> int:
    """The weight's N. Raises ValueError naming `op` when it is neither of floats of this dtype nor quantized.

    What WEIGHT_TABLE says is left to `takes`.
    """
    packed, scale, group = weight
    if scale is None and packed.dtype == dtype and dtype.is_floating_point:
        return packed.shape[-1]
    if scale is not None and packed.dtype in (torch.int8, torch.uint8):
        N = scale.numel()
        if N % ALIGNMENT == 0 and packed.shape[-1] == (N if packed.dtype == torch.int8 else row_bytes(N, group)):
            return N
    scales = "no scale" if scale is None else f"scale {list(scale.shape)} {scale.dtype}"
    floats = f"in {dtype}, or " if dtype else ""
    raise ValueError(
        f"{op} takes a weight [K, N] {floats}in int8 or four-bit groups with a scale [N] for N in whole sixteens, "
        f"got {list(packed.shape)} {packed.dtype}, {scales}, group {group}"
    )


@jit
def load_rows(packed_ptr, k, inside, column, N, BLOCK_N: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr):
    """fp32 [BLOCK_K, BLOCK_N]: columns from `column` on of the rows k that are inside, zero elsewhere.

    It is for rows in their order; kernels/gather_gemv_loop.py is for those of a list. Whole numbers become floats by
    their bits: a GPU does fewer conversions at a time.
    """
    k, n = k.to(tl.int64)[:, None], column + tl.arange(0, BLOCK_N)
    if BITS == 4:
        row = packed_ptr + k * (tl.cdiv(N // 2 + 2 * (N // GROUP), 32) * 32)  # row_bytes of kernels/int4.py
        byte = column // 2 + tl.arange(0, BLOCK_N // 2)
        both = tl.load(row + byte[None, :], mask=inside[:, None] & (byte < N // 2)[None, :], other=0)
        both = tl.reshape(both.to(tl.int32), (k.shape[0], BLOCK_N // 32, 16))
        value = tl.permute(tl.join(both & 15, both >> 4), (0, 1, 3, 2))  # 16 bytes hold 32 values
        block = column // 32 + tl.arange(0, BLOCK_N // 32)[None, :]
        scales = (row + N // 2).to(tl.pointer_type(tl.bfloat16)) + block * 32 // GROUP
        scale = tl.load(scales, mask=inside[:, None] & (block * 32 < N), other=0.0).to(tl.float32)
        w = (_to_float(value) - 8.0) * scale[:, :, None, None]
        w = tl.reshape(w, (k.shape[0], BLOCK_N))
    else:
        w = tl.load(packed_ptr + (k * N + n[None, :]), mask=inside[:, None] & (n < N)[None, :], other=0)
        w = _to_float(w.to(tl.int32)) if BITS == 8 else w.to(tl.float32)
    return w


@jit
def _to_float(x):
    """Whole numbers of less than 2 ** 22 in size."""
    return (x + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0  # the bits of that number, in whose ones x is
