"""What passes through a model's sparse layers on a text, at the thresholds now set: how large, and what dropping costs.

`observe` runs the model with its inputs masked as decoding masks them, all tokens of a sequence but the first. Values
of |x| are counted in a histogram whose bins are the leading bits of the float itself: exact for bf16, 0.8 % fine in
fp16 and fp32, no range needed in advance and no activations kept, 256 KB a layer.

Costs are read off gradients. A mask has none where it counts: an entry that is moved across its threshold jumps, and on
average over tokens these jumps weigh as much as the slopes that dropped entries lack. So the backward pass takes masks
for the identity (a straight-through estimator, arXiv:1308.3432); without it early layers seem hardly to matter.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from teal_fast.model import Transformer
from teal_fast.sparse_model import Phase, SparseLinear, sparse_layers, watch_inputs
from teal_fast.weights.output import output_weight

SHIFT = 23 - 7  # bins keep fp32's sign, exponent and 7 of its 23 mantissa bits, as bf16 does
BINS = 1 << (31 - SHIFT)
POINTS = 201  # quantile levels stored: every half per cent
BORDER = 1.25  # entries whose |x| is within this factor of the threshold are the last to be dropped or kept
LOGIT_ROWS = 128  # positions whose logits are held at once: 25 MB at a vocabulary of 49,152


class AbsHistogram:
    """A histogram of |x| with logarithmic bins, 128 to the octave, over the whole range of fp32."""

    def __init__(self, device: torch.device):
        self.counts = torch.zeros(BINS, dtype=torch.int64, device=device)

    def add(self, x: Tensor) -> None:
        """Counts every entry of x, any shape and floating type."""
        # Positive floats sort like the integers that their bits spell; rounding up makes a bin's edge its upper end.
        bits = x.float().abs().flatten().view(torch.int32)
        self.counts += torch.bincount((bits + ((1 << SHIFT) - 1)) >> SHIFT, minlength=BINS)[:BINS]

    def quantiles(self, points: int) -> Tensor:
        """|x| at `points` levels evenly spaced from 0 to 1, fp32 [points] on the CPU; linear inside a bin."""
        counts = self.counts.cpu().double()
        reached = counts.cumsum(0)
        target = torch.linspace(0, 1, points, dtype=torch.float64) * reached[-1]
        index = torch.searchsorted(reached, target).clamp(max=BINS - 1)
        edge = (torch.arange(BINS, dtype=torch.int32) << SHIFT).view(torch.float32)
        share = 1 - (reached[index] - target) / counts[index].clamp(min=1)
        return torch.lerp(edge[(index - 1).clamp(min=0)], edge[index], share.clamp(0, 1).float())


class Observed:
    """What one layer's input was over all tokens but the first of their sequences.

    histogram: of |x| over the channel's factor. tokens: how many have a gradient. fisher [K]: the sum of its squares.
    loss, square: over entries at the border, the loss that keeping them would save in first order, and x².
    """

    def __init__(self, layer: SparseLinear, factor: Tensor | None):
        self.layer = layer
        self.factor = None if factor is None else factor.to(layer.threshold)
        self.histogram = AbsHistogram(layer.threshold.device)
        self.tokens = 0
        self.fisher = torch.zeros_like(layer.threshold, dtype=torch.float64)
        self.loss, self.square = self.fisher.new_zeros(()), self.fisher.new_zeros(())

    def add(self, x: Tensor) -> None:
        self.histogram.add(x[:, 1:] if self.factor is None else x[:, 1:] / self.factor)

    def add_gradient(self, x: Tensor, gradient: Tensor) -> None:
        x, gradient = x[0, 1:].float(), gradient[0, 1:].float()
        self.tokens += len(x)
        self.fisher += gradient.square().sum(0)
        share = x.abs() / self.layer.threshold
        near = (share > 1 / BORDER) & (share <= BORDER)
        self.loss -= (gradient * x).masked_fill(~near, 0).sum()
        self.square += x.square().masked_fill(~near, 0).sum()

    def summary(self) -> dict[str, Tensor]:
        """The sums as means, fp64 on the CPU, the histogram as quantiles [POINTS]."""
        found = {"quantiles": self.histogram.quantiles(POINTS).double()}
        if self.tokens:
            found["fisher"] = self.fisher.cpu() / self.tokens
            found["cost"] = (self.loss / self.square.clamp(min=1e-300)).cpu()
        return found


@contextmanager
def gradients(model: Transformer) -> Iterator[None]:
    """In the block, gradients reach the layers' inputs, for the embeddings ask for one; weights have none."""
    hook = model.tok_embeddings.register_forward_hook(lambda module, inputs, x: x.requires_grad_())
    with hook, torch.enable_grad():
        yield


def backward(hidden: Tensor, output: Tensor, tokens: Tensor, dense: Tensor | None) -> None:
    """Adds up gradients of the loss on a text's tokens [T] or, given its states, of the divergence from a dense model.

    hidden, dense: final hidden states [T, dim]; output: the layer's weight, fp32 [vocab, dim], for both.
    """
    leaf = hidden.detach().requires_grad_()
    for start in range(0, len(tokens) - 1, LOGIT_ROWS):  # of the last token nothing is known
        rows = slice(start, min(start + LOGIT_ROWS, len(tokens) - 1))
        found = F.linear(leaf[rows].float(), output).log_softmax(-1)
        if dense is None:
            loss = F.nll_loss(found, tokens[1:][rows], reduction="sum")
        else:
            expected = F.linear(dense[rows].float(), output).log_softmax(-1)
            loss = F.kl_div(found, expected, log_target=True, reduction="sum")
        loss.backward()
    hidden.backward(leaf.grad)


@torch.no_grad()
def observe(
    model: Transformer,
    sequences: list[list[int]],
    title: str,
    loss: str | None = None,
    factors: list[Tensor] | None = None,
) -> dict[str, dict[str, Tensor]]:
    """What each layer's input was, by name: see `Observed.summary`.

    `loss`: whose gradients to take, "text" (that of the tokens given), "divergence" (from the dense model) or None.
    """
    device = model.norm.weight.device
    output = output_weight(model.output).detach() if loss else None
    layers = sparse_layers(model)
    pairs = zip(layers.items(), factors or [None] * len(layers), strict=True)
    observed = {name: Observed(layer, factor) for (name, layer), factor in pairs}

    def mask(name: str, layer: SparseLinear, x: Tensor, phase: Phase) -> Tensor:
        given = x.detach()
        dropped = layer.dropped(given)
        dropped[:, 0] = False
        observed[name].add(given)
        kept = given.masked_fill(dropped, 0)
        if x.requires_grad:
            kept = x + (kept - given)
            kept.register_hook(lambda gradient: observed[name].add_gradient(given, gradient))
        return kept

    with tqdm(total=sum(map(len, sequences)), desc=title, unit="token") as progress:
        for sequence in sequences:
            tokens = torch.tensor([sequence], device=device)
            dense = model.hidden(tokens)[0] if loss == "divergence" else None
            with watch_inputs(model, mask):
                if loss:
                    with gradients(model):
                        hidden = model.hidden(tokens)[0]
                        backward(hidden, output, tokens[0], dense)
                else:
                    hidden = model.hidden(tokens)[0]
            if not hidden.isfinite().all():
                raise ValueError("the model's hidden states hold NaN or inf on this corpus: is the checkpoint sound?")
            progress.update(len(sequence))
    return {name: found.summary() for name, found in observed.items()}


def measure(model: Transformer, sequences: list[list[int]]) -> dict[str, Tensor]:
    """Quantiles of |x|, fp32 [POINTS] by layer name, at the thresholds now set."""
    seen = observe(model, sequences, "calibrating")
    return {name: found["quantiles"].float() for name, found in seen.items()}
