"""How a sparsity of the whole model is shared out among its sparse layers, by the bytes that are not read.

A layer that drops its entries |x| <= t loses about cost t² / 2 by the last ones, and saves a row's bytes for each. A
budget is spent best where the last byte saved costs the same everywhere: t = sqrt(price row_bytes / cost), with one
price for the whole model. Where costs come from is calibrate.py's matter. Without costs a layer drops a given share.
All tensors here are fp64 on the CPU, one row a layer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BISECTIONS = 60
DAMPING = 0.5  # of a correction in its logarithm: costs depend on each other, and at 1 they overshoot
LARGEST_STEP = 5.0  # of one correction, as a factor before it is damped


@dataclass(frozen=True)
class Spread:
    """How |x| is spread at the layers' inputs when the model runs at `sparsity`.

    quantiles [layers, points]: of |x| over its channel's factor, at levels evenly spaced from 0 to 1.
    """

    sparsity: float
    quantiles: Tensor

    def dropped(self, threshold: Tensor) -> Tensor:
        """The share [layers] of entries that do not exceed the layers' thresholds [layers]."""
        last = self.quantiles.shape[1] - 1
        above = torch.searchsorted(self.quantiles, threshold[:, None], right=True).clamp(1, last)
        low, high = self.quantiles.gather(1, above - 1), self.quantiles.gather(1, above)
        inside = ((threshold[:, None] - low) / (high - low).clamp(min=1e-300)).clamp(0, 1)
        inside = torch.where(threshold[:, None] >= high, 1, inside)
        return ((above - 1 + inside) / last)[:, 0]

    def threshold(self, share: Tensor) -> Tensor:
        """The thresholds [layers] that the shares [layers] of entries do not exceed."""
        last = self.quantiles.shape[1] - 1
        below = (share * last).long().clamp(0, last - 1)[:, None]
        low, high = self.quantiles.gather(1, below)[:, 0], self.quantiles.gather(1, below + 1)[:, 0]
        return torch.lerp(low, high, (share * last - below[:, 0]).clamp(0, 1))


@dataclass(frozen=True)
class Sizes:
    """Bytes of the layers' weights [layers] and of one of their rows [layers], which an input channel reads."""

    weight: Tensor
    row: Tensor

    @classmethod
    def of(cls, rows: list[Tensor]) -> "Sizes":
        sizes = [[weight.nbytes, weight[0].nbytes] for weight in rows]
        return cls(*torch.tensor(sizes, dtype=torch.float64).unbind(1))


def bracket(levels: list[float], at: float) -> tuple[int, int, float]:
    """Which of the ascending levels lie around `at`, and its share of the way between them, 0 or 1 beyond the ends."""
    high = next((i for i, level in enumerate(levels) if level >= at), len(levels) - 1)
    low = max(high - 1, 0)
    width = levels[high] - levels[low]
    return low, high, min(max((at - levels[low]) / width, 0.0), 1.0) if width else 0.0


@dataclass(frozen=True)
class Costs:
    """What dropping costs in each layer [layers], by the model's sparsity at which it was found, ascending."""

    found: dict[float, Tensor]

    def at(self, sparsity: float) -> Tensor:
        """Costs [layers] at any sparsity: between those found, or the nearest."""
        costs = [cost.log() for cost in self.found.values()]
        low, high, share = bracket(list(self.found), sparsity)
        return torch.lerp(costs[low], costs[high], share).exp()


Rule = Costs | Tensor  # how a sparsity is shared out: by costs, or by shares [layers, steps] at targets from 0 to 1


def spend(spread: Spread, sizes: Sizes, cost: Tensor, target: float) -> Tensor:
    """Thresholds [layers] that drop a share `target` of all bytes at one price for the last byte of every layer."""
    unit = (sizes.row / cost).sqrt()
    most = spread.quantiles[:, -1]
    low, high = 0.0, (most / unit).max().item()
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        reached = (spread.dropped(unit * middle) * sizes.weight).sum() / sizes.weight.sum()
        low, high = (middle, high) if reached < target else (low, middle)
    return torch.minimum(unit * high, most)


def between(spreads: list[Spread], target: float) -> Spread:
    """The spread at a sparsity between those measured, or the last one beyond them."""
    low, high, share = bracket([spread.sparsity for spread in spreads], target)
    return Spread(target, torch.lerp(spreads[low].quantiles, spreads[high].quantiles, share))


def curves(spreads: list[Spread], sizes: Sizes, rule: Rule, points: int) -> Tensor:
    """Thresholds [layers, points], ascending, at targets evenly spaced from 0 to 1; see `thresholds`."""
    targets = torch.linspace(0, 1, points, dtype=torch.float64).tolist()
    columns = [thresholds(between(spreads, target), sizes, rule, target) for target in targets]
    return torch.stack(columns, dim=1).cummax(dim=1).values


def thresholds(spread: Spread, sizes: Sizes, rule: Rule, target: float) -> Tensor:
    """Thresholds [layers] for a target."""
    if isinstance(rule, Costs):
        return spend(spread, sizes, rule.at(target), target)
    position = target * (rule.shape[1] - 1)
    below = min(int(position), rule.shape[1] - 2)
    return spread.threshold(torch.lerp(rule[:, below], rule[:, below + 1], position - below))


def correct(cost: Tensor, measured: Tensor) -> Tensor:
    """Costs [layers] moved towards measured ones, which are noisy, even negative."""
    ratio = measured / cost
    ratio = ratio / ratio.median()  # what all costs have in common changes nothing
    return cost * ratio.clamp(1 / LARGEST_STEP, LARGEST_STEP) ** DAMPING
