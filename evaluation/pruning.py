"""Pruning baselines for activation sparsity: magnitude and Wanda pruning of a model in memory.

Both zero a share of each linear layer's weights for all inputs alike, so that at equal sparsity a token multiplies
equally many weights. Magnitude pruning zeroes the smallest |w| of each projection. Wanda (arXiv:2306.11695) zeroes, for
each output, the smallest |w| ‖x‖, where ‖x‖ is the norm of the weight's input channel over calibration text; the text
has passed the layers before, which are pruned already. Zeroed weights count as skipped, although no kernel here skips
single weights, and a format that does would spend a bit per weight on a mask.
"""

import torch
from torch import Tensor

from teal_fast.model import ModelArgs, Transformer
from teal_fast.sparse_model import KINDS, Phase, SparseLinear, format_of, sparse_layers, watch_inputs
from teal_fast.weights.dense import DenseWeight
from teal_fast.weights.formats import DTYPES

BASELINES = ("magnitude", "wanda")


def projection_sizes(name: str, args: ModelArgs) -> list[int]:
    """The numbers of outputs of the projections that are fused into layer `name`: of q, k, v for wqkv."""
    kind = name.rsplit(".", 1)[1]
    if kind == "wqkv":
        return [args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim, args.n_kv_heads * args.head_dim]
    return {"wo": [args.dim], "w13": [args.ffn_dim, args.ffn_dim], "w2": [args.dim]}[kind]


def pruned(weight: Tensor, score: Tensor, share: float, by_output: bool) -> Tensor:
    """weight [K, N] with the share of lowest score [K, N] set to zero, over all weights or within each output."""
    K, N = weight.shape
    if by_output:
        lowest = score.topk(round(share * K), dim=0, largest=False).indices
        return weight.scatter(0, lowest, 0)
    lowest = score.flatten().topk(round(share * K * N), largest=False).indices
    return weight.flatten().scatter(0, lowest, 0).view(K, N)


def prune_layer(layer: SparseLinear, sizes: list[int], share: float, norms: Tensor | None) -> None:
    """Replaces a layer's weight by a pruned copy.

    sizes: `projection_sizes`; norms: of the input channels, fp32 [K], for Wanda's score, or None for magnitude.
    """
    parts = []
    for weight in layer.weight.packed.split(sizes, dim=1):
        score = weight.float().abs() if norms is None else weight.float().abs() * norms[:, None]
        parts.append(pruned(weight, score, share, norms is not None))
    layer.weight = DenseWeight(torch.cat(parts, dim=1))


@torch.no_grad()
def prune(model: Transformer, method: str, share: float, tokens: Tensor | None = None) -> None:
    """Prunes all linear layers of the blocks in place.

    method: one of BASELINES; tokens: [B, T], the text on which Wanda measures inputs, in one pass of the model. Raises
    ValueError on quantized weights.
    """
    if format_of(model) not in DTYPES:
        raise ValueError(f"--baseline prunes bf16, fp16 and fp32 weights, these are {format_of(model)}")
    if method == "magnitude":
        for name, layer in sparse_layers(model).items():
            prune_layer(layer, projection_sizes(name, model.args), share, None)
        return

    def measure_and_prune(name: str, layer: SparseLinear, x: Tensor, phase: Phase) -> None:
        norms = x.float().flatten(0, 1).square().sum(0).sqrt()
        prune_layer(layer, projection_sizes(name, model.args), share, norms)

    with watch_inputs(model, measure_and_prune):
        model.hidden(tokens)


def zeros_by_kind(model: Transformer) -> dict[str, float]:
    """The share of zero weights by tensor kind; "all" is that of all kinds together."""
    zeros: dict[str, int] = {}
    held: dict[str, int] = {}
    for name, layer in sparse_layers(model).items():
        for kind in (KINDS[name.rsplit(".", 1)[1]], "all"):
            weight = layer.weight.packed
            zeros[kind] = zeros.get(kind, 0) + int((weight == 0).sum())
            held[kind] = held.get(kind, 0) + weight.numel()
    return {kind: zeros[kind] / held[kind] for kind in held}
