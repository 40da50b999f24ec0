"""The grids of a model's reproducible sums: how finely each column of q/k/v, residual and MLP's update is added up.

Addends that are whole multiples of a column's grid have the same sum in any order, as long as it is less than 2^24
grids. So a grid is a power of two, 2^-18 to 2^-17 of what a column held at most on a fixed text, which leaves room for
four to eight times that; what goes beyond is added rightly all the same, but counted (stages_base.cuh).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from teal_fast.model import Transformer

TOKENS = 256  # of the fixed text: ids at even distances over the vocabulary
MARGIN, RANGE = 4, 22  # binary digits: of room beyond what was seen; of a grid that addends are rounded to
LEAST = 1 / 16  # of what a layer's columns hold as a rule: a column that was zero may not stay so


class Grids(NamedTuple):
    """1.5 · 2^23 times each column's grid, fp32: of q, k and v, the residual with o's update, the MLP's update.

    Adding this to a number and taking it off again rounds the number to the grid.
    """

    qkv: Tensor
    residual: Tensor
    down: Tensor


@torch.no_grad()
def measure_grids(model: Transformer) -> list[Grids]:
    """Each layer's grids, from a dense pass over the fixed text. They depend on the weights alone."""
    device, vocab = model.norm.weight.device, model.args.vocab_size
    largest: list[dict[str, Tensor]] = [{} for _ in model.layers]

    def watch(number: int, name: str, x: Tensor) -> None:
        found = x.detach().flatten(0, 1).abs().amax(0).float()
        known = largest[number]
        known[name] = torch.maximum(known[name], found) if name in known else found

    hooks = []
    for number, layer in enumerate(model.layers):
        wqkv = layer.attention.wqkv
        for module, name in ((layer, "residual"), (layer.ffn_norm, "residual")):
            hooks.append(
                module.register_forward_pre_hook(lambda _, given, n=number, name=name: watch(n, name, given[0]))
            )
        for module, name, bias in ((wqkv, "qkv", wqkv.bias), (layer.feed_forward.w2, "down", None)):
            hooks.append(
                module.register_forward_hook(
                    lambda _, given, made, n=number, name=name, bias=bias: watch(
                        n, name, made if bias is None else made - bias
                    )
                )
            )
    try:
        ids = torch.arange(TOKENS, device=device) * vocab // TOKENS
        model.hidden(ids[None])
    finally:
        for hook in hooks:
            hook.remove()
    return [Grids(*(grid_constant(found[name]) for name in Grids._fields)) for found in largest]


def grid_constant(largest: Tensor) -> Tensor:
    """Of columns [N] that held at most so much: 1.5 · 2^23 times the grid of each, fp32."""
    held = largest.clamp(min=max(largest.median().item() * LEAST, torch.finfo(torch.float32).tiny * 2**64))
    return 1.5 * 2.0**23 * (held.log2().ceil() + (MARGIN - RANGE)).exp2()
