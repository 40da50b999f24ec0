"""How a model is cut among ranks, and how each of them reads its part of a checkpoint and no more.

Layers that read the hidden state, q/k/v and gate/up, are cut along their outputs, each of q, k, v, gate and up by
itself; o and down, which read those outputs, along their inputs, so that a rank's products with them are summands of
the whole ones. The output layer is cut along the vocabulary. Embeddings, norms, and biases of sums are every rank's.
A rank's model is an ordinary one of fewer heads and channels: model.py knows nothing of ranks. Source:
arXiv:1909.08053.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from teal_fast.families.args import ModelArgs
from teal_fast.kernels.block_planes import NARROW, STRIP, pack_plane, unpack_plane
from teal_fast.kernels.blocks import BLOCK_TYPES
from teal_fast.kernels.int4 import row_bytes
from teal_fast.weights.formats import EMBEDDINGS, OUTPUT, BlockFormat, Format

SUMMED = ("wo", "w2")  # layers whose outputs are summed over ranks
LAYERS = ("attention.wqkv", "attention.wo", "feed_forward.w13", "feed_forward.w2")
PARTS = ".weight.parts."
Slices = Mapping[str, Any]  # tensors of a file by name, of which parts can be read


class Shard(NamedTuple):
    """One of `ranks` parts of a model, counted from 0."""

    rank: int
    ranks: int

    def of(self, size: int, begin: int = 0) -> range:
        """This rank's share of `size` things that start at `begin`: as many as every other's, at most fewer at last."""
        share = -(-size // self.ranks)
        return range(begin + min(self.rank * share, size), begin + min((self.rank + 1) * share, size))

    def inputs(self, layer: str, K: int) -> slice:
        """Which of the K inputs of a layer, by its module name, this rank has."""
        share = self.of(K) if layer.endswith(SUMMED) else range(K)
        return slice(share.start, share.stop)


@dataclass(frozen=True)
class Cut:
    """A rank's part of a model. whole, format: the model's own sizes and format, None for unquantized weights."""

    shard: Shard
    whole: ModelArgs
    format: Format | BlockFormat | None = None

    @property
    def args(self) -> ModelArgs:
        """The sizes of the rank's model: its output layer is beside them (`vocabulary`), and has weights of its own."""
        names = ("n_heads", "n_kv_heads", "ffn_dim")
        sizes = {name: len(self.shard.of(getattr(self.whole, name))) for name in names}
        return replace(self.whole, tie_embeddings=False, **sizes)

    @property
    def vocabulary(self) -> range:
        """The tokens whose logits the rank computes."""
        return self.shard.of(self.whole.vocab_size)

    @property
    def part_format(self) -> Format | BlockFormat | None:
        """The format of the rank's weights."""
        if not isinstance(self.format, BlockFormat):
            return self.format
        modules = [*self.format.parts, *([OUTPUT] if self._tied(OUTPUT) in self.format.parts else [])]
        outputs = {name: self._parts(name) for name in modules}
        parts = {
            name: tuple((kind, sum(len(inside) for _, inside in pieces)) for kind, pieces in found)
            for name, found in outputs.items()
        }
        return replace(self.format, parts=parts)

    def check(self) -> None:
        """Raises ValueError unless the model can be cut so, naming the numbers of ranks by which it can."""
        if (misfit := self._misfit()) is not None:
            whole = [Cut(Shard(0, ranks), self.whole, self.format) for ranks in range(1, self.whole.n_kv_heads + 1)]
            fit = " or ".join(str(cut.shard.ranks) for cut in whole if cut._misfit() is None)
            raise ValueError(f"{self.shard.ranks} ranks cannot share this model ({misfit}): start {fit}")

    def _misfit(self) -> str | None:
        args, ranks = self.whole, self.shard.ranks
        sizes = {"heads": args.n_heads, "key/value heads": args.n_kv_heads, "channels of the MLP": args.ffn_dim}
        for what, size in sizes.items():
            if size % ranks:
                return f"its {size} {what} do not divide by {ranks}"
        if args.vocab_size <= (ranks - 1) * -(-args.vocab_size // ranks):
            return f"its {args.vocab_size} tokens leave a rank without any"
        if args.qk_norm == "whole" and ranks > 1:
            return "its norms over all of q and of k span the ranks"
        try:
            self._check_format()
        except ValueError as error:
            return str(error).partition(":")[0]
        return None

    def _check_format(self) -> None:
        """Raises ValueError where a layer's storage can't be cut so."""
        if (format := self.part_format) is None:
            return
        args = self.args
        query, key = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
        sizes = [(args.dim, query + 2 * key), (query, args.dim), (args.dim, 2 * args.ffn_dim), (args.ffn_dim, args.dim)]
        for number in range(args.n_layers):
            for layer, (K, N) in zip(LAYERS, sizes, strict=True):
                name = f"layers.{number}.{layer}"
                with torch.device("meta"):
                    format.layer(name, K, N)
                group = self._group(name)
                if group and any(outputs.start % group or outputs.stop % group for outputs in self._outputs(name)):
                    raise ValueError(f"{len(self._outputs(name)[0])} outputs of a rank cut groups of {group}")

    def read(self, name: str, whole: Slices) -> Tensor:
        """The rank's tensor of its model's parameter `name`, of the whole model's parameters."""
        if PARTS in name:
            return self._read_part(name, whole)
        module = name.removesuffix(".bias").split(".weight")[0].removesuffix(".scale")
        found = whole[name.replace(module, self._tied(module))]
        outputs, is_row = self._outputs(module), name.endswith(".packed")
        if is_row and module.endswith(SUMMED):
            return found[self.shard.inputs(module, found.get_shape()[0])]
        if not outputs:
            return found[:]
        if is_row and (group := self._group(module)):
            return _int4_columns(found, outputs, group, sum(self._sizes(module)))
        if is_row:
            return _joined([found[:, run.start : run.stop] for run in outputs], 1)
        return _joined([found[run.start : run.stop] for run in outputs], 0)

    def _group(self, module: str) -> int:
        """Outputs that share a row scale, 0 where rows hold no scales."""
        return self.format.within(module).group if isinstance(self.format, Format) else 0

    def _tied(self, module: str) -> str:
        """Which module of the whole model has a module's weights."""
        own = isinstance(self.format, Format) or (self.format is not None and OUTPUT in self.format.parts)
        return EMBEDDINGS if module == OUTPUT and self.whole.tie_embeddings and not own else module

    def _sizes(self, module: str) -> list[int]:
        """Outputs of what lies beside each other in a layer that is cut along them; none of other modules."""
        args, layer = self.whole, module.rpartition(".")[2]
        key = args.n_kv_heads * args.head_dim
        sizes = {"wqkv": [args.n_heads * args.head_dim, key, key], "w13": 2 * [args.ffn_dim]}
        return sizes.get(layer, [args.vocab_size] if module == OUTPUT else [])

    def _outputs(self, module: str) -> list[range]:
        """Which outputs of the whole layer are the rank's; none: all."""
        sizes = self._sizes(module)
        return [self.shard.of(size, begin) for size, begin in zip(sizes, accumulate(sizes, initial=0), strict=False)]

    def _parts(self, module: str) -> list[tuple[str, list[tuple[int, range]]]]:
        """The parts of a rank's layer in blocks: their type, and which outputs of which of the whole layer's parts."""
        found: list[tuple[str, list[tuple[int, range]]]] = []
        whole = self.format.parts[self._tied(module)]
        for run in self._outputs(module) or [range(sum(N for _, N in whole))]:
            for number, (kind, inside) in enumerate(_within(whole, run)):
                if inside and found and found[-1][0] == kind:
                    found[-1][1].append((number, inside))
                elif inside:
                    found.append((kind, [(number, inside)]))
        return found

    def _read_part(self, name: str, whole: Slices) -> Tensor:
        """A tensor of a part in blocks: codes lie in strips (kernels/block_planes.py), scales as they are."""
        module, _, rest = name.partition(PARTS)
        number, tensor = rest.split(".")
        kind, pieces = self._parts(module)[int(number)]
        bits = BLOCK_TYPES[kind].planes[int(tensor[-1])] if tensor.startswith("plane") else 0
        found = [whole[f"{self._tied(module)}{PARTS}{of}.{tensor}"] for of, _ in pieces]
        rows = self.shard.inputs(module, found[0].get_shape()[0])
        if [len(of) for _, of in pieces] == [self.format.parts[self._tied(module)][pieces[0][0]][1]]:  # all of it
            return found[0][rows]
        if not bits:
            return _padded([part[rows, of.start : of.stop] for part, (_, of) in zip(found, pieces, strict=True)])
        codes = [_codes(part, rows, of, bits) for part, (_, of) in zip(found, pieces, strict=True)]
        return pack_plane(_padded(codes), bits)


def _joined(pieces: Sequence[Tensor], dim: int) -> Tensor:
    """One piece as it is, which may stay memory-mapped."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def _padded(pieces: Sequence[Tensor]) -> Tensor:
    """Columns beside each other, of blocks, whose outputs are padded."""
    return F.pad(torch.cat(pieces, 1), (0, -sum(piece.shape[1] for piece in pieces) % NARROW))


def _within(parts: Sequence[tuple[str, int]], run: range) -> Iterator[tuple[str, range]]:
    """Each part's type, and which of its outputs lie in a run of all outputs."""
    begin = 0
    for kind, N in parts:
        yield kind, range(min(max(run.start - begin, 0), N), min(max(run.stop - begin, 0), N))
        begin += N


def _int4_columns(packed: Any, outputs: Sequence[range], group: int, N: int) -> Tensor:
    """Rows of int4 (kernels/int4.py) of some of the N outputs, in whole groups."""
    values = [packed[:, run.start // 2 : run.stop // 2] for run in outputs]
    scales = [packed[:, N // 2 + 2 * run.start // group : N // 2 + 2 * run.stop // group] for run in outputs]
    row = torch.cat((*values, *scales), 1)
    return F.pad(row, (0, row_bytes(sum(map(len, outputs)), group) - row.shape[1]))


def _codes(plane: Any, rows: slice, outputs: range, bits: int) -> Tensor:
    """Some outputs' codes out of a plane, of which the strips are read that they lie in."""
    first, last = outputs.start // STRIP * STRIP, -(-outputs.stop // STRIP) * STRIP
    strips = plane[rows, first * bits // 8 : last * bits // 8]  # the last may be a narrow one
    return unpack_plane(strips, bits)[:, outputs.start - first : outputs.stop - first]
