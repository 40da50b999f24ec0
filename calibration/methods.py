"""The methods of calibrate.py: how a model sparsity becomes one threshold per layer.

Each method gives a rule for distributing a sparsity over the layers, by costs or by shares (allocation.py):

measured   Starts with the costs of `global` and corrects them at three sparsities by a measurement (probe.py): the
           first-order change of the KL divergence from the dense model's predictions if the entries near the threshold
           were kept. The default.
fisher     The cost of a channel is the empirical Fisher information of its input, mean (dL/dx)². Channels of one layer
           have different thresholds.
global     The cost of a layer is the mean Fisher information of its channels.
blockwise  Greedy within each block, by the error of the block's output (blockwise.py): TEAL's method.
uniform    Every layer drops the same share of its entries: TEAL's baseline.

Under every rule the thresholds are then read off the distribution of |x| in the sparse model itself, which is observed
at a few sparsities one after the other. It includes the errors of earlier layers, so that the model achieves what is
asked for.
"""

import torch
from torch import Tensor

from teal_fast.calibration.allocation import Costs, Sizes, Spread, allocate, correct_costs, curves, thresholds
from teal_fast.calibration.blockwise import blockwise_shares, blockwise_work
from teal_fast.calibration.passes import Passes, column
from teal_fast.calibration.probe import POINTS
from teal_fast.calibration.progress import Progress
from teal_fast.sparse_model import KEEP_ALL, sparse_layers

METHODS = ("measured", "fisher", "global", "blockwise", "uniform")
CORRECTION_SPARSITIES = (0.3, 0.5, 0.65)  # where "measured" measures costs, each time with the costs found before
OBSERVED_SPARSITIES = (0.25, 0.5, 0.6, 0.75, 0.9)  # where the distribution of |x| in the sparse model is observed
FISHER_FLOOR = 1e-4  # least Fisher information of a channel over its layer's mean: other text may need the channel


def find_costs(passes: Passes, sizes: Sizes, flat: list[Tensor], method: str) -> tuple[Costs, list[Tensor]]:
    """The layers' costs, and factors [K] for each layer: a channel's threshold is its layer's times its factor.

    method: measured, fisher or global; flat: factors of 1.
    """
    seen = passes.next("gradients", None, flat, "text")
    fisher = [values.clamp(min=FISHER_FLOOR * values.mean().item() + 1e-300) for values in column(seen, "fisher")]
    cost = torch.stack([values.mean() for values in fisher])
    if method == "fisher":
        return Costs({0.0: cost}), [(values / values.mean()).rsqrt() for values in fisher]
    if method == "global":
        return Costs({0.0: cost}), flat
    corrected = {}
    for sparsity in CORRECTION_SPARSITIES:
        found = allocate(Spread(sparsity, torch.stack(column(seen, "quantiles"))), sizes, cost, sparsity)
        seen = passes.next(f"costs at {sparsity:.0%}", found, flat, "divergence")
        corrected[sparsity] = cost = correct_costs(cost, torch.stack(column(seen, "cost")))
    return Costs(corrected), flat


def total_work(passes: Passes, method: str) -> float:
    """Layers x tokens of a method, of which every pass and what blockwise does between them are told to the bar."""
    by_method = {"measured": ["text"] + ["divergence"] * len(CORRECTION_SPARSITIES), "fisher": ["text"]}
    by_method["global"] = by_method["fisher"]
    losses = by_method.get(method, []) + [None] * (1 + len(OBSERVED_SPARSITIES))
    between = blockwise_work(passes.model, passes.sequences[0]) if method == "blockwise" else 0
    return between + sum(passes.work(turn, loss) for turn, loss in enumerate(losses))


def fit_curves(passes: Passes, method: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Runs a method and returns the curves and factors of a `Calibration`.

    Leaves the model's thresholds at sparsity 0.
    """
    with Progress(total_work(passes, method), "calibrating") as passes.progress:
        return _fit_curves(passes, method)


def _fit_curves(passes: Passes, method: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    layers = sparse_layers(passes.model)
    sizes = Sizes.of([layer.weight for layer in layers.values()])
    factors = [torch.ones(layer.weight.in_features).double() for layer in layers.values()]
    if method in ("measured", "fisher", "global"):
        rule, factors = find_costs(passes, sizes, factors, method)
    seen = passes.next("dense", None, factors)
    if method == "uniform":
        rule = torch.tensor([[0.0, 1.0]], dtype=torch.float64).expand(len(layers), 2)
    elif method == "blockwise":
        quantiles = dict(zip(layers, column(seen, "quantiles"), strict=True))
        rule = blockwise_shares(passes.model, passes.sequences[0], quantiles, passes.progress)
    spreads = [Spread(0.0, torch.stack(column(seen, "quantiles")))]
    for sparsity in OBSERVED_SPARSITIES:
        found = thresholds(spreads[-1], sizes, rule, sparsity)
        seen = passes.next(f"sparse {sparsity:.0%}", found, factors)
        spreads.append(Spread(sparsity, torch.stack(column(seen, "quantiles"))))
    for layer in layers.values():
        layer.threshold.fill_(KEEP_ALL)
    points = curves(spreads, sizes, rule, POINTS).float()
    scaled = {name: factor.float() for name, factor in zip(layers, factors, strict=True) if (factor != 1).any()}
    return dict(zip(layers, points, strict=True)), scaled
