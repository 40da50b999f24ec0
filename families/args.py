"""What a model is told to be: sizes, switches and rotary embeddings, read from a config.json by families/config.py.

A family differs from Llama by these values alone; model.py and the decode steps know no family by its name.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rope:
    """Rotary embedding as numbers, made by families/rotary.py: of each pair of a head's channels, [head_dim / 2].

    frequencies: the angle a position, 0 where a pair is not turned. sizes: what a pair is multiplied by besides. Texts
    of more than `border` tokens, if it is not 0, have the frequencies `long`, or with `growth` ever lower ones.
    """

    frequencies: tuple[float, ...]
    sizes: tuple[float, ...]
    border: int = 0
    long: tuple[float, ...] = ()
    growth: float = 0.0
    exponents: tuple[float, ...] = ()  # of growth

    def regime(self, length: int) -> int:
        """Texts of which lengths have the same frequencies: those for which this is the same."""
        beyond = self.border and length > self.border
        return 0 if not beyond else length if self.growth else 1

    def at(self, length: int) -> Tensor:
        """The frequencies of a text of so many tokens, fp32 [head_dim / 2]."""
        as_tensor = partial(torch.tensor, dtype=torch.float32, device="cpu")
        if not self.regime(length):
            return as_tensor(self.frequencies)
        stretched = 1 + self.growth * (length / self.border - 1)
        return as_tensor(self.long) * stretched ** -as_tensor(self.exponents) if self.growth else as_tensor(self.long)


@dataclass(frozen=True)
class ModelArgs:
    """Sizes and switches of one model.

    ropes: the rotary embeddings that its layers have; rope_of: which of them each has. sliding_windows: each layer's
    window in tokens, None for full attention. turned: channels of a head that rotary embedding turns, in the files that
    weights come from. qk_norm: of q and k, "head" by head or "whole", "turned" head by head after the rotary
    embedding, "" for none. attention_cap, output_cap: scores and logits become cap * tanh(x / cap); 0 for as they are.
    attention_scale: of the scores, None for 1 / sqrt(head_dim). query_growth: beta and tokens: from each so many tokens
    to the next, queries grow as 1 + beta * ln(1 + position // tokens).
    """

    architecture: str
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    max_position: int
    norm_eps: float
    ropes: tuple[Rope, ...]
    rope_of: tuple[int, ...]
    sliding_windows: tuple[int | None, ...]
    turned: int
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str = ""
    norm_before: bool = True
    norm_behind: bool = False
    activation: str = "silu"
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    query_growth: tuple[float, int] | None = None
    attention_cap: float = 0.0
    output_cap: float = 0.0

    def __post_init__(self):
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"config.json: {self.n_heads} heads cannot share {self.n_kv_heads} key/value heads evenly")

    @property
    def longest_plain(self) -> int | None:
        """The longest text that is turned as all shorter ones are; None for no limit."""
        return min((rope.border for rope in self.ropes if rope.border), default=None)

    @property
    def remakes_keys(self) -> bool:
        """Whether a text that outgrows that has its keys made again (longrope), or turns only the next otherwise."""
        return any(rope.border and not rope.growth for rope in self.ropes)

    def beyond_llama(self, *served: str) -> str:
        """What layers have besides a Llama's, in words, for steps that compute only that, and the fields `served`."""
        found = {
            "qk_norm": ("norms of q and k", self.qk_norm),
            "whole_norm": ("norms over all of q and of k", self.qk_norm == "whole"),
            "turned_norm": ("norms behind the rotary embedding", self.qk_norm == "turned"),
            "norm_behind": ("norms behind attention and MLP", self.norm_behind),
            "norm_before": ("no norms before them", not self.norm_before),
            "activation": (f"an MLP with {self.activation}", self.activation != "silu"),
            "embedding_scale": ("scaled embeddings", self.embedding_scale != 1),
            "attention_scale": ("scores scaled otherwise", self.attention_scale is not None),
            "query_growth": ("queries that grow with their position", self.query_growth),
            "caps": ("soft caps", self.attention_cap or self.output_cap),
            "ropes": ("several rotary embeddings", len(self.ropes) > 1),
            "sizes": ("rotary embedding that scales", any(size != 1 for rope in self.ropes for size in rope.sizes)),
        }
        return ", ".join(what for field, (what, has) in found.items() if has and field not in served)

    def check_ids(self, ids: Collection[int]) -> None:
        """Raises ValueError when a token id has no row in the embedding table: some tokenizers are larger than it."""
        if bad := [id for id in (min(ids, default=0), max(ids, default=0)) if not 0 <= id < self.vocab_size]:
            raise ValueError(
                f"token id {bad[0]} is outside the model's vocabulary of {self.vocab_size}: leave that token out of "
                "the text, or use the tokenizer that belongs to the model"
            )
