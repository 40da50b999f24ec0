"""How the codes of a weight in blocks (kernels/blocks.py) lie in memory: planes of one to eight bits."""

import torch
from torch import Tensor

BLOCK = 32  # inputs that are worked through at once
STRIP = 128  # outputs beside each other in memory: 64 bytes of four-bit codes
NARROW = 64  # of the last strip, where N asks for it


def places(width: int) -> Tensor:
    """int64 [width]: the place in a row of a strip's outputs in their order.

    Within 64 outputs the dwords of a 4 x 4 matrix are transposed: when four rows of bytes are interleaved in registers
    of 16, 32 or 64 bytes, sums of whole neighbouring outputs come out.
    """
    return _place(torch.arange(width)[None])[0]


def _place(outputs: Tensor) -> Tensor:
    """Outputs [..., width] by their places, and back."""
    return outputs.unflatten(-1, (-1, 4, 4, 4)).transpose(-3, -2).flatten(-4)


def runs(N: int) -> list[tuple[int, int, int]]:
    """Strips of equal width of N outputs, a multiple of NARROW: the first output, how many strips, their width."""
    wide, narrow = N // STRIP, N % STRIP // NARROW
    return [run for run in ((0, wide, STRIP), (wide * STRIP, narrow, NARROW)) if run[1]]


def pack_plane(codes: Tensor, bits: int) -> Tensor:
    """uint8 [K, N * bits / 8] of codes uint8 [K, N] below 2 ** bits.

    In a strip's `row` bytes, place p is in byte p % row, shifted by bits * (p // row).
    """
    parts = []
    for n, count, width in runs(codes.shape[1]):
        strips = codes[:, n : n + count * width].unflatten(-1, (count, width))
        fields = _place(strips).unflatten(-1, (8 // bits, -1))  # [K, count, 8 / bits, row]
        packed = fields[..., 0, :].clone()
        for i in range(1, 8 // bits):
            packed |= fields[..., i, :] << i * bits
        parts.append(packed.flatten(1))
    return torch.cat(parts, 1)


def unpack_plane(plane: Tensor, bits: int) -> Tensor:
    """uint8 [K, N]: `pack_plane` undone."""
    parts = []
    for n, count, width in runs(plane.shape[1] * 8 // bits):
        stored = plane[:, n * bits // 8 :][:, : count * width * bits // 8]
        fields = stored.unflatten(-1, (count, 1, -1))
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=plane.device)[:, None]
        parts.append(_place(((fields >> shifts) & (2**bits - 1)).flatten(-2)).flatten(1))
    return torch.cat(parts, 1)
