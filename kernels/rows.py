"""Rows of a weight [K, N] in any form of storage: what kernels must know of them, and a plain load for Triton.

BITS 16 or 32: floats. 8: int8, whose scales are the caller's. 4: rows of kernels/int4.py.
"""

import torch
from torch import Tensor

from teal_fast.kernels.backend import jit, tl
from teal_fast.kernels.int4 import row_bytes, unpack_int4

ALIGNMENT = 16  # bytes that a thread loads at once


def bits(weight: Tensor) -> int:
    """Bits a value of rows of this type: uint8 holds two of four bits."""
    return 4 if weight.dtype == torch.uint8 else 8 * weight.element_size()


def as_loaded(weight: Tensor) -> Tensor:
    """The rows as kernels/walk.py takes them: floats, or int32 words."""
    return weight if weight.is_floating_point() else weight.view(torch.int32)


def to_float(weight: Tensor, N: int, group: int) -> Tensor:
    """fp32 [K, N] of rows in any form, those of int8 without their scales."""
    return unpack_int4(weight, N, group) if bits(weight) == 4 else weight.float()


def outputs(weight: Tensor, scale: Tensor | None) -> int:
    """The N of rows [K, N]: quantized ones have a scale for each, floats are as wide as they look."""
    return weight.shape[1] if scale is None else scale.shape[0]


def check_rows(op: str, value: Tensor, weight: Tensor, scale: Tensor | None, group: int) -> int:
    """The N of rows [K, N] for inputs like value. Raises ValueError naming `op` when form or scales do not fit."""
    form, flat = bits(weight), weight.ndim == 2 and (scale is None or scale.ndim == 1)
    N = outputs(weight, scale) if flat else 0
    if form > 8:
        fits = flat and scale is None and weight.dtype == value.dtype
    else:
        fits = flat and scale is not None and scale.dtype == torch.float32 and N % ALIGNMENT == 0
        fits = fits and weight.dtype in (torch.int8, torch.uint8)
        fits = fits and weight.shape[1] == (row_bytes(N, group) if form == 4 else N)
    if not fits:
        scales = "no scale" if scale is None else f"scale {list(scale.shape)} {scale.dtype}"
        raise ValueError(
            f"{op} takes rows [K, N] in {value.dtype}, or in int8 or four-bit groups with a scale [N] fp32 for N in "
            f"whole sixteens, got {list(weight.shape)} {weight.dtype}, {scales}, group {group}"
        )
    return N


def check_bias(op: str, value: Tensor, bias: Tensor | None, N: int) -> None:
    """Raises ValueError naming `op` when there is a bias that does not fit N outputs in value's type."""
    if bias is not None and (bias.shape != (N,) or bias.dtype != value.dtype):
        raise ValueError(f"{op} takes bias [N] in x's type, got {list(bias.shape)}, {bias.dtype}")


@jit
def load_rows(weight_ptr, k, inside, column, N, BLOCK_N: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr):
    """fp32 [BLOCK_K, BLOCK_N]: columns from `column` on of the rows k that are inside, zero elsewhere.

    Of rows in their order; kernels/walk.py is made for those of a list. Whole numbers become floats by their bits: of
    conversions a GPU does fewer at a time.
    """
    k, n = k.to(tl.int64)[:, None], column + tl.arange(0, BLOCK_N)
    if BITS == 4:
        row = weight_ptr + k * (tl.cdiv(N // 2 + 2 * (N // GROUP), 32) * 32)  # row_bytes of kernels/int4.py
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
        w = tl.load(weight_ptr + (k * N + n[None, :]), mask=inside[:, None] & (n < N)[None, :], other=0)
        w = _to_float(w.to(tl.int32)) if BITS == 8 else w.to(tl.float32)
    return w


@jit
def _to_float(x):
    """Whole numbers of less than 2 ** 22 in size."""
    return (x + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0  # the bits of that number, in whose ones x is
