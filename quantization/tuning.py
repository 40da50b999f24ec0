"""Fits a quantized model's scales to what the original gives in the end, by gradient steps.

Rounding looks at one layer at a time: what the errors of all layers do together, and to a model that drops channels
besides, shows in the logits only. Here every output's scale moves so that the quantized model's logits, dense and with
half of its channels dropped, diverge less from the dense original's, read out by the quantized output layer. Rows stay
as they are, thresholds too, and nothing is added that a token would read. Source: the end-to-end phase of EfficientQAT,
arXiv:2407.11062, which tunes dense models' scales.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter
from tqdm import tqdm

from teal_fast.calibration.probe import backward, gradients
from teal_fast.files.calibration import Calibration, set_sparsity
from teal_fast.model import Transformer
from teal_fast.sparse_model import Phase, SparseLinear, sparse_layers
from teal_fast.weights.output import output_weight

SPARSITIES = (0.0, 0.5)  # at which the model shall be like the original; both count alike
RATE = 3e-3  # of a factor, a step, at first; down to 0 by half a cosine
BETAS = (0.9, 0.95)  # Adam's: there are few steps, so that its memory is short
STEP = 512  # tokens a step, at least: a short sequence by itself would move scales as far as a long one


@contextmanager
def rescaled(model: Transformer, factors: dict[str, Tensor]) -> Iterator[None]:
    """In the block, what a layer's weight gives is times its factors [N]; a bias is not."""

    def rescale(name: str, layer: SparseLinear, y: Tensor) -> Tensor:
        return y * factors[name] if layer.bias is None else (y - layer.bias) * factors[name] + layer.bias

    with ExitStack() as hooks:
        for name, layer in sparse_layers(model).items():
            hook = layer.register_forward_hook(lambda layer, inputs, y, name=name: rescale(name, layer, y))
            hooks.enter_context(hook)
        yield


def cut_steps(sequences: list[list[int]]) -> list[list[list[int]]]:
    """The sequences in groups of at least STEP tokens, the last of what is left."""
    steps: list[list[list[int]]] = []
    for sequence in sequences:
        if not steps or sum(map(len, steps[-1])) >= STEP:
            steps.append([])
        steps[-1].append(sequence)
    return steps


def tune_scales(
    model: Transformer, original: Transformer, calibration: Calibration, sequences: list[list[int]]
) -> dict[str, Tensor]:
    """What the scales of a quantized model are to be multiplied by, fp32 [N] by layer name.

    Both models are on one device, in fp32; the quantized one is left at the last of SPARSITIES. Raises ValueError when
    its hidden states are not finite.
    """
    layers, device = sparse_layers(model), model.norm.weight.device
    factors = {name: Parameter(torch.ones(layer.weight.out_features, device=device)) for name, layer in layers.items()}
    optimizer = torch.optim.Adam(factors.values(), lr=RATE, betas=BETAS)
    steps = cut_steps(sequences)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(steps))
    output = output_weight(model.output).detach()
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
                for sparsity in SPARSITIES:
                    set_sparsity(model, calibration, sparsity)
                    hidden = model.hidden(tokens, phase=Phase(1))[0]
                    if not hidden.isfinite().all():
                        raise ValueError("hidden states hold NaN or inf on this corpus: is the checkpoint sound?")
                    backward(hidden, output, tokens[0], dense)
                progress.update(len(sequence))
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return {name: factor.detach() for name, factor in factors.items()}
