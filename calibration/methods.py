"""How thresholds are found: the methods of calibrate.py.

The model runs densely, then sparse at a few levels, with the thresholds found so far: what counts is how the sparse
model's own hidden states are spread, errors of earlier layers included, so that targets are hit. Methods differ in how
a sparsity is shared out among layers (allocation.py), by costs or by given shares:

measured   costs start as those of `global` and are corrected on the way to higher sparsities by what dropping really
           costs there: the gradient of the divergence from the dense model's predictions, times what is at the border
           of being dropped (probe.py). The default.
fisher     the empirical Fisher information of each channel's input, mean (dL/dx)²: channels differ in their thresholds.
global     its mean over a layer's channels.
blockwise  greedy within each block, by the error of what the block gives (blockwise.py): TEAL's method.
uniform    every layer drops the same share of its entries: TEAL's baseline.
"""

import torch
from torch import Tensor

from teal_fast.calibration.allocation import Costs, Sizes, Spread, correct, curves, spend, thresholds
from teal_fast.calibration.blockwise import blockwise_shares
from teal_fast.calibration.passes import Passes, column
from teal_fast.calibration.probe import POINTS
from teal_fast.sparse_model import KEEP_ALL, sparse_layers

METHODS = ("measured", "fisher", "global", "blockwise", "uniform")
CORRECTED = (0.3, 0.5, 0.65)  # sparsities at which "measured" measures costs, each with those of the one before
LEVELS = (0.25, 0.5, 0.6, 0.75, 0.9)  # at which the sparse model's hidden states are observed
SMALLEST = 1e-4  # of a channel's Fisher information, in its layer's mean: a channel that never mattered yet may


def find_costs(passes: Passes, sizes: Sizes, flat: list[Tensor], method: str) -> tuple[Costs, list[Tensor]]:
    """What dropping costs, and the factors [K] by which the thresholds of each layer's channels differ.

    flat: factors of 1.
    """
    seen = passes.next("gradients", None, flat, "text")
    fisher = [values.clamp(min=SMALLEST * values.mean().item() + 1e-300) for values in column(seen, "fisher")]
    cost = torch.stack([values.mean() for values in fisher])
    if method == "fisher":
        return Costs({0.0: cost}), [(values / values.mean()).rsqrt() for values in fisher]
    if method == "global":
        return Costs({0.0: cost}), flat
    corrected = {}
    for level in CORRECTED:
        found = spend(Spread(level, torch.stack(column(seen, "quantiles"))), sizes, cost, level)
        seen = passes.next(f"costs at {level:.0%}", found, flat, "divergence")
        corrected[level] = cost = correct(cost, torch.stack(column(seen, "cost")))
    return Costs(corrected), flat


def fit_curves(passes: Passes, method: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Curves and factors of a `Calibration`, by the method called so; leaves the model's thresholds at sparsity 0."""
    layers = sparse_layers(passes.model)
    sizes = Sizes.of([layer.weight.packed for layer in layers.values()])
    factors = [torch.ones(layer.weight.in_features).double() for layer in layers.values()]
    if method in ("measured", "fisher", "global"):
        rule, factors = find_costs(passes, sizes, factors, method)
    seen = passes.next("dense", None, factors)
    if method == "uniform":
        rule = torch.tensor([[0.0, 1.0]], dtype=torch.float64).expand(len(layers), 2)
    elif method == "blockwise":
        quantiles = dict(zip(layers, column(seen, "quantiles"), strict=True))
        rule = blockwise_shares(passes.model, passes.sequences[0], quantiles)
    spreads = [Spread(0.0, torch.stack(column(seen, "quantiles")))]
    for level in LEVELS:
        seen = passes.next(f"sparse {level:.0%}", thresholds(spreads[-1], sizes, rule, level), factors)
        spreads.append(Spread(level, torch.stack(column(seen, "quantiles"))))
    for layer in layers.values():
        layer.threshold.fill_(KEEP_ALL)
    found = curves(spreads, sizes, rule, POINTS).float()
    scaled = {name: factor.float() for name, factor in zip(layers, factors, strict=True) if (factor != 1).any()}
    return dict(zip(layers, found, strict=True)), scaled
