"""Weight sparsity to compare activation sparsity with: magnitude and Wanda pruning of a model in memory.

Both zero a share of each linear layer's weights for all inputs alike, so at equal sparsity a token multiplies as many
weights. They count as skipped here, though no kernel skips single weights and naming them would cost a bit for each.
Magnitude drops the smallest |w| of each projection. Wanda (arXiv:2306.11695) drops, for each output, the smallest
|w| · ‖x‖, with the norm of the weight's input over calibration text as layers before it, pruned already, pass it on.
"""

import torch
from torch import Tensor

from teal_fast.model import ModelArgs, Transformer
from teal_fast.sparse_model import KINDS, Phase, SparseLinear, format_of, sparse_layers, watch_inputs
from teal_fast.weights.dense import DenseWeight
from teal_fast.weights.formats import QUANTIZED

METHODS = ("magnitude", "wanda")


def outputs(name: str, args: ModelArgs) -> list[int]:
    """How many outputs each projection that is fused into layer `name` has."""
    kind = name.rsplit(".", 1)[1]
    if kind == "wqkv":
        return [args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim, args.n_kv_heads * args.head_dim]
    return {"wo": [args.dim], "w13": [args.ffn_dim, args.ffn_dim], "w2": [args.dim]}[kind]


def pruned(rows: Tensor, score: Tensor, share: float, by_output: bool) -> Tensor:
    """rows [K, N] with the share of lowest score set to zero, over all of them or within each output's column."""
    K, N = rows.shape
    if by_output:
        lowest = score.topk(round(share * K), dim=0, largest=False).indices
        return rows.scatter(0, lowest, 0)
    lowest = score.flatten().topk(round(share * K * N), largest=False).indices
    return rows.flatten().scatter(0, lowest, 0).view(K, N)


def prune_layer(layer: SparseLinear, sizes: list[int], share: float, norms: Tensor | None) -> None:
    """Replaces a layer's weight by a pruned copy: by magnitude, or by Wanda's score with the input norms [K]."""
    parts = []
    for rows in layer.weight.packed.split(sizes, dim=1):
        score = rows.float().abs() if norms is None else rows.float().abs() * norms[:, None]
        parts.append(pruned(rows, score, share, norms is not None))
    layer.weight = DenseWeight(torch.cat(parts, dim=1))


@torch.no_grad()
def prune(model: Transformer, method: str, share: float, tokens: Tensor | None = None) -> None:
    """Prunes all block linears; `tokens` [B, T]: what Wanda measures inputs on, in one pass of the model."""
    if format_of(model) in QUANTIZED:
        raise ValueError(f"--baseline prunes bf16, fp16 and fp32 weights, these are {format_of(model)}")
    if method == "magnitude":
        for name, layer in sparse_layers(model).items():
            prune_layer(layer, outputs(name, model.args), share, None)
        return

    def measure_and_prune(name: str, layer: SparseLinear, x: Tensor, phase: Phase) -> None:
        prune_layer(layer, outputs(name, model.args), share, x.float().flatten(0, 1).square().sum(0).sqrt())

    with watch_inputs(model, measure_and_prune):
        model.hidden(tokens)


def zeros_by_kind(model: Transformer) -> dict[str, float]:
    """The share of zero weights by tensor kind, and of all as "all"."""
    zeros: dict[str, int] = {}
    held: dict[str, int] = {}
    for name, layer in sparse_layers(model).items():
        for kind in (KINDS[name.rsplit(".", 1)[1]], "all"):
            rows = layer.weight.packed
            zeros[kind] = zeros.get(kind, 0) + int((rows == 0).sum())
            held[kind] = held.get(kind, 0) + rows.numel()
    return {kind: zeros[kind] / held[kind] for kind in held}
