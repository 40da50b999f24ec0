"""Greedy allocation within each block of a model: TEAL's method, arXiv:2408.14690, Algorithm 1.

Every block gets the same sparsity by bytes. Starting dense, each step drops a fixed number of bytes from one layer of
the block: from the one whose further dropping changes the block's output least. Errors are measured on the dense
model's hidden states, so blocks do not see each other's errors.
"""

from contextlib import ExitStack

import torch
from torch import Tensor

from teal_fast.calibration.allocation import Sizes
from teal_fast.calibration.block_passes import arguments
from teal_fast.calibration.progress import Progress
from teal_fast.model import Transformer
from teal_fast.sparse_model import KEEP_ALL, Phase, sparse_layers

STEPS = 20  # of a block's bytes: 5 % each
LAYERS = 4  # sparse ones of a block


def blockwise_work(model: Transformer, sequence: list[int]) -> float:
    """Layers x tokens: each step tries every layer of a block, the last ones fewer."""
    return STEPS * LAYERS * len(sequence) * len(model.layers)


@torch.no_grad()
def blockwise_shares(
    model: Transformer, sequence: list[int], quantiles: dict[str, Tensor], progress: Progress | None = None
) -> Tensor:
    """The share of entries that each layer drops, fp64 [layers, STEPS + 1], at sparsities evenly spaced from 0 to 1.

    sequence: token ids; quantiles: of |x| at levels evenly spaced from 0 to 1, by layer name; progress: of which this
    is a part. Leaves the model's thresholds at sparsity 0.
    """
    x = model.embed(torch.tensor([sequence], device=model.norm.weight.device))
    shares = []
    with ExitStack() as stack:
        progress = progress or stack.enter_context(Progress(blockwise_work(model, sequence), "allocating"))
        progress.turn_to("allocating")
        for index, (block, inputs) in enumerate(arguments(model, len(sequence), Phase(1))):
            layers = sparse_layers(block)
            points = [quantiles[f"layers.{index}.{name}"] for name in layers]
            weights = Sizes.of([layer.weight for layer in layers.values()]).weight
            step = weights.sum() / weights / STEPS
            found = [torch.zeros_like(step)]
            expected = block(x, *inputs)
            for _ in range(STEPS):
                found.append(_next_shares(block, x, inputs, expected, found[-1], step, points))
                progress.add(LAYERS * len(sequence))
            for layer in layers.values():
                layer.threshold.fill_(KEEP_ALL)
            shares.append(torch.stack(found, dim=1))
            x = expected
    return torch.cat(shares)


def _next_shares(
    block: torch.nn.Module,
    x: Tensor,
    inputs: tuple,
    expected: Tensor,
    shares: Tensor,
    step: Tensor,
    points: list[Tensor],
) -> Tensor:
    """The shares [layers of the block] after one more step in the layer where it changes the output least."""
    candidates = [shares + one for one in torch.diag(step) if ((shares + one) <= 1).all()]
    if not candidates:  # no layer has a whole step left: all drop on in proportion to their rest
        left = 1 - shares
        return (shares + left / (left / step).sum().clamp(min=1)).clamp(max=1)
    errors = []
    for tried in candidates:
        for layer, share, quantiles in zip(sparse_layers(block).values(), tried.tolist(), points, strict=True):
            layer.threshold.fill_(quantiles[round(share * (len(quantiles) - 1))] if share else KEEP_ALL)
        errors.append((block(x, *inputs).float() - expected.float()).norm().item())
    return candidates[errors.index(min(errors))]
