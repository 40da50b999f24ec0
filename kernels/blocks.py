"""Weights in llama.cpp's block formats, re-laid so that a skipped input channel is skipped in memory.

A GGUF tensor holds an output's weights in a row, whose inputs share scales in blocks of 16 or 32. Its codes are kept
here as [K, N], as all weights are: an input channel is a contiguous row. (In pieces of 64 bytes, one for 128 outputs,
of which a block's lay together, nothing was won by skipping half of them on a Zen 3, as the processor fetches what lies
between.) Scales lie as [inputs / 32, N], so that a block is worked through at once, its integer sums scaled once.

    w[k, n] = scale[k, n] u[k, n] + offset[k, n], where u is the code, or what the type's table has for it, less `zero`

`offset` is a minimum's, if the type has them. Facts about the types: llama.cpp's ggml-common.h and gguf-py's quants.py.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from teal_fast.kernels.block_planes import BLOCK, NARROW, pack_plane, unpack_plane

SUPER = 256  # inputs that share the scale of the scales, in K-quants
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class BlockType:
    """A type of GGUF tensors as it is kept here.

    planes: bits of each plane of the codes, the lowest first. scale_block: inputs that share a scale. nested: whether
    scales are whole numbers times a scale of SUPER inputs, instead of fp16. minimum: whether blocks have an offset.
    zero: what is subtracted from a code. table: values that four-bit codes stand for.
    """

    name: str
    planes: tuple[int, ...]
    scale_block: int = BLOCK
    nested: bool = False
    minimum: bool = False
    zero: int = 0
    table: tuple[int, ...] | None = None

    @property
    def inputs(self) -> int:
        """Inputs come in whole multiples of this."""
        return SUPER if self.nested else BLOCK


BLOCK_TYPES = {
    kind.name: kind
    for kind in (
        BlockType("Q4_0", (4,), zero=8),
        BlockType("Q4_1", (4,), minimum=True),
        BlockType("Q5_0", (4, 1), zero=16),
        BlockType("Q5_1", (4, 1), minimum=True),
        BlockType("Q8_0", (8,), zero=128),
        BlockType("Q4_K", (4,), nested=True, minimum=True),
        BlockType("Q5_K", (4, 1), nested=True, minimum=True),
        BlockType("Q6_K", (4, 2), scale_block=16, nested=True, zero=32),
        BlockType("IQ4_NL", (4,), table=IQ4_VALUES),
        BlockType("IQ4_XS", (4,), nested=True, table=IQ4_VALUES),
    )
}


class Blocks(NamedTuple):
    """A weight [K, N] of one type. N counts padding: it is a multiple of NARROW.

    planes: uint8 [K, N * bits / 8] each. scale: fp16 [K / BLOCK, N], or of nested types int8
    [K / scale_block, N]. minimum: the same of uint8 for nested types, else fp16; or None. super_scale, super_minimum:
    fp16 [K / SUPER, N] of nested types, else None. Padded outputs have scales of zero.
    """

    kind: BlockType
    planes: tuple[Tensor, ...]
    scale: Tensor
    minimum: Tensor | None = None
    super_scale: Tensor | None = None
    super_minimum: Tensor | None = None

    @property
    def K(self) -> int:
        return self.scale.shape[0] * self.kind.scale_block

    @property
    def N(self) -> int:
        return self.scale.shape[1]


def pack_blocks(kind: BlockType, codes: Tensor, *scales: Tensor | None) -> Blocks:
    """The weight [K, N] of codes uint8 [K, N] and scales, as `Blocks` has them but for the padding of N."""

    def pad(part: Tensor | None) -> Tensor | None:
        return None if part is None else F.pad(part, (0, -part.shape[1] % NARROW)).contiguous()

    codes, planes, shift = pad(codes), [], 0
    for bits in kind.planes:
        planes.append(pack_plane(codes >> shift & (2**bits - 1), bits))
        shift += bits
    return Blocks(kind, tuple(planes), *map(pad, scales))


def codes_of(blocks: Blocks) -> Tensor:
    """uint8 [K, N]."""
    codes, shift = torch.zeros(blocks.K, blocks.N, dtype=torch.uint8, device=blocks.scale.device), 0
    for plane, bits in zip(blocks.planes, blocks.kind.planes, strict=True):
        codes |= unpack_plane(plane, bits) << shift
        shift += bits
    return codes


def dequantize_blocks(blocks: Blocks, codes: Tensor | None = None) -> Tensor:
    """fp32 [K, N], with the bits of gguf-py's own dequantization. codes: uint8 [K, N], instead of those in planes."""
    kind, codes = blocks.kind, codes_of(blocks) if codes is None else codes
    if kind.table is not None:
        values = torch.tensor(kind.table, dtype=torch.float32, device=codes.device)[codes.int()]
    else:
        values = codes.float().sub_(kind.zero)

    def by_block(part: Tensor, above: Tensor | None) -> tuple[Tensor, Tensor]:
        part = part.float()
        if above is not None:
            part.unflatten(0, (len(above), -1)).mul_(above.float()[:, None])
        return values.unflatten(0, (len(part), -1)), part[:, None]

    found, scale = by_block(blocks.scale, blocks.super_scale)
    found.mul_(scale)
    if blocks.minimum is not None:
        found, minimum = by_block(blocks.minimum, blocks.super_minimum)
        found.sub_(minimum) if kind.nested else found.add_(minimum)
    return values
