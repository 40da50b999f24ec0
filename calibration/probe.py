"""Observes the inputs of a model's sparse layers on text: the distribution of |x|, Fisher information, dropping costs.

`observe` runs the model at the thresholds that are set, with the inputs of all tokens but a sequence's first masked as
in decoding. Values of |x| go into a histogram whose bins are the leading bits of the float itself: exact for bf16,
0.8 % fine for fp16 and fp32. It needs no range in advance, keeps no activations and takes 256 KB per layer. Gradients
take the memory of one block besides (block_passes.py).

Costs come from gradients, and gradients pass the masks by a straight-through estimator (arXiv:1308.3432): the backward
pass treats a mask as the identity. The true derivative of a mask is 0 for dropped entries and ignores that an entry
jumps when it crosses its threshold; averaged over tokens, the jumps weigh as much as the missing slopes. Without the
estimator early layers seem hardly to matter.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack

import torch
from torch import Tensor

from teal_fast.calibration.block_passes import (
    OUTPUT_WORK,
    backpropagate,
    hidden_states,
    loss_gradient,
    output_layers,
    work,
)
from teal_fast.calibration.progress import Progress
from teal_fast.model import Transformer
from teal_fast.sparse_model import SparseLinear, sparse_layers, watch_inputs

SHIFT = 23 - 7  # bins keep fp32's sign, exponent and 7 of its 23 mantissa bits, as bf16 does
BINS = 1 << (31 - SHIFT)
POINTS = 201  # quantile levels: every half per cent
BORDER = 1.25  # an entry is at the border if its |x| is within this factor of the threshold
LOGIT_ROWS = 128  # positions whose logits are held at once: 25 MB at a vocabulary of 49,152


class AbsHistogram:
    """A histogram of |x| with logarithmic bins, 128 per octave, over the whole range of fp32."""

    def __init__(self, device: torch.device):
        self.counts = torch.zeros(BINS, dtype=torch.int64, device=device)

    def add(self, x: Tensor) -> None:
        """Counts every entry of x, any shape and floating type."""
        # The bits of positive floats, read as integers, sort as the floats do. Rounding up makes edges upper ends.
        bits = x.float().abs().flatten().view(torch.int32)
        self.counts += torch.bincount((bits + ((1 << SHIFT) - 1)) >> SHIFT, minlength=BINS)[:BINS]

    def quantiles(self, points: int) -> Tensor:
        """Quantiles at levels evenly spaced from 0 to 1, fp32 [points] on the CPU; linear inside a bin."""
        counts = self.counts.cpu().double()
        cumulative = counts.cumsum(0)
        target = torch.linspace(0, 1, points, dtype=torch.float64) * cumulative[-1]
        index = torch.searchsorted(cumulative, target).clamp(max=BINS - 1)
        edge = (torch.arange(BINS, dtype=torch.int32) << SHIFT).view(torch.float32)
        share = 1 - (cumulative[index] - target) / counts[index].clamp(min=1)
        return torch.lerp(edge[(index - 1).clamp(min=0)], edge[index], share.clamp(0, 1).float())


class Observed:
    """Sums over one layer's inputs, of all tokens but the first of each sequence.

    histogram: of |x| / factor. tokens: how many tokens had a gradient g = dL/dx. fisher: sum of g², fp64 [K]. loss and
    square: sums of -g x and x² over the entries at the border. -g x is how much keeping an entry x that is now dropped
    lowers the loss, to first order. factor: [K], by which the channels' thresholds are multiplied, None for 1.
    """

    def __init__(self, layer: SparseLinear, factor: Tensor | None):
        self.layer = layer
        self.factor = None if factor is None else factor.to(layer.threshold)
        self.histogram = AbsHistogram(layer.threshold.device)
        self.tokens = 0
        self.fisher = torch.zeros_like(layer.threshold, dtype=torch.float64)
        self.loss, self.square = self.fisher.new_zeros(()), self.fisher.new_zeros(())

    def mask(self, x: Tensor) -> Tensor:
        """Counts the input x [1, T, K] and returns it with its dropped entries zeroed; gradients pass the mask.

        An input with a gradient was counted before, when its block was computed without.
        """
        given = x.detach()
        dropped = self.layer.dropped(given)
        dropped[:, 0] = False
        kept = given.masked_fill(dropped, 0)
        if x.requires_grad:
            kept = x + (kept - given)  # the straight-through estimator
            kept.register_hook(lambda gradient: self.add_gradient(given, gradient))
        else:
            self.histogram.add(given[:, 1:] if self.factor is None else given[:, 1:] / self.factor)
        return kept

    def add_gradient(self, x: Tensor, gradient: Tensor) -> None:
        """Counts the gradient of the loss by the masked input; x: the input before the mask; both [1, T, K]."""
        x, gradient = x[0, 1:].float(), gradient[0, 1:].float()
        self.tokens += len(x)
        self.fisher += gradient.square().sum(0)
        ratio = x.abs() / self.layer.threshold
        near = (ratio > 1 / BORDER) & (ratio <= BORDER)
        self.loss -= (gradient * x).masked_fill(~near, 0).sum()
        self.square += x.square().masked_fill(~near, 0).sum()

    def summary(self) -> dict[str, Tensor]:
        """fp64 on the CPU: "quantiles" [POINTS] of |x| / factor and, given gradients, "fisher" [K] and "cost" [].

        fisher: mean g²; cost: the sum of -g x over that of x², at the border.
        """
        found = {"quantiles": self.histogram.quantiles(POINTS).double()}
        if self.tokens:
            found["fisher"] = self.fisher.cpu() / self.tokens
            found["cost"] = (self.loss / self.square.clamp(min=1e-300)).cpu()
        return found


@torch.no_grad()
def observe(
    model: Transformer,
    sequences: list[list[int]],
    title: str,
    loss: str | None = None,
    factors: list[Tensor] | None = None,
    progress: Progress | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Runs the model over token sequences and returns `Observed.summary` for each sparse layer, by name.

    title: of the progress bar; loss: whose gradients to take, "text" (cross-entropy of the tokens), "divergence" (from
    the dense model's predictions) or None for none; factors: [K] for each layer; progress: of which this is a part.
    Raises ValueError when hidden states are not finite.
    """
    layers = sparse_layers(model)
    pairs = zip(layers.items(), factors or [None] * len(layers), strict=True)
    observed = {name: Observed(layer, factor) for (name, layer), factor in pairs}
    with ExitStack() as stack:
        if progress is None:
            total = sum(work(model, len(sequence), loss) for sequence in sequences)
            progress = stack.enter_context(Progress(total, title))
        progress.turn_to(title)
        for sequence in sequences:
            tokens = torch.tensor([sequence], device=model.norm.weight.device)
            _observe(model, tokens, observed, loss, progress)
    return {name: found.summary() for name, found in observed.items()}


def _observe(
    model: Transformer, tokens: Tensor, observed: dict[str, Observed], loss: str | None, progress: Progress
) -> None:
    """One sequence [1, T]."""
    dense = _final(model, hidden_states(model, tokens, progress.add)) if loss == "divergence" else None
    with watch_inputs(model, lambda name, layer, x, phase: observed[name].mask(x)):
        passed = hidden_states(model, tokens, progress.add)
        states = list(passed) if loss else deque(passed, 1)
        hidden = model.norm(states[-1])
        if not hidden.isfinite().all():
            raise ValueError("the model's hidden states hold NaN or inf on this corpus: is the checkpoint sound?")
        if loss:
            per_token = OUTPUT_WORK[loss] * output_layers(model)
            gradient = loss_gradient(
                hidden[0],
                model.output,
                tokens[0],
                None if dense is None else dense[0],
                model.args.output_cap,
                lambda count: progress.add(per_token * count),
            )
            backpropagate(model, states, gradient[None], progress.add)


def _final(model: Transformer, states: Iterator[Tensor]) -> Tensor:
    return model.norm(deque(states, 1)[0])


def measure_quantiles(model: Transformer, sequences: list[list[int]]) -> dict[str, Tensor]:
    """Quantiles of |x| at the thresholds that are set: fp32 [POINTS] by layer name."""
    seen = observe(model, sequences, "calibrating")
    return {name: found["quantiles"].float() for name, found in seen.items()}
