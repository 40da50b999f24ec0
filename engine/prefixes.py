"""The prefixes of several conversations: keys and values by token ids, to be copied back where a prompt begins alike.

They lie in a trie of blocks, so that conversations that begin with the same tools and instructions share the memory of
these. A prompt need not end with a block: the longest common prefix is found to the token. Each position keeps the
highest sparsity at which it or an earlier one was made, as in the engine, and gives way to the same ids made at a lower
one. When the budget is full, the leaf that was used least recently goes first: of a conversation the end goes before
its beginning, which others may share.

prefix_file.py keeps a store over restarts.
"""

import sys
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from teal_fast.model import KVCache, Transformer

# Tokens. Each conversation that parts from another within a block has a copy of that block's beginning, so that fewer
# save memory: of 128 it is 64 tokens on average. But each block costs a copy a layer of keys and one of values.
BLOCK = 128


@dataclass(eq=False)
class Block:
    """Tokens that follow those of the parent. kv [2 layers, kv_heads, tokens, head_dim]: keys of all layers, values.

    Only full blocks have children. No child's ids begin with all of another's.
    """

    ids: tuple[int, ...]
    made: list[float]
    kv: Tensor
    children: dict[tuple[int, ...], "Block"] = field(default_factory=dict)

    def child_along(self, ids: tuple[int, ...]) -> "Block | None":
        """The child that begins with these ids, or all of which they begin with."""
        along = (child for child in self.children.values() if child.ids[: len(ids)] == ids[: len(child.ids)])
        return self.children.get(ids) or next(along, None)


def usable(prefixes: "PrefixStore | None", model: Transformer) -> "PrefixStore | None":
    """The store, or none, saying so, where keys of long texts are turned otherwise than those of their beginnings."""
    if prefixes is None or model.args.longest_plain is None:
        return prefixes
    print("prefixes are not kept: this model turns the keys of long texts otherwise", file=sys.stderr)
    return None


class PrefixStore:
    """Keys and values of prefixes within a budget of bytes, on the device of the cache that they come from.

    One thread uses it at a time, the one that has the engine: nothing here is locked. All caches are of one model. The
    bytes are those of keys and values; ids and sparsities take some 50 bytes a token besides. block: tokens.
    """

    def __init__(self, budget: int, block: int = BLOCK):
        self.budget, self.block = budget, block
        self.clear()
        self.changed = False  # since it was saved or loaded

    def clear(self) -> None:
        """Forgets all prefixes."""
        self.root, self.nbytes, self.changed = Block((), [], torch.empty(0)), 0, True
        # Each block's parent, by when the block was last used. A parent is used whenever its child is, and stands
        # behind it: the first is a leaf.
        self.parents: OrderedDict[Block, Block] = OrderedDict()

    def put(self, ids: Sequence[int], made: Sequence[float], cache: KVCache) -> None:
        """Keeps a copy of the cache's positions of these ids; made: their sparsities, which do not decrease.

        What is kept already is not copied again, unless it was made at a higher sparsity. Of ids that exceed the budget
        by themselves their beginning is kept: it is what another prompt is most likely to share.
        """
        rows = [*cache.k, *cache.v]
        token_bytes = sum(row[0, :, 0].nbytes for row in rows)
        ids = tuple(ids[: self.budget // token_bytes])
        keys = [ids[begin : begin + self.block] for begin in range(0, len(ids), self.block)]
        path = [self.root]
        for key in keys:
            if (child := path[-1].child_along(key)) is None:
                break
            path.append(child)
        self._touch(path)
        missing = len(ids) - sum(len(block.ids) for block in path)
        while self.nbytes + missing * token_bytes > self.budget:  # never of the path, which fits by itself
            self._evict()
        try:
            for number, key in enumerate(keys):
                begin = number * self.block
                if number + 1 < len(path):
                    self._merge(path[number], path[number + 1], key, made[begin : begin + len(key)], rows, begin)
                else:
                    child = Block(key, list(made[begin : begin + len(key)]), _stack(rows, begin, begin + len(key)))
                    self.attach(path[-1], child)
                    path.append(child)
        finally:  # also when memory runs out on the way
            self._touch(path)

    def known(self, prompt: Sequence[int], sparsity: float) -> int:
        """How many of the prompt's first tokens, its last left out, are kept as made at no higher sparsity."""
        return self._find(prompt, sparsity)[1]

    def fetch(self, prompt: Sequence[int], sparsity: float, start: int, end: int, cache: KVCache) -> list[float]:
        """Copies the prompt's positions [start, end), of those that are known, into the cache; the sparsities of these.

        What the cache holds before `start` may have been made at a higher sparsity than some of them.
        """
        path, known = self._find(prompt, sparsity)
        assert 0 <= start <= end <= known, (start, end, known)
        made = []
        for number, block in enumerate(path):
            begin = number * self.block
            low, high = max(start - begin, 0), min(end - begin, len(block.ids))
            if low < high:
                for row, kept in zip((*cache.k, *cache.v), block.kv, strict=True):
                    row[0, :, begin + low : begin + high] = kept[:, low:high]
                made += block.made[low:high]
        return made

    def _find(self, prompt: Sequence[int], sparsity: float) -> tuple[list[Block], int]:
        """The blocks that the prompt begins with, and how many of their tokens it may reuse."""
        path, known, most = [self.root], 0, len(prompt) - 1
        while True:
            key = tuple(prompt[known : min(known + self.block, most)])
            full = path[-1].children.get(key)
            if full is None or len(key) < self.block or full.made[-1] > sparsity:
                break
            path.append(full)
            known += self.block
        # The rest is in one of the children, if any: one that parts from the prompt later, or stays dense for longer.
        usable = {c: min(_common(c.ids, key), bisect_right(c.made, sparsity)) for c in path[-1].children.values()}
        best = max(usable, key=usable.get, default=None)
        if best is not None and usable[best]:
            path.append(best)
            known += usable[best]
        self._touch(path)
        return path[1:], known

    def _touch(self, path: list[Block]) -> None:
        """Makes a path from the root the most recently used."""
        for parent, block in reversed(list(pairwise(path))):
            self.parents[block] = parent
            self.parents.move_to_end(block)

    def _evict(self) -> None:
        block, parent = self.parents.popitem(last=False)
        del parent.children[block.ids]
        self.nbytes -= block.kv.nbytes
        self.changed = True

    def attach(self, parent: Block, block: Block) -> None:
        """Makes a block a child; when it was used last is said by the order of `parents`."""
        parent.children[block.ids] = block
        self.nbytes += block.kv.nbytes
        self.changed = True

    def _merge(
        self, parent: Block, block: Block, ids: tuple[int, ...], made: Sequence[float], rows: list[Tensor], begin: int
    ) -> None:
        """Makes a block longer where ids go on after its own, and replaces what they were made for at less sparsity."""
        lower = [i for i, (new, old) in enumerate(zip(made, block.made, strict=False)) if new < old]
        if lower:
            block.kv[:, :, lower] = _stack(rows, begin, begin + len(ids))[:, :, lower]
            for i in lower:
                block.made[i] = made[i]
            self.changed = True
        if len(ids) > (held := len(block.ids)):
            longer = torch.cat((block.kv, _stack(rows, begin + held, begin + len(ids))), 2)
            del parent.children[block.ids]
            self.nbytes -= block.kv.nbytes
            block.ids, block.made, block.kv = ids, [*block.made, *made[held:]], longer
            self.attach(parent, block)


def _stack(rows: list[Tensor], begin: int, end: int) -> Tensor:
    """A copy of positions of a cache's rows [1, kv_heads, length, head_dim]: [rows, kv_heads, positions, head_dim]."""
    return torch.stack([row[0, :, begin:end] for row in rows])


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two sequences begin with in common."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
