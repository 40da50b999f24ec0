"""GGUF's quantized tensors as the blocks that are decoded from: the file's own codes and scales, in another order.

Each parser takes the bytes of a tensor's blocks and gives codes and scales by output and input. What the bytes mean is
llama.cpp's (ggml-common.h), as gguf-py's quants.py reads it too.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from teal_fast.kernels.blocks import BLOCK_TYPES, Blocks, pack_blocks

HALF = torch.float16


class Parsed(NamedTuple):
    """codes: uint8 [B, inputs of a block]; the others [B, n] for n scales in a block of the file, or None."""

    codes: Tensor
    scale: Tensor
    minimum: Tensor | None = None
    super_scale: Tensor | None = None
    super_minimum: Tensor | None = None


def nibbles(bytes: Tensor, run: int) -> Tensor:
    """Four-bit codes of bytes [B, n]: of each run of bytes first the low halves, then the high ones."""
    runs = bytes.view(len(bytes), -1, 1, run)
    return torch.cat((runs & 15, runs >> 4), 2).flatten(1)


def bit_planes(bytes: Tensor, bits: int) -> Tensor:
    """Codes of `bits` bits of bytes [B, n]: first the lowest bits of all bytes, then the next ones."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]
    return ((bytes[:, None] >> shifts) & (2**bits - 1)).flatten(1)


def fifth_bits(bytes: Tensor) -> Tensor:
    """uint8 [B, 32] of bytes [B, 4], a little-endian word of bits."""
    return ((bytes[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(1)


def six_bit_scales(bytes: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minimums of 6 bits from bytes [B, 12]; the upper two bits of the last four are apart."""
    scale, minimum, both = bytes[:, :4], bytes[:, 4:8], bytes[:, 8:]
    scales = torch.cat((scale & 63, (both & 15) | (scale >> 2 & 48)), 1)
    return scales.view(torch.int8), torch.cat((minimum & 63, (both >> 4) | (minimum >> 2 & 48)), 1)


def halves(bytes: Tensor) -> Tensor:
    return bytes.contiguous().view(HALF)


def q4_0(b: Tensor) -> Parsed:
    return Parsed(nibbles(b[:, 2:], 16), halves(b[:, :2]))


def q4_1(b: Tensor) -> Parsed:
    return Parsed(nibbles(b[:, 4:], 16), halves(b[:, :2]), halves(b[:, 2:4]))


def q5_0(b: Tensor) -> Parsed:
    return Parsed(nibbles(b[:, 6:], 16) | fifth_bits(b[:, 2:6]) << 4, halves(b[:, :2]))


def q5_1(b: Tensor) -> Parsed:
    codes = nibbles(b[:, 8:], 16) | fifth_bits(b[:, 4:8]) << 4
    return Parsed(codes, halves(b[:, :2]), halves(b[:, 2:4]))


def q8_0(b: Tensor) -> Parsed:
    return Parsed(b[:, 2:] ^ 128, halves(b[:, :2]))  # from -128 … 127 to 0 … 255


def q4_k(b: Tensor) -> Parsed:
    return Parsed(nibbles(b[:, 16:], 32), *six_bit_scales(b[:, 4:16]), halves(b[:, :2]), halves(b[:, 2:4]))


def q5_k(b: Tensor) -> Parsed:
    codes = nibbles(b[:, 48:], 32) | bit_planes(b[:, 16:48], 1) << 4
    return Parsed(codes, *six_bit_scales(b[:, 4:16]), halves(b[:, :2]), halves(b[:, 2:4]))


def q6_k(b: Tensor) -> Parsed:
    upper = bit_planes(b[:, 128:192].reshape(-1, 32), 2).view(len(b), -1)
    codes = nibbles(b[:, :128], 64) | upper << 4
    return Parsed(codes, b[:, 192:208].contiguous().view(torch.int8), None, halves(b[:, 208:]))


def iq4_xs(b: Tensor) -> Parsed:
    upper = bit_planes(b[:, 2:4, None].reshape(-1, 1), 2).view(len(b), 8)
    lower = torch.stack((b[:, 4:8] & 15, b[:, 4:8] >> 4), 2).flatten(1)
    scales = (lower | upper << 4).to(torch.int8) - 32
    return Parsed(nibbles(b[:, 8:], 16), scales, None, halves(b[:, :2]))


PARSERS: dict[str, Callable[[Tensor], Parsed]] = {
    "Q4_0": q4_0,
    "Q4_1": q4_1,
    "Q5_0": q5_0,
    "Q5_1": q5_1,
    "Q8_0": q8_0,
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
    "IQ4_NL": q4_0,
    "IQ4_XS": iq4_xs,
}


def to_blocks(stored: Tensor, name: str, K: int) -> Blocks:
    """The weight [K, N] that a GGUF tensor's bytes, uint8 [N, bytes of K inputs], hold in a type of BLOCK_TYPES."""
    kind, N = BLOCK_TYPES[name], len(stored)
    parsed = PARSERS[name](stored.reshape(N * (K // kind.inputs), -1))

    def turn(part: Tensor | None) -> Tensor | None:  # [B, n] to [K / …, N]
        return None if part is None else part.reshape(N, -1).t()

    return pack_blocks(kind, *map(turn, parsed))
