"""What decoding skips and reads: achieved sparsity by kind of tensor, and bytes a token."""

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from teal_fast.engine.ranks.layers import ranks_of
from teal_fast.model import KVCache, Transformer
from teal_fast.sparse_model import DECODE, KINDS, Phase, SparseLinear, sparse_layers, watch_inputs


@dataclass
class Tally:
    """Entries seen and kept by each sparse layer, counted on the device: int64 scalars by module name."""

    seen: dict[str, int] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)

    def by_kind(self, model: Transformer) -> dict[str, float]:
        """Achieved sparsity by tensor kind and "all", weighted by the bytes of a channel's row; of what was counted."""
        layers = sparse_layers(model)
        read: dict[str, float] = {}
        held: dict[str, float] = {}
        for name, seen in self.seen.items():
            for kind in (KINDS[name.rsplit(".", 1)[1]], "all"):
                held[kind] = held.get(kind, 0) + seen * layers[name].weight.row_bytes
                read[kind] = read.get(kind, 0) + self.kept[name].item() * layers[name].weight.row_bytes
        return {kind: 1 - read[kind] / held[kind] for kind in held if held[kind]}


@contextmanager
def tally_kept(model: Transformer) -> Iterator[Tally]:
    """Counts, in the block, what every sparse layer keeps of the tokens that its call's phase leaves sparse."""
    tally = Tally()

    def count(name: str, layer: SparseLinear, x: Tensor, phase: Phase) -> None:
        sparse = x[:, phase.dense_tokens :]
        tally.seen[name] = tally.seen.get(name, 0) + sparse.numel()
        tally.kept[name] = tally.kept.get(name, 0) + layer.dropped(sparse).logical_not().sum()

    with watch_inputs(model, count):
        yield tally


@torch.no_grad()
def recount(model: Transformer, cache: KVCache, start: int, tokens: list[int]) -> dict[str, float]:
    """Sparsity achieved on decoded tokens, which stand from position `start` on: by tensor kind and "all".

    The tokens pass the model once more at the thresholds now set: counting in the decode step would slow it down. The
    cache is left as it was. Of ranks that share the model it is their mean, as all hold the same bytes.
    """
    if not tokens:
        return {}
    positions = torch.arange(start, start + len(tokens), device=model.norm.weight.device)
    part = cache.head(start + len(tokens))
    kept = [layer[:, :, start:].clone() for layer in (*part.k, *part.v)]
    try:
        with tally_kept(model) as tally:
            model.hidden(torch.tensor([tokens], device=positions.device), positions, part, DECODE)
    finally:
        for layer, before in zip((*part.k, *part.v), kept, strict=True):
            layer[:, :, start:] = before
    found, ranks = tally.by_kind(model), ranks_of(model)
    return found if ranks is None else ranks.mean(found)


def cached_bytes(model: Transformer, context: int) -> int:
    """Bytes of keys and values that a token reads after `context` tokens: a sliding window holds its last ones only."""
    args, itemsize = model.args, model.norm.weight.element_size()
    earlier = sum(context if window is None else min(context, window - 1) for window in args.sliding_windows)
    return 2 * earlier * args.n_kv_heads * args.head_dim * itemsize


def bytes_per_token(model: Transformer, sparsity: float, contexts: Sequence[int] = ()) -> int:
    """Bytes that one decoded token reads when a share `sparsity` of the sparse layers' rows is skipped.

    Weights, and keys and values: the mean over tokens of which each has so many before it. Without contexts weights.
    """
    cached = round(statistics.mean(cached_bytes(model, context) for context in contexts)) if contexts else 0
    weights = [layer.weight for layer in sparse_layers(model).values()]
    sparse = sum(weight.row_bytes * weight.in_features for weight in weights)
    total = sum(parameter.nbytes for parameter in model.parameters())  # a tied output layer counts once …
    if model.output.weight is not model.tok_embeddings.weight:
        # … and of an embedding table of its own one row is read
        total -= sum(parameter.nbytes for parameter in model.tok_embeddings.parameters())
    return total - round(sparse * sparsity) + cached
