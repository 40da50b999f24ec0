"""Tunes a quantized model's scales by gradient descent: the end-to-end phase of EfficientQAT, arXiv:2407.11062.

Rounding looks at one layer at a time; what the errors of all layers do together shows only in the logits. Here the
output scales of every layer are trained to lower the KL divergence of the quantized model's predictions from those of
the dense original. Unlike EfficientQAT, the loss is taken twice, for the dense model and for the model that drops half
of its channels, and both logits are computed with the quantized output layer. Codes, row scales of int4 and thresholds
stay as they are, so that a token reads no more bytes than before.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter
from tqdm import tqdm

from teal_fast.calibration.block_passes import loss_gradient
from teal_fast.files.calibration import Calibration, set_sparsity
from teal_fast.model import Transformer
from teal_fast.sparse_model import Phase, SparseLinear, sparse_layers

SPARSITIES = (0.0, 0.5)  # of the two losses, which count alike
RATE = 3e-3  # Adam's first learning rate for factors that start at 1; it decays to 0 along half a cosine
BETAS = (0.9, 0.95)  # Adam's; the second is low because there are few steps
STEP_TOKENS = 512  # the fewest tokens of a step: a short sequence alone would move scales as far as a long one


@contextmanager
def rescaled(model: Transformer, factors: dict[str, Tensor]) -> Iterator[None]:
    """In the block, each sparse layer computes factor ⊙ (W x) + bias. factors: [N] by layer name."""

    def rescale(name: str, layer: SparseLinear, y: Tensor) -> Tensor:
        return y * factors[name] if layer.bias is None else (y - layer.bias) * factors[name] + layer.bias

    with ExitStack() as hooks:
        for name, layer in sparse_layers(model).items():
            hook = layer.register_forward_hook(lambda layer, inputs, y, name=name: rescale(name, layer, y))
            hooks.enter_context(hook)
        yield


@contextmanager
def gradients(model: Transformer) -> Iterator[None]:
    """In the block, autograd records hidden states from the embeddings on; weights get no gradients."""
    hook = model.tok_embeddings.register_forward_hook(lambda module, inputs, x: x.requires_grad_())
    with hook, torch.enable_grad():
        yield


def cut_steps(sequences: list[list[int]]) -> list[list[list[int]]]:
    """Groups consecutive sequences into steps of at least STEP_TOKENS tokens; the last step may have fewer."""
    steps: list[list[list[int]]] = []
    for sequence in sequences:
        if not steps or sum(map(len, steps[-1])) >= STEP_TOKENS:
            steps.append([])
        steps[-1].append(sequence)
    return steps


def tune_scales(
    model: Transformer, original: Transformer, calibration: Calibration, sequences: list[list[int]]
) -> dict[str, Tensor]:
    """Trains one factor per output of each sparse layer and returns them: fp32 [N] by layer name.

    The caller multiplies the scales by them; this changes no weight. model: quantized; original: dense; both in fp32
    and on one device. Leaves the thresholds of `model` at the last of SPARSITIES. Raises ValueError when hidden states
    are not finite.
    """
    layers, device = sparse_layers(model), model.norm.weight.device
    factors = {name: Parameter(torch.ones(layer.weight.out_features, device=device)) for name, layer in layers.items()}
    optimizer = torch.optim.Adam(factors.values(), lr=RATE, betas=BETAS)
    steps = cut_steps(sequences)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(steps))
    with (
        tqdm(total=sum(map(len, sequences)), desc="tuning scales", unit="token") as progress,
        rescaled(model, factors),
        gradients(model),
    ):
        for step in steps:
            for sequence in step:
                tokens = torch.tensor([sequence], device=device)
                with torch.no_grad():
                    dense = original.hidden(tokens)[0]
                add_gradients(model, calibration, tokens, dense)
                progress.update(len(sequence))
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return {name: factor.detach() for name, factor in factors.items()}


def add_gradients(model: Transformer, calibration: Calibration, tokens: Tensor, dense: Tensor) -> None:
    """Adds the gradients of one sequence's losses, one for each of SPARSITIES.

    tokens: [1, T]; dense: the original's final hidden states [T, dim].
    """
    for sparsity in SPARSITIES:
        set_sparsity(model, calibration, sparsity)
        hidden = model.hidden(tokens, phase=Phase(1))[0]
        if not hidden.isfinite().all():
            raise ValueError("hidden states hold NaN or inf on this corpus: is the checkpoint sound?")
        hidden.backward(loss_gradient(hidden, model.output, tokens[0], dense, model.args.output_cap))
