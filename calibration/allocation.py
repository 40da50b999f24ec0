"""Distributes a sparsity of the whole model over its sparse layers, counted in weight bytes that are not read.

The allocation by cost is a Lagrangian one. Dropping an entry x of a layer's input raises the loss by about cost x² / 2
and saves one weight row. At the optimum the last byte saved costs the same in every layer, so the thresholds are
t = sqrt(2 price row_bytes / cost) with one price for the whole model, which bisection finds. Alternatively each layer
drops a given share of its entries. Where costs and shares come from is the matter of methods.py.

All tensors are fp64 on the CPU, with one row per layer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from teal_fast.weights.dense import Weight

BISECTIONS = 60
CORRECTION_EXPONENT = 0.5  # damps a correction: costs depend on each other, and at 1 they overshoot
MAX_CORRECTION = 5.0  # the largest factor of one correction before it is damped


@dataclass(frozen=True)
class Spread:
    """The distribution of |x| at each layer's input when the model runs at `sparsity`.

    quantiles: [layers, points], of |x| / (the channel's factor), at levels evenly spaced from 0 to 1.
    """

    sparsity: float
    quantiles: Tensor

    def dropped(self, threshold: Tensor) -> Tensor:
        """The share of entries at or below the layers' thresholds: [layers] -> [layers]."""
        last = self.quantiles.shape[1] - 1
        above = torch.searchsorted(self.quantiles, threshold[:, None], right=True).clamp(1, last)
        low, high = self.quantiles.gather(1, above - 1), self.quantiles.gather(1, above)
        inside = ((threshold[:, None] - low) / (high - low).clamp(min=1e-300)).clamp(0, 1)
        inside = torch.where(threshold[:, None] >= high, 1, inside)
        return ((above - 1 + inside) / last)[:, 0]

    def threshold(self, share: Tensor) -> Tensor:
        """The thresholds that drop the given shares of entries, the inverse of `dropped`: [layers] -> [layers]."""
        last = self.quantiles.shape[1] - 1
        below = (share * last).long().clamp(0, last - 1)[:, None]
        low, high = self.quantiles.gather(1, below)[:, 0], self.quantiles.gather(1, below + 1)[:, 0]
        return torch.lerp(low, high, (share * last - below[:, 0]).clamp(0, 1))


@dataclass(frozen=True)
class Sizes:
    """Bytes of each layer's weight [layers], and of one of its rows [layers], which an input channel reads."""

    weight: Tensor
    row: Tensor

    @classmethod
    def of(cls, weights: list[Weight]) -> "Sizes":
        """The sizes of weights as they are stored; of weights in blocks without the scales, which none can skip."""
        sizes = [[weight.row_bytes * weight.in_features, weight.row_bytes] for weight in weights]
        return cls(*torch.tensor(sizes, dtype=torch.float64).unbind(1))


def bracket(levels: list[float], at: float) -> tuple[int, int, float]:
    """Finds where `at` lies among ascending levels.

    Returns the indices of the levels below and above it and the weight of the upper one, 0 or 1 beyond the ends.
    """
    high = next((i for i, level in enumerate(levels) if level >= at), len(levels) - 1)
    low = max(high - 1, 0)
    width = levels[high] - levels[low]
    return low, high, min(max((at - levels[low]) / width, 0.0), 1.0) if width else 0.0


@dataclass(frozen=True)
class Costs:
    """What dropping costs in each layer: an entry x, dropped, raises the loss by about cost x² / 2. Only ratios matter.

    by_sparsity: costs [layers] by the model sparsity at which they were measured, ascending.
    """

    by_sparsity: dict[float, Tensor]

    def at(self, sparsity: float) -> Tensor:
        """Costs [layers] at any sparsity: geometric interpolation, constant beyond the ends."""
        costs = [cost.log() for cost in self.by_sparsity.values()]
        low, high, share = bracket(list(self.by_sparsity), sparsity)
        return torch.lerp(costs[low], costs[high], share).exp()


Rule = Costs | Tensor  # the costs, or each layer's share of dropped entries [layers, steps] at targets from 0 to 1


def allocate(spread: Spread, sizes: Sizes, cost: Tensor, target: float) -> Tensor:
    """Thresholds [layers] that drop a share `target` of all weight bytes at one price per byte; cost: [layers]."""
    scale = (sizes.row / cost).sqrt()  # thresholds are scale sqrt(2 price)
    absmax = spread.quantiles[:, -1]
    low, high = 0.0, (absmax / scale).max().item()
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        dropped = (spread.dropped(scale * middle) * sizes.weight).sum() / sizes.weight.sum()
        low, high = (middle, high) if dropped < target else (low, middle)
    return torch.minimum(scale * high, absmax)


def interpolate(spreads: list[Spread], target: float) -> Spread:
    """The spread at a model sparsity between those measured; beyond them the nearest one."""
    low, high, share = bracket([spread.sparsity for spread in spreads], target)
    return Spread(target, torch.lerp(spreads[low].quantiles, spreads[high].quantiles, share))


def curves(spreads: list[Spread], sizes: Sizes, rule: Rule, points: int) -> Tensor:
    """Thresholds [layers, points] at targets evenly spaced from 0 to 1, made to ascend; see `thresholds`."""
    targets = torch.linspace(0, 1, points, dtype=torch.float64).tolist()
    columns = [thresholds(interpolate(spreads, target), sizes, rule, target) for target in targets]
    return torch.stack(columns, dim=1).cummax(dim=1).values


def thresholds(spread: Spread, sizes: Sizes, rule: Rule, target: float) -> Tensor:
    """Thresholds [layers] that reach the model sparsity `target` by the rule, for inputs spread like this."""
    if isinstance(rule, Costs):
        return allocate(spread, sizes, rule.at(target), target)
    position = target * (rule.shape[1] - 1)
    below = min(int(position), rule.shape[1] - 2)
    return spread.threshold(torch.lerp(rule[:, below], rule[:, below + 1], position - below))


def correct_costs(cost: Tensor, measured: Tensor) -> Tensor:
    """Moves costs [layers] towards measured ones [layers], which are noisy and may even be negative."""
    ratio = measured / cost
    ratio = ratio / ratio.median()  # a common factor of all costs changes nothing
    return cost * ratio.clamp(1 / MAX_CORRECTION, MAX_CORRECTION) ** CORRECTION_EXPONENT
