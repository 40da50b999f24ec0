"""TODO."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Module

from teal_fast.files.calibration import load_calibration
from teal_fast.files.load import load_model, stored_as
from teal_fast.files.store import is_finite
from teal_fast.quantization.gptq import feed_back, make_up
from teal_fast.sparse_model import SparseLinear, sparse_layers
from teal_fast.weights.dense import Weight
from teal_fast.weights.formats import Format

DROPPED = 0.5  # the sparsity of the inputs that count besides the dense ones
Function = Callable[[Tensor], Tensor]


class Calibrated:
    """Quantizes linear layers, asked for in order, by what reaches them through the blocks quantized before.

    Each half of a block, attention and MLP, has a layer that reads hidden states and one whose outputs are added to
    them. Before a layer is rounded its weight makes up for what its inputs lack by then (GPTAQ, arXiv:2504.02692): a
    reading layer shall give what it gave the original model, an adding one bring back the original's hidden states.
    """

    def __init__(self, folder: Path, format: Format, sequences: list[list[int]], device: torch.device):
        self.format, self.device = format, device
        self.calibration = load_calibration(folder)
        self.model = load_model(folder)  # memory-mapped: a block is read when its turn comes
        self.hidden = [self.model.tok_embeddings(torch.tensor([ids])).to(device, torch.float32) for ids in sequences]
        self.wanted = self.hidden  # the original model's
        self.block = 0
        self.packed: dict[str, Weight] = {}

    def __call__(self, name: str, weight: Tensor) -> Weight:
        """What becomes of the layer `name`, whose weight [K, N] the model has."""
        while name not in self.packed:
            self.packed = self.quantize_block()
        return self.packed[name]

    @torch.no_grad()
    def quantize_block(self) -> dict[str, Weight]:
        """The next block's weights by layer name."""
        prefix, layer = f"layers.{self.block}.", self.model.layers[self.block].to(self.device, torch.float32)
        for name, parameter in layer.named_parameters():
            check_finite(stored_as(prefix + name), parameter)
        window = self.model.args.sliding_windows[self.block]

        def attend(x: Tensor) -> Tensor:
            positions = torch.arange(x.shape[1])
            inputs = (*self.model.rotary(positions, x.dtype), None, self.model.mask(positions, None, window))
            return layer.attention(x, *(part if part is None else part.to(self.device) for part in inputs))

        self.quantize_half(prefix + "attention.", layer.attention, layer.attention_norm, attend, ("wqkv", "wo"))
        mlp = layer.feed_forward
        self.quantize_half(prefix + "feed_forward.", mlp, layer.ffn_norm, mlp, ("w13", "w2"))
        self.model.layers[self.block] = torch.nn.Identity()  # its memory goes
        self.block += 1
        return {prefix + name: linear.weight for name, linear in sparse_layers(layer).items()}

    def quantize_half(self, prefix: str, half: Module, norm: Module, run: Function, names: tuple[str, str]) -> None:
        """Quantizes half a block, whose layers are called so; `run` gives what it adds to x, given norm(x)."""
        reading, adding = (getattr(half, name) for name in names)
        wanted = [x + run(norm(x)) for x in self.wanted]
        inputs = [norm(x) for x in self.hidden]
        lacks = (reading.weight.matmul(norm(aim) - x) for aim, x in zip(self.wanted, inputs, strict=True))
        self.quantize_layer(prefix + names[0], reading, zip(inputs, lacks, strict=True))

        setattr(half, names[1], torch.nn.Identity())  # what would reach the layer comes out
        inputs = [run(x) for x in inputs]
        setattr(half, names[1], adding)
        lacks = (aim - x - adding(y) for aim, x, y in zip(wanted, self.hidden, inputs, strict=True))
        self.quantize_layer(prefix + names[1], adding, zip(inputs, lacks, strict=True))
        self.hidden = [x + adding(y) for x, y in zip(self.hidden, inputs, strict=True)]
        self.wanted = wanted

    def quantize_layer(self, name: str, linear: SparseLinear, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Quantizes a layer, given inputs [1, T, K] with what its outputs lack for them [1, T, N]."""
        hessian = missing = 0
        threshold = self.calibration.threshold(name, DROPPED).to(self.device)
        for (x,), (lack,) in pairs:
            kept = x.masked_fill(x.abs() <= threshold, 0)
            kept[0] = 0  # the first token, an attention sink, is always dense
            hessian = hessian + x.t() @ x + kept.t() @ kept
            missing = missing + x.t() @ lack
        try:
            weight = make_up(linear.weight.dequantize(), hessian, missing)
            format = self.format.within(name)
            linear.weight = format.pack(weight, hessian.diagonal(), partial(feed_back, hessian=hessian))
        except torch.linalg.LinAlgError as error:
            raise ValueError(f"{name}: too few or too large inputs to round by: more --tokens?") from error


def check_finite(name: str, tensor: Tensor) -> None:
    if not is_finite(tensor):
        raise ValueError(f"{name} holds NaN or inf, which no scale can hold: is the checkpoint sound?")
