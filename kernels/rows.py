"""Loads of rows for Triton kernels: a tile of a weight [K, N] in any form of storage, as fp32.

BITS 16 or 32: rows of floats. 8: rows of int8, as int32 words; their scales are the caller's. 4: rows of
kernels/int4.py, as int32 words.

Converting whole numbers is slow on a GPU (16 a cycle and multiprocessor on Hopper, of other operations 64), so their
bits are not converted but read as a float: below 2 ** 24 any pattern of bits, mostly subnormal numbers, is worth itself
times 2 ** -149. The product with x brings most of that back, and sums do the rest: of the factor, and of the offset by
which values are stored. An x beyond 2 ** 38 overflows on the way.
"""

import torch
from torch import Tensor

from kernels.backend import jit, tl
from kernels.int4 import row_bytes, unpack_int4

ALIGNMENT = 16  # bytes that a thread loads at once


def bits(weight: Tensor) -> int:
    """Bits a value of rows of this type: uint8 holds two of four bits."""
    return 4 if weight.dtype == torch.uint8 else 8 * weight.element_size()


def as_loaded(weight: Tensor) -> Tensor:
    """The rows as `fetch_rows` takes them: floats, or int32 words."""
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


@jit
def fetch_rows(
    weight_ptr, k, inside, first, limit, N, BLOCK_N: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    OFFSET: tl.constexpr,
):  # fmt: skip
    """Columns `first` to first + BLOCK_N, those below `limit`, of the rows k [BLOCK_K] that are inside, as stored.

    Fetched a step ahead, they are on their way while `weigh_rows` takes those before them.
    """
    k = tl.where(inside, k, 0).to(OFFSET)[:, None]
    W: tl.constexpr = BLOCK_N * BITS // 32
    # Whole 16 bytes, which the compiler does not see: it would load words one by one.
    word = (tl.multiple_of(first * BITS // 32, 4) + tl.arange(0, W))[None, :]
    mask = inside[:, None] & (word < tl.multiple_of(limit * BITS // 32, 4))
    scale = tl.full((1, 1), 0.0, tl.bfloat16)
    if BITS == 4:
        row = weight_ptr + k * _words_a_row(N, GROUP)
        w = tl.load(row + word, mask=mask, other=0, eviction_policy="evict_first")
        block = (first // 32 + tl.arange(0, W // 4))[None, :]  # of 32 columns
        scales = (row + N // 8).to(tl.pointer_type(tl.bfloat16)) + block * 32 // GROUP
        scale = tl.load(scales, mask=inside[:, None] & (block * 32 < limit), other=0.0)
    elif BITS == 8:
        w = tl.load(
            weight_ptr + k * tl.multiple_of(N // 4, 4) + word, mask=mask, other=0, eviction_policy="evict_first"
        )
    else:
        n = (first + tl.arange(0, BLOCK_N))[None, :]
        mask = inside[:, None] & (n < limit)
        w = tl.load(weight_ptr + (k * N + n), mask=mask, other=0.0, eviction_policy="evict_first")
    return w, scale


@jit
def weigh_rows(w, scale, x, BITS: tl.constexpr):
    """x [BLOCK_K] fp32 times fetched rows [BLOCK_K, BLOCK_N], and what their offset counts in it: `settle` has sums."""
    x = x[:, None]
    if BITS == 4:
        x = x * scale.to(tl.float32)
        product = _weigh_int4(tl.reshape(w, (w.shape[0], w.shape[1] // 4, 4)), x[:, :, None])
    elif BITS == 8:
        product = _weigh_int8(w, x)
    else:
        product = w.to(tl.float32) * x
    return product, x


@jit
def add_rows(y, product, STEPS: tl.constexpr):
    """y [ROWS, N] plus product [STEPS * ROWS, N] within threads, one after another, which fuses product and sum."""
    if STEPS == 2:
        a, b = _halves(product)
        y = y + a + b
    elif STEPS == 4:
        first, second = _halves(product)
        a, b = _halves(first)
        c, d = _halves(second)
        y = y + a + b + c + d
    else:
        y += tl.sum(tl.reshape(product, (STEPS, y.shape[0], y.shape[1])), axis=0)
    return y


@jit
def _halves(x):
    K: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    return tl.split(tl.permute(tl.reshape(x, (2, K // 2, N)), (1, 2, 0)))


@jit
def settle(y, offset, BITS: tl.constexpr):
    """The products' sums y [N], less what is due to the values' offset [B]."""
    if BITS <= 8:
        B: tl.constexpr = offset.shape[0]
        N: tl.constexpr = y.shape[0]
        each = tl.reshape(tl.broadcast_to(offset[:, None], (B, N // B)), (N,))
        y = y * 2.0**60 - each * (128.0 if BITS == 8 else 8.0)
    return y


@jit
def _words_a_row(N, GROUP: tl.constexpr):
    return tl.multiple_of(tl.cdiv(N // 2 + 2 * (N // GROUP), 32) * 8, 8)  # row_bytes of kernels/int4.py


@jit
def _float(words):
    return words.to(tl.float32, bitcast=True)


@jit
def _weigh_int8(words, x):
    """[K, 4 W]: the bytes of words [K, W] plus 128, times x [K, 1] and 2 ** -60."""
    words = words ^ -2139062144  # 0x80808080: to 0 … 255
    a = _float(words & 0xFF) * (x * 2.0**89)
    b = _float(words & 0xFF00) * (x * 2.0**81)
    c = _float(words & 0xFF0000) * (x * 2.0**73)
    d = _float((words >> 8) & 0xFF0000) * (x * 2.0**73)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (words.shape[0], words.shape[1] * 4))


@jit
def _weigh_int4(words, x):
    """[K, 32 B]: the values in words [K, B, 4], as kernels/int4.py packs them, times x [K, B, 1] and 2 ** -60."""
    a = _float(words & 0xF) * (x * 2.0**89)
    b = _float(words & 0xF00) * (x * 2.0**81)
    c = _float(words & 0xF0000) * (x * 2.0**73)
    d = _float((words >> 8) & 0xF0000) * (x * 2.0**73)
    e = _float(words & 0xF0) * (x * 2.0**85)
    f = _float(words & 0xF000) * (x * 2.0**77)
    g = _float(words & 0xF00000) * (x * 2.0**69)
    h = _float((words >> 8) & 0xF00000) * (x * 2.0**69)
    low = tl.join(tl.join(a, c), tl.join(b, d))  # [K, B, 4, 2, 2], a word's four in their order
    high = tl.join(tl.join(e, g), tl.join(f, h))
    K: tl.constexpr = words.shape[0]
    B: tl.constexpr = words.shape[1]
    both = tl.join(tl.reshape(low, (K, B, 16)), tl.reshape(high, (K, B, 16)))
    return tl.reshape(tl.permute(both, (0, 1, 3, 2)), (K, 32 * B))
