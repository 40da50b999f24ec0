"""Quantization grids: the numbers that int8 and int4 weights can take, and how their scales are chosen.

Scales are found by a search for the least squared error below the absmax scale, which represents the largest weight
exactly: clipping a few large weights often costs less than a coarse step for all others. An int4 grid first evens out
the sizes of its outputs by Sinkhorn balancing (in the manner of SINQ, arXiv:2509.22944), because outputs share scales.
How codes lie in memory is not decided here (quantized.py), nor how errors of rounding are compensated
(quantization/gptq.py).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

SCALE_FACTORS = (
    0.6,
    0.65,
    0.7,
    0.75,
    0.8,
    0.85,
    0.9,
    0.95,
    1.0,
)  # the search tries these multiples of the absmax scale
# Weights searched at a time, or weights times scales that are tried: arrays stay in a core's cache. The system hands
# out the memory of those above 32 MB anew each time, which took two thirds of the time.
CHUNK = 2**17
EPSILON = 1e-30  # the least absmax and the least damping: an all-zero channel must not lead to a division by zero


class Grid(Protocol):
    """rows: int64 [R], which input channels of the weight these are; None: all. int8 and int4 need not know."""

    def round(self, weight: Tensor, rows: Tensor | None = None) -> tuple[Tensor, ...]: ...  # [R, N] to nearest codes
    def dequantize(self, *codes: Tensor, rows: Tensor | None = None) -> Tensor: ...  # codes of `round` to fp32 [R, N]


@dataclass
class Int8Grid:
    """Symmetric int8 with one scale per output channel: w[k, n] = code[k, n] scale[n], codes from -127 to 127.

    scale: fp32 [N].
    """

    scale: Tensor

    @classmethod
    def fit(cls, weight: Tensor, importance: Tensor | None = None) -> "Int8Grid":
        """Chooses the scales of weight [K, N] that minimize sum_k importance[k] (rounded[k, n] - weight[k, n])².

        importance: fp32 [K], by default 1.
        """
        importance = weight.new_ones(len(weight), dtype=torch.float32) if importance is None else importance
        factors, scales = torch.tensor(SCALE_FACTORS, device=weight.device), []
        for columns in weight.split(max(CHUNK // len(weight), 1), dim=1):
            columns = columns.float()
            absmax_scale = columns.abs().amax(0).clamp(min=EPSILON) / 127
            errors = [
                importance @ (cls(absmax_scale * factor).nearest(columns) - columns).square()
                for factor in SCALE_FACTORS
            ]
            scales.append(absmax_scale * factors[torch.stack(errors).argmin(0)])
        return cls(torch.cat(scales))

    def nearest(self, weight: Tensor) -> Tensor:
        """Rounds weight [R, N] to the grid and returns fp32 [R, N]."""
        return (weight / self.scale).round_().clamp_(-127, 127).mul_(self.scale)

    def round(self, weight: Tensor, rows: Tensor | None = None) -> tuple[Tensor]:
        """Rounds weight [R, N] to int8 codes [R, N]."""
        return ((weight / self.scale).round_().clamp_(-127, 127).to(torch.int8),)

    def dequantize(self, codes: Tensor, rows: Tensor | None = None) -> Tensor:
        return codes * self.scale


@dataclass
class Int4Grid:
    """Int4 in groups of outputs: w[k, n] = (code[k, n] - 8) row_scale[k, n // group] scale[n], codes from 0 to 15.

    scale: fp32 [N]. The row scales, bf16 [R, N / group], belong to the codes: `round` chooses them for each row.
    """

    scale: Tensor
    group: int

    @classmethod
    def fit(cls, weight: Tensor, group: int) -> "Int4Grid":
        """Chooses output scales for weight [K, N] by Sinkhorn balancing.

        Afterwards all rows have one root mean square and all columns too, so that the outputs of a group can share a
        row scale.
        """
        scale = weight.new_ones(weight.shape[1], dtype=torch.float32)
        for _ in range(5):  # it settles quickly
            squares = torch.zeros_like(scale)
            for rows in weight.split(max(CHUNK // weight.shape[1], 1)):
                balanced = (rows / scale).square_()
                squares += balanced.div_(balanced.mean(1, keepdim=True).clamp_(min=EPSILON)).sum(0)
            column_rms = (squares / len(weight)).sqrt()
            scale *= torch.where(column_rms > 0, column_rms, 1)  # an output that is always zero keeps its scale
        return cls(scale, group)

    def round(self, weight: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rounds weight [R, N] to uint8 codes [R, N] from 0 to 15 and bf16 row scales [R, N / group].

        Each row scale has the least squared error among those tried. It may be negative: code - 8 runs from -8 to 7,
        and the sign decides which side gets the eighth step.
        """
        parts = [self._round_rows(rows) for rows in weight.split(max(CHUNK // weight.shape[1], 1))]
        codes, row_scales = zip(*parts, strict=True)
        return torch.cat(codes), torch.cat(row_scales)

    def _round_rows(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        groups = (weight / self.scale).view(len(weight), -1, self.group)
        importance = self.scale.square().view(-1, self.group)  # of an error in w / scale, measured in w
        absmax_scale = groups.abs().amax(-1).clamp(min=EPSILON) / 8
        factors = torch.tensor(SCALE_FACTORS, device=weight.device)
        least = row_scale = None
        for some in torch.cat((factors, -factors)).split(max(CHUNK // weight.numel(), 1)):
            tried = (some[:, None, None] * absmax_scale).bfloat16().float()  # [scales, R, groups]
            steps = (groups / tried[..., None]).round_().clamp_(-8, 7)
            errors = steps.mul_(tried[..., None]).sub_(groups).square_().mul_(importance).sum(-1)
            error, best = errors.min(0)
            chosen = tried.gather(0, best[None])[0]
            row_scale = chosen if least is None else torch.where(error < least, chosen, row_scale)
            least = error if least is None else torch.minimum(error, least)
        codes = (groups / row_scale[..., None]).round_().clamp_(-8, 7) + 8
        return codes.to(torch.uint8).view(weight.shape), row_scale.bfloat16()

    def dequantize(self, codes: Tensor, row_scales: Tensor, rows: Tensor | None = None) -> Tensor:
        groups = (codes.float() - 8).view(len(codes), -1, self.group) * row_scales.float()[..., None]
        return groups.view(codes.shape) * self.scale
