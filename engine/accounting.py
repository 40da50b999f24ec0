"""TODO."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from teal_fast.model import Transformer
from teal_fast.sparse_model import KINDS, SparseLinear, sparse_layers, watch_inputs


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
                held[kind] = held.get(kind, 0) + seen * layers[name].weight.packed[0].nbytes
                read[kind] = read.get(kind, 0) + self.kept[name].item() * layers[name].weight.packed[0].nbytes
        return {kind: 1 - read[kind] / held[kind] for kind in held if held[kind]}


@contextmanager
def tally_kept(model: Transformer) -> Iterator[Tally]:
    """Counts, in the block, what every sparse layer keeps of the tokens that it does not compute densely."""
    tally = Tally()

    def count(name: str, layer: SparseLinear, x: Tensor) -> None:
        decoded = x[:, layer.count_dense(x.shape[1]) :]
        tally.seen[name] = tally.seen.get(name, 0) + decoded.numel()
        tally.kept[name] = tally.kept.get(name, 0) + layer.dropped(decoded).logical_not().sum()

    with watch_inputs(model, count):
        yield tally


def bytes_per_token(model: Transformer, sparsity: float, context: int = 0) -> int:
    """Bytes that one decoded token reads when a share `sparsity` of the sparse layers' rows is skipped.

    Weights, and the keys and values of `context` earlier tokens.
    """
    args, itemsize = model.args, model.norm.weight.element_size()
    cached = 2 * args.n_layers * args.n_kv_heads * args.head_dim * itemsize * context
    sparse = sum(layer.weight.packed.nbytes for layer in sparse_layers(model).values())
    total = sum(parameter.nbytes for parameter in model.parameters())  # a tied output layer counts once …
    if model.output.weight is not model.tok_embeddings.weight:
        total -= model.tok_embeddings.weight.nbytes  # … and of an embedding table of its own one row is read
    return total - round(sparse * sparsity) + cached
