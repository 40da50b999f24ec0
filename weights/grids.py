"""TODO."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Scales tried, as shares of the one that just reaches the largest weight.
SHARES = (0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
AT_ONCE = 2**20  # weights searched at a time: 4 MB a scale
TINY = 1e-30  # instead of a scale of zero


class Grid(Protocol):
    def round(self, weight: Tensor) -> tuple[Tensor, ...]: ...  # codes of weight [R, N], as `restore` takes them
    def restore(self, *codes: Tensor) -> Tensor: ...  # fp32 [R, N]


@dataclass
class Int8Grid:
    """Whole numbers from -127 to 127 times scale [N]."""

    scale: Tensor

    @classmethod
    def fit(cls, weight: Tensor, importance: Tensor | None = None) -> "Int8Grid":
        """The scales with the least squared error, that of an input channel weighed by importance [K]."""
        importance = weight.new_ones(len(weight), dtype=torch.float32) if importance is None else importance
        shares, scales = torch.tensor(SHARES, device=weight.device), []
        for columns in weight.split(max(AT_ONCE // len(weight), 1), dim=1):
            columns = columns.float()
            reach = columns.abs().amax(0).clamp(min=TINY) / 127
            errors = [importance @ (cls(reach * share).nearest(columns) - columns).square() for share in SHARES]
            scales.append(reach * shares[torch.stack(errors).argmin(0)])
        return cls(torch.cat(scales))

    def nearest(self, weight: Tensor) -> Tensor:
        return (weight / self.scale).round_().clamp_(-127, 127).mul_(self.scale)

    def round(self, weight: Tensor) -> tuple[Tensor]:
        return ((weight / self.scale).round_().clamp_(-127, 127).to(torch.int8),)

    def restore(self, codes: Tensor) -> Tensor:
        return codes * self.scale


@dataclass
class Int4Grid:
    """Whole numbers from -8 to 7 times a bf16 scale for every `group` outputs of a row, times scale [N]."""

    scale: Tensor
    group: int

    @classmethod
    def fit(cls, weight: Tensor, group: int) -> "Int4Grid":
        """Scales that give the outputs of a group, rows being of one size, weights of one size."""
        weight = weight.float()
        scale = weight.new_ones(weight.shape[1])
        for _ in range(5):  # by turns rows and columns, which settles quickly (Sinkhorn)
            balanced = weight / scale
            rows = balanced.square().mean(1, keepdim=True).clamp(min=TINY).sqrt()
            columns = (balanced / rows).square().mean(0).sqrt()
            scale *= torch.where(columns > 0, columns, 1)  # an output that is always zero keeps its scale
        return cls(scale, group)

    def round(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [R, N] from 0 to 15, that is plus 8, and bf16 [R, N / group]: for each the scale of the least error.

        Of 16 numbers one side has 8, the other 7, so that a scale may be negative.
        """
        parts = [self._round(rows) for rows in weight.split(max(AT_ONCE // weight.shape[1], 1))]
        values, scales = zip(*parts, strict=True)
        return torch.cat(values), torch.cat(scales)

    def _round(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        groups = (weight / self.scale).view(len(weight), -1, self.group)
        importance = self.scale.square().view(-1, self.group)
        reach = groups.abs().amax(-1).clamp(min=TINY) / 8
        shares = torch.tensor(SHARES, device=weight.device)
        tried = torch.cat((shares, -shares))[:, None, None] * reach
        tried = tried.bfloat16().float()[..., None]  # [scales, R, groups, 1]
        errors = (((groups / tried).round_().clamp_(-8, 7) * tried - groups).square_() * importance).sum(-1)
        best = errors.argmin(0)
        scale = tried.squeeze(-1).gather(0, best[None])[0]
        values = (groups / scale[..., None]).round_().clamp_(-8, 7) + 8
        return values.to(torch.uint8).view(weight.shape), scale.bfloat16()

    def restore(self, values: Tensor, scales: Tensor) -> Tensor:
        groups = (values.float() - 8).view(len(values), -1, self.group) * scales.float()[..., None]
        return groups.view(values.shape) * self.scale
