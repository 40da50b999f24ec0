"""Rounding to llama.cpp's block types (kernels/blocks.py): how scales are chosen, and codes by them.

From several first steps, codes are rounded and a block's scale and offset fitted to them by least squares; the best are
kept. In nested types both are then whole numbers times a scale of SUPER inputs, and of their neighbours the best are
taken. Everything is what a GGUF file could hold, too. Types with a table of values are not made here.
"""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from teal_fast.kernels.blocks import SUPER, Blocks, BlockType, pack_blocks

# The first steps: those with which so many more codes than there are would span a block's weights. With 11 of them
# from -2 to 3 errors are 0.3 % (Q4_K) to 2.5 % (Q6_K) less, with these and one fit 1.5 % more.
WIDER = (-1.0, -0.5, 0.0, 0.5, 1.0)
FITS = 2
AT_ONCE = 2**17  # weights searched at a time: half a megabyte each of some arrays, which stay in a core's cache
EPSILON = 1e-30  # the least divisor


@dataclass
class BlockGrid:
    """The values that a weight [K, N] of a block type can take once its scales are chosen.

    scale, minimum, super_scale, super_minimum: as Blocks has them, without padding.
    """

    kind: BlockType
    scale: Tensor
    minimum: Tensor | None = None
    super_scale: Tensor | None = None
    super_minimum: Tensor | None = None

    def __post_init__(self):
        self.step = _times(self.scale, self.super_scale)
        self.offset = None if self.minimum is None else _times(self.minimum, self.super_minimum)
        if self.kind.nested and self.offset is not None:
            self.offset.neg_()
        self.inverse = _inverse(self.step)

    @classmethod
    def fit(cls, kind: BlockType, weight: Tensor, importance: Tensor | None = None) -> "BlockGrid":
        """Chooses the scales of weight [K, N] that minimize sum_k importance[k] (rounded[k, n] - weight[k, n])².

        importance: fp32 [K], by default 1. Raises ValueError on inputs that the type does not divide.
        """
        if len(weight) % kind.inputs:
            raise ValueError(f"{len(weight)} inputs are no multiple of {kind.inputs}, as {kind.name} needs")
        if importance is not None:  # an input that is never there has a share, too
            importance = (importance / importance.mean().clamp(min=EPSILON)).clamp(min=1e-4)
            importance = importance.view(-1, kind.scale_block, 1)
        found = [
            _search(kind, columns.float().unflatten(0, (-1, kind.scale_block)), importance)
            for columns in weight.split(max(AT_ONCE // len(weight), 16), dim=1)
        ]
        return cls(kind, *(None if parts[0] is None else torch.cat(parts, 1) for parts in zip(*found, strict=True)))

    def round(self, weight: Tensor, rows: Tensor | None = None) -> tuple[Tensor]:
        """Rounds weight [R, N] to codes uint8 [R, N]. rows: int64 [R], which input channels these are, or all."""
        if rows is None:  # by columns, because of the temporaries
            pieces = weight.split(max(AT_ONCE // len(weight), 16), dim=1)
            begins = range(0, weight.shape[1], pieces[0].shape[1])
            return (torch.cat([self._round(*pair) for pair in zip(pieces, begins, strict=True)], 1),)
        inverse, offset = self._at(rows, self.inverse)
        steps = (weight if offset is None else weight - offset) * inverse
        return (_clamped(self.kind, steps).add_(self.kind.zero).to(torch.uint8),)

    def _round(self, weight: Tensor, begin: int) -> Tensor:
        columns = slice(begin, begin + weight.shape[1])
        blocks = weight.float().unflatten(0, (-1, self.kind.scale_block))
        offset = None if self.offset is None else self.offset[:, columns]
        codes = _nearest(self.kind, blocks, self.step[:, columns], offset)
        return codes.add_(self.kind.zero).to(torch.uint8).flatten(0, 1)

    def dequantize(self, codes: Tensor, rows: Tensor | None = None) -> Tensor:
        """fp32 [R, N] of codes [R, N]; rows: as above."""
        step, offset = self._at(torch.arange(len(codes), device=codes.device) if rows is None else rows, self.step)
        values = (codes.float() - self.kind.zero).mul_(step)
        return values if offset is None else values.add_(offset)

    def _at(self, rows: Tensor, step: Tensor) -> tuple[Tensor, Tensor | None]:
        block = rows // self.kind.scale_block
        return step[block], None if self.offset is None else self.offset[block]

    def blocks(self, codes: Tensor) -> Blocks:
        """The weight with these codes, uint8 [K, N]."""
        return pack_blocks(self.kind, codes, self.scale, self.minimum, self.super_scale, self.super_minimum)


Scales = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def _times(part: Tensor, above: Tensor | None) -> Tensor:
    """fp32: each scale, or each times the one of its SUPER inputs."""
    return part.float() if above is None else part.float() * _spread(above.float(), part)


def _spread(above: Tensor, part: Tensor) -> Tensor:
    return above.repeat_interleave(len(part) // len(above), 0)


def _inverse(step: Tensor) -> Tensor:
    return torch.where(step.abs() < EPSILON, 0, 1 / step)


def _clamped(kind: BlockType, steps: Tensor) -> Tensor:
    return steps.round_().clamp_(-kind.zero, 2 ** sum(kind.planes) - 1 - kind.zero)


def _nearest(kind: BlockType, blocks: Tensor, step: Tensor, offset: Tensor | None) -> Tensor:
    """Codes less `zero` of blocks [B, inputs, N] by step and offset [B, N], in fp32."""
    inverse = _inverse(step)[:, None]
    return _clamped(kind, blocks * inverse if offset is None else (blocks - offset[:, None]).mul_(inverse))


def _sum(values: Tensor, importance: Tensor | None) -> Tensor:
    return values.sum(1) if importance is None else values.mul_(importance).sum(1)


def _search(kind: BlockType, blocks: Tensor, importance: Tensor | None) -> Scales:
    """The scales of blocks [B, inputs, N] by importance [B, inputs, 1], as `BlockGrid` has them."""
    step, offset = _fit_each(kind, blocks, importance)
    if not kind.nested:
        return step.half(), None if offset is None else offset.half(), None, None
    above, most = (blocks.shape[0] * blocks.shape[1] // SUPER, -1), 63 if kind.minimum else 127
    furthest = step.unflatten(0, above).abs().amax(1)
    super_scale = (furthest / most).half()
    scale = (step * _inverse(_spread(super_scale.float(), step))).round_().clamp_(-most, most)
    if offset is None:
        super_minimum = minimum = None
    else:
        super_minimum = (-offset.unflatten(0, above).amin(1) / most).half()
        minimum = (-offset * _inverse(_spread(super_minimum.float(), offset))).round_().clamp_(0, most)
    scale, minimum = _best_neighbours(kind, blocks, importance, (scale, minimum, super_scale, super_minimum))
    return scale.to(torch.int8), None if minimum is None else minimum.to(torch.uint8), super_scale, super_minimum


def _fit_each(kind: BlockType, blocks: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Step and offset [B, N] of each block by itself, the latter not above 0 in nested types."""
    high, low = blocks.amax(1), blocks.amin(1)
    if kind.minimum:
        offset = low.clamp(max=0) if kind.nested else low
        width, codes = high - offset, 2 ** sum(kind.planes) - 1
    else:  # the longer side gets the code that is furthest from zero
        offset, width, codes = None, -torch.where(high > -low, high, low), kind.zero
    least = best = None
    for wider in WIDER:
        found = width / (codes + wider), offset
        for _ in range(FITS):
            gain, *found = _fit(kind, blocks, importance, *found)
        if best is None:
            least, best = gain, found
            continue
        better = gain > least
        least = torch.where(better, gain, least)
        best = [None if old is None else torch.where(better, new, old) for new, old in zip(found, best, strict=True)]
    return best[0], best[1]


def _fit(
    kind: BlockType, blocks: Tensor, importance: Tensor | None, step: Tensor, offset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Step and offset that fit the codes by the given ones best, and what they take from the blocks' squared sum."""
    codes = _nearest(kind, blocks, step, offset)
    of_codes, of_both = None if offset is None else _sum(codes.clone(), importance), _sum(codes * blocks, importance)
    squares = _sum(codes.square_(), importance).clamp_(min=EPSILON)
    through_zero = of_both / squares
    if offset is None:
        return through_zero * of_both, through_zero, None
    weights = blocks.shape[1] if importance is None else importance.sum(1)
    of_blocks = _sum(blocks.clone(), importance)
    spread = weights * squares - of_codes.square()
    flat = spread <= 1e-6 * weights * squares  # all codes are alike
    step = torch.where(flat, through_zero, (weights * of_both - of_codes * of_blocks) / spread)
    offset = torch.where(flat, 0, (of_blocks - step * of_codes) / weights)
    if kind.nested:
        step = torch.where(offset > 0, through_zero, step)
        offset = offset.clamp(max=0)
    gain = 2 * (step * of_both + offset * of_blocks - step * offset * of_codes)
    return gain - step.square() * squares - offset.square() * weights, step, offset


def _best_neighbours(
    kind: BlockType, blocks: Tensor, importance: Tensor | None, scales: Scales
) -> tuple[Tensor, Tensor | None]:
    """Scale and minimum, in whole numbers, that are best among those off by at most one."""
    scale, minimum, super_scale, super_minimum = scales
    most = 63 if kind.minimum else 127
    unit = _spread(super_scale.float(), scale)
    unit_below = None if minimum is None else _spread(super_minimum.float(), scale)
    least, best = torch.full_like(scale, torch.inf), (scale, minimum)
    for by, below in product((0, -1, 1), (0,) if minimum is None else (0, -1, 1)):
        tried = (scale + by).clamp_(0 if kind.minimum else -most, most), minimum
        step, offset, aim = tried[0] * unit, None, blocks
        if minimum is not None:
            tried = tried[0], (minimum + below).clamp_(0, most)
            aim = blocks + (tried[1] * unit_below)[:, None]
        error = _sum(_nearest(kind, aim, step, offset).mul_(step[:, None]).sub_(aim).square_(), importance)
        better = error < least
        least = torch.where(better, error, least)
        best = tuple(
            None if old is None else torch.where(better, new, old) for new, old in zip(tried, best, strict=True)
        )
    return best
