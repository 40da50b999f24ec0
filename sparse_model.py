"""Activation sparsity on top of model.py: SparseLinear, which skips weight rows, and the phase of a call.

A channel of a linear layer's input is dropped when |x| does not exceed its threshold, and the weight row it would
multiply is not read. Sparsity is the fraction dropped; 0 is exactly the dense model. Source: TEAL, arXiv:2408.14690.
"""

import copy
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from teal_fast.model import Transformer
from teal_fast.weights.dense import DenseWeight, Weight
from teal_fast.weights.formats import DTYPES, OUTPUT8, BlockFormat, Format
from teal_fast.weights.output import Int8Output

SPARSE_WEIGHT = re.compile(r"layers\.\d+\.(attention\.(wqkv|wo)|feed_forward\.(w13|w2))\.weight")
KINDS = {"wqkv": "qkv", "wo": "o", "w13": "gate+up", "w2": "down"}
KEEP_ALL = -1.0  # a threshold below every |x|


@dataclass(frozen=True)
class Phase:
    """Which tokens of a call are computed densely: the first `dense_tokens` of each sequence; the others sparsely.

    It is an argument of the call, never a state of the shared layers: two threads may prefill and decode at once.
    """

    dense_tokens: int


DENSE = Phase(sys.maxsize)  # prompts; not their length, which would make a compiled pass one of each length
DECODE = Phase(0)


class SparseLinear(nn.Module):
    """A linear layer that drops input channels with |x| <= threshold of the tokens that the call's phase leaves sparse.

    `threshold` [K] fp32 changes in place, so that a compiled or captured step serves every sparsity.
    """

    def __init__(self, weight: Weight, bias: Tensor | None = None):
        super().__init__()
        self.weight = weight
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        threshold = torch.full((weight.in_features,), KEEP_ALL, device=next(weight.parameters()).device)
        self.register_buffer("threshold", threshold, persistent=False)

    def dropped(self, x: Tensor) -> Tensor:
        """Which entries of x [..., K] are treated as zero, bool. NaN is not: it travels on as in a dense layer."""
        return x.abs() <= self.threshold

    def forward(self, x: Tensor, phase: Phase | None = None) -> Tensor:
        """x [B, T, K] -> [B, T, N]; without a phase all tokens are dense."""
        return self.product(x, phase, self.bias)

    def product(self, x: Tensor, phase: Phase | None, bias: Tensor | None = None) -> Tensor:
        """As `forward`, with a bias or none."""
        batch, tokens, _ = x.shape
        dense = tokens if phase is None else min(phase.dense_tokens, tokens)
        if dense < tokens and batch * tokens == 1:
            return self.weight.sparse_matvec(x.flatten(), self.threshold, bias).view(1, 1, -1)
        if dense == 0 and tokens == 1:  # the next tokens of several sequences
            return self.weight.sparse_matmul(x.view(batch, -1), self.threshold, bias).view(batch, 1, -1)
        if dense < tokens:
            decoded = x[:, dense:]
            x = torch.cat((x[:, :dense], decoded.masked_fill(self.dropped(decoded), 0)), dim=1)
        return self.weight.matmul(x, bias)


def sparse_layers(model: nn.Module) -> dict[str, SparseLinear]:
    """The model's sparse layers by module name, in order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}


def sparsify(model: Transformer, format: Format | BlockFormat | None = None) -> Transformer:
    """Replaces the linear layers of the blocks by SparseLinear, at sparsity 0.

    Their weights are shared, not copied; with a format they, the output layer and, if it says so, the embeddings are
    quantized ones, yet to be filled.
    """
    for name, linear in list(model.named_modules()):
        if SPARSE_WEIGHT.fullmatch(f"{name}.weight") and isinstance(linear, nn.Linear):
            K, N = reversed(linear.weight.shape)
            weight = format.layer(name, K, N) if format else DenseWeight(linear.weight.t())
            parent, child = name.rsplit(".", 1)
            setattr(model.get_submodule(parent), child, SparseLinear(weight, linear.bias))
    if format:
        model.tok_embeddings, model.output = format.ends(model.tok_embeddings, model.output)
    return model


def with_own_thresholds(model: Transformer) -> Transformer:
    """The model over the same weights, with thresholds of its own: two engines may run it at different sparsities."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for layer in sparse_layers(model).values():
        del shared[id(layer.threshold)]
    return copy.deepcopy(model, shared)


def dtype_name(model: Transformer) -> str:
    """What the model computes in: bf16, fp16 or fp32."""
    return next(name for name, dtype in DTYPES.items() if dtype == model.norm.weight.dtype)


def format_of(model: Transformer) -> str:
    """The format of the weights: bf16, fp16, fp32, int8, int4, output8, or a GGUF file's name of its own, as Q4_K_M."""
    formats = [layer.weight.format for layer in sparse_layers(model).values() if layer.weight.format != "dense"]
    if formats:
        return formats[-1]  # an int4 model's attention, which comes first, is int8
    output8 = any(isinstance(module, Int8Output) for module in model.modules())
    return OUTPUT8 if output8 else dtype_name(model)


Observer = Callable[[str, SparseLinear, Tensor, Phase], Tensor | None]


@contextmanager
def watch_inputs(model: nn.Module, observe: Observer) -> Iterator[None]:
    """In the block, `observe(name, layer, x, phase)` is called before a sparse layer computes from x [B, T, K].

    When it returns a tensor, the layer computes from that instead. For measuring: it sees the calls of all threads.
    """

    def hook(name: str, layer: SparseLinear, x: Tensor, phase: Phase | None = None) -> tuple | None:
        changed = observe(name, layer, x, phase or DENSE)
        return None if changed is None else (changed, phase)

    with ExitStack() as hooks:
        for name, layer in sparse_layers(model).items():
            handle = layer.register_forward_pre_hook(lambda layer, given, name=name: hook(name, layer, *given))
            hooks.enter_context(handle)
        yield
