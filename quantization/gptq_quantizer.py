"""Quantizes a whole model with GPTQ, one block at a time, for dense and for sparse inputs at once.

The Hessian of a layer counts each input twice: as it is, and with half of its channels dropped, because decoding reads
the same weight both ways. The hidden states of the calibration text travel through the model twice as well: through the
blocks quantized so far, and through the original blocks, whose states are the target (GPTAQ, arXiv:2504.02692). Only
one block's weights and the hidden states are in memory. The output layer is not quantized here.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Module

from teal_fast.files.calibration import Calibration
from teal_fast.files.load import load_model, stored_as
from teal_fast.files.store import is_finite
from teal_fast.quantization.gptq import add_moments, compensate_inputs, factorize, gptq_round
from teal_fast.sparse_model import Phase, SparseLinear, sparse_layers
from teal_fast.weights.dense import Weight
from teal_fast.weights.formats import BlockFormat, Format

INPUT_SPARSITY = 0.5  # of the sparse copy of each input
HiddenFunction = Callable[[Tensor], Tensor]  # [1, T, dim] -> [1, T, …]


class _PassOn(Module):
    """Stands in for a linear layer and returns what would reach it."""

    def forward(self, x: Tensor, phase: Phase | None = None) -> Tensor:
        return x


class GptqQuantizer:
    """Quantizes a model's linear layers, which have to be asked for in the model's order.

    Each half of a block, attention and MLP, has an input layer, which reads normed hidden states (wqkv, w13), and an
    output layer, whose outputs are added to the hidden states (wo, w2), in some families behind another norm. Before a
    layer is rounded, its weight is moved to compensate for the errors of the layers before it: an input layer aims at
    the outputs that it has in the original model, an output layer at the hidden states that the original model has
    behind it, or, where a norm comes between, at its outputs there.
    """

    def __init__(
        self,
        folder: Path,
        format: Format | BlockFormat,
        calibration: Calibration,
        sequences: list[list[int]],
        device: torch.device,
    ):
        self.format, self.calibration, self.device = format, calibration, device
        self.model = load_model(folder)  # memory-mapped: a block is read when its turn comes
        self.hidden = [self.model.embed(torch.tensor([ids])).to(device, torch.float32) for ids in sequences]
        self.target_hidden = self.hidden  # the original model's hidden states
        self.block = 0
        self.packed: dict[str, Weight] = {}

    def __call__(self, name: str, weight: Tensor) -> Weight:
        """The quantized weight of the layer `name`; weight [K, N] is the one that the checkpoint holds."""
        while name not in self.packed:
            self.packed = self.quantize_block()
        return self.packed[name]

    @torch.no_grad()
    def quantize_block(self) -> dict[str, Weight]:
        """Quantizes the next block and returns its weights by layer name. Raises ValueError on NaN and inf."""
        prefix, block = f"layers.{self.block}.", self.model.layers[self.block].to(self.device, torch.float32)
        for name, parameter in block.named_parameters():
            check_finite(stored_as(prefix + name), parameter)
        window = self.model.args.sliding_windows[self.block]

        def attend(x: Tensor) -> Tensor:
            positions = torch.arange(x.shape[1])
            mask = self.model.mask(positions, None, window)
            call = self.model.calls(positions, x.dtype)[self.block]
            moved = {name: part.to(self.device) for name, part in vars(call).items() if isinstance(part, Tensor)}
            mask = mask if mask is None else mask.to(self.device)
            return block.attention(x, replace(call, **moved), mask, self.block)

        norms = (block.attention_norm, block.attention_norm_behind)
        self.quantize_half(prefix + "attention.", block.attention, norms, attend, ("wqkv", "wo"))
        mlp, norms = block.feed_forward, (block.ffn_norm, block.ffn_norm_behind)
        self.quantize_half(prefix + "feed_forward.", mlp, norms, mlp, ("w13", "w2"))
        self.model.layers[self.block] = torch.nn.Identity()  # frees the block's memory
        self.block += 1
        return {prefix + name: linear.weight for name, linear in sparse_layers(block).items()}

    def quantize_half(
        self, prefix: str, half: Module, norms: tuple[Module, Module], run: HiddenFunction, names: tuple[str, str]
    ) -> None:
        """Quantizes half a block and moves the hidden states past it.

        names: the input and the output layer of `half`. norms: before it and behind it. run: computes half(norm(x))
        from norm(x).
        """
        norm, behind = norms
        input_layer, output_layer = (getattr(half, name) for name in names)
        targets = [norm(x) for x in self.target_hidden]
        inputs = [norm(x) for x in self.hidden]
        outputs = [run(y) for y in targets]
        target_hidden = [x + behind(y) for x, y in zip(self.target_hidden, outputs, strict=True)]
        moved = sum(x[0].t() @ (target - x)[0] for target, x in zip(targets, inputs, strict=True))
        del targets
        residual = moved @ input_layer.weight.dequantize().float()
        self.quantize_layer(prefix + names[0], input_layer, inputs, residual)

        setattr(half, names[1], _PassOn())  # `run` then returns the output layer's inputs
        inputs = [run(x) for x in inputs]
        setattr(half, names[1], output_layer)
        if isinstance(behind, torch.nn.Identity):
            outputs = [target - x for target, x in zip(target_hidden, self.hidden, strict=True)]
        residual = sum(y[0].t() @ (target - output_layer(y))[0] for target, y in zip(outputs, inputs, strict=True))
        self.quantize_layer(prefix + names[1], output_layer, inputs, residual)
        self.hidden = [x + behind(output_layer(y)) for x, y in zip(self.hidden, inputs, strict=True)]
        self.target_hidden = target_hidden

    def quantize_layer(self, name: str, linear: SparseLinear, inputs: list[Tensor], residual: Tensor) -> None:
        """Replaces a layer's weight by a quantized one, unless the format leaves it dense.

        inputs: the layer's, [1, T, K] of each sequence; residual: fp32 [K, N], see `compensate_inputs`. Raises
        ValueError when the inputs' second moments are not positive definite.
        """
        if (format := self.format.within(name)) is None:
            return
        hessian = torch.zeros(linear.weight.in_features, linear.weight.in_features, device=self.device)
        threshold = self.calibration.threshold(name, INPUT_SPARSITY).to(self.device)
        for (x,) in inputs:
            kept = x.masked_fill(x.abs() <= threshold, 0)
            kept[0] = 0  # the first token, an attention sink, is always dense
            add_moments(hessian, torch.cat((x, kept)))
        importance = hessian.diagonal().clone()
        try:
            factor = factorize(hessian, sum(x.shape[1] for x in inputs))
        except torch.linalg.LinAlgError as error:
            raise ValueError(f"{name}: too few or too large inputs to round by: more --tokens?") from error
        del hessian
        weight = compensate_inputs(linear.weight.dequantize(), factor, residual)
        linear.weight = format.pack(weight, importance, partial(gptq_round, factor=factor))


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises ValueError when a checkpoint's tensor holds NaN or inf."""
    if not is_finite(tensor):
        raise ValueError(f"{name} holds NaN or inf, which no scale can hold: is the checkpoint sound?")
