"""Activation sparsity on top of model.py: SparseLinear, the calibration that sets its thresholds, and load_model.

A channel of a linear layer's input is dropped when |x| does not exceed its threshold, and the weight row it would
multiply is not read. Sparsity is the fraction dropped; 0 is exactly the dense model. Source: TEAL, arXiv:2408.14690.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from teal_fast.model import Transformer
from teal_fast.weights.dense import DenseWeight, Weight
from teal_fast.weights.formats import DTYPES, Format
from teal_fast.weights.output import Int8Output

SPARSE_WEIGHT = re.compile(r"layers\.\d+\.(attention\.(wqkv|wo)|feed_forward\.(w13|w2))\.weight")
KINDS = {"wqkv": "qkv", "wo": "o", "w13": "gate+up", "w2": "down"}
KEEP_ALL = -1.0  # a threshold below every |x|


class SparseLinear(nn.Module):
    """A linear layer that drops input channels with |x| <= threshold: decoded tokens by default, prompts not.

    `threshold` [K] fp32 changes in place, so that a compiled or captured step serves every sparsity. `dense_tokens`
    (see `leading_dense`) overrides how many leading tokens of a call are computed densely.
    """

    def __init__(self, weight: Weight, bias: Tensor | None = None):
        super().__init__()
        self.weight = weight
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        threshold = torch.full((weight.in_features,), KEEP_ALL, device=weight.packed.device)
        self.register_buffer("threshold", threshold, persistent=False)
        self.dense_tokens: int | None = None

    def count_dense(self, tokens: int) -> int:
        """How many leading tokens of a call of `tokens` a sequence are dense: all of several, none of one."""
        if self.dense_tokens is None:
            return 0 if tokens == 1 else tokens
        return min(self.dense_tokens, tokens)

    def dropped(self, x: Tensor) -> Tensor:
        """Which entries of x [..., K] are treated as zero, bool. NaN is not: it travels on as in a dense layer."""
        return x.abs() <= self.threshold

    def forward(self, x: Tensor) -> Tensor:  # [B, T, K] -> [B, T, N]
        batch, tokens, _ = x.shape
        dense = self.count_dense(tokens)
        if dense < tokens and batch * tokens == 1:
            return self.weight.sparse_matvec(x.flatten(), self.threshold, self.bias).view(1, 1, -1)
        if dense < tokens:
            decoded = x[:, dense:]
            x = torch.cat((x[:, :dense], decoded.masked_fill(self.dropped(decoded), 0)), dim=1)
        return self.weight.matmul(x, self.bias)


def sparse_layers(model: nn.Module) -> dict[str, SparseLinear]:
    """The model's sparse layers by module name, in order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}


def sparsify(model: Transformer, format: Format | None = None) -> Transformer:
    """Replaces the linear layers of the blocks by SparseLinear, at sparsity 0.

    Their weights are shared, not copied; with a format they and the output layer are quantized ones, yet to be filled.
    """
    for name, linear in list(model.named_modules()):
        if SPARSE_WEIGHT.fullmatch(f"{name}.weight") and isinstance(linear, nn.Linear):
            K, N = reversed(linear.weight.shape)
            weight = format.within(name).empty(K, N) if format else DenseWeight(linear.weight.t())
            parent, child = name.rsplit(".", 1)
            setattr(model.get_submodule(parent), child, SparseLinear(weight, linear.bias))
    if format:
        model.output = Int8Output.empty(*model.output.weight.shape)
    return model


def dtype_name(model: Transformer) -> str:
    """What the model computes in: bf16, fp16 or fp32."""
    return next(name for name, dtype in DTYPES.items() if dtype == model.norm.weight.dtype)


def format_of(model: Transformer) -> str:
    """The format of the weights: bf16, fp16, fp32, int8 or int4."""
    format = model.layers[0].feed_forward.w13.weight.format
    return dtype_name(model) if format == "dense" else format


@contextmanager
def watch_inputs(model: nn.Module, observe: Callable[[str, SparseLinear, Tensor], Tensor | None]) -> Iterator[None]:
    """In the block, `observe(name, layer, x)` is called before a sparse layer computes from x [B, T, K].

    When it returns a tensor, the layer computes from that instead.
    """
    with ExitStack() as hooks:
        for name, layer in sparse_layers(model).items():
            hook = layer.register_forward_pre_hook(lambda layer, inputs, name=name: observe(name, layer, inputs[0]))
            hooks.enter_context(hook)
        yield


@contextmanager
def leading_dense(model: nn.Module, tokens: int) -> Iterator[None]:
    """In the block, the first `tokens` tokens of each call are computed densely and all later ones sparsely."""
    layers = sparse_layers(model).values()
    before = [layer.dense_tokens for layer in layers]
    for layer in layers:
        layer.dense_tokens = tokens
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.dense_tokens = value
