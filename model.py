"""The dense transformer, torch only: Llama 1/2/3, Mistral, Qwen2/2.5, Qwen3, SmolLM2, by their `ModelArgs`.

It knows nothing of sparsity, weight formats, checkpoints or devices: sparse_model.py replaces its linear layers from
outside. A model holds weights alone: the key/value cache is an argument of each call, and so is `phase`, which is
handed on to the linear layers unread, for those that were put in their place.

q/k/v and gate/up are fused into `wqkv` and `w13`; rotary embedding is the half-split form of Hugging Face checkpoints.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelArgs:
    """Sizes and switches of one model; `sliding_windows`: each layer's window in tokens, None for full attention."""

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
    rope: dict[str, Any]
    sliding_windows: tuple[int | None, ...]
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self):
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"config.json: {self.n_heads} heads cannot share {self.n_kv_heads} key/value heads evenly")
        if self.head_dim % 2:
            raise ValueError(f"config.json: head_dim is {self.head_dim}, rotary embedding needs an even number")
        if (factors := self.rope.get("factors")) and len(factors) != self.head_dim // 2:
            raise ValueError(f"config.json: {len(factors)} rope factors, expected half of head_dim {self.head_dim}")

    def check_ids(self, ids: Collection[int]) -> None:
        """Raises ValueError when a token id has no row in the embedding table: some tokenizers are larger than it."""
        if bad := [id for id in (min(ids, default=0), max(ids, default=0)) if not 0 <= id < self.vocab_size]:
            raise ValueError(
                f"token id {bad[0]} is outside the model's vocabulary of {self.vocab_size}: leave that token out of "
                "the text, or use the tokenizer that belongs to the model"
            )


def rotary_frequencies(rope: dict[str, Any], head_dim: int) -> Tensor:
    """Angle per position of each rotated pair, fp32 [head_dim / 2]. "llama3" scaling: arXiv:2407.21783, section 3.4."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    frequency = 1.0 / rope["rope_theta"] ** exponent
    if rope["rope_type"] == "linear":
        return frequency / rope["factor"]
    if rope["rope_type"] == "factors":
        return frequency / torch.tensor(rope["factors"], dtype=torch.float32, device="cpu")
    if rope["rope_type"] == "llama3":
        # Long wavelengths are stretched by `factor`, short ones kept, those between blended.
        turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - kept) * frequency / rope["factor"] + kept * frequency
    return frequency


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [B, heads, T, head_dim] by cos, sin [T, head_dim / 2] (arXiv:2104.09864)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Linear(nn.Linear):
    def forward(self, x: Tensor, phase: Any = None) -> Tensor:
        """A dense layer computes the same in every phase of a call."""
        return super().forward(x)

    def reset_parameters(self) -> None:
        """Draws no initial values: checkpoints have them, and drawing any, even on "meta", costs 1.2 s and 150 MB."""


class KVCache:
    """Keys and values of the tokens so far, at fixed addresses: k, v [B, kv_heads, length, head_dim] of each layer."""

    def __init__(self, k: list[Tensor], v: list[Tensor]):
        self.k, self.v = k, v

    @property
    def length(self) -> int:
        """The number of positions that there is room for."""
        return self.k[0].shape[2]

    def head(self, length: int) -> "KVCache":
        """The cache's first positions, as a view: a prompt's pass over it costs as much as these."""
        return KVCache([k[:, :, :length] for k in self.k], [v[:, :, :length] for v in self.v])

    def update(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k and v [B, kv_heads, T, head_dim] of the positions [T]; all keys and values of the layer."""
        self.k[layer].index_copy_(2, positions, k)
        self.v[layer].index_copy_(2, positions, v)
        return self.k[layer], self.v[layer]


@dataclass(frozen=True)
class Call:
    """What all layers of one call share: rotary cos and sin [T, head_dim / 2], and where keys and values go.

    positions [T]: of the tokens in the cache. over_cache: whether the tokens attend over the cache, or over each other.
    """

    cos: Tensor
    sin: Tensor
    positions: Tensor
    cache: KVCache | None = None
    over_cache: bool = False
    phase: Any = None


class Attention(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = args.n_heads, args.n_kv_heads, args.head_dim
        query, key = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
        self.sizes = (query, key, key)
        self.wqkv = Linear(args.dim, sum(self.sizes), bias=args.qkv_bias)
        self.wo = Linear(query, args.dim, bias=args.o_bias)
        self.q_norm = nn.RMSNorm(args.head_dim, args.norm_eps) if args.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(args.head_dim, args.norm_eps) if args.qk_norm else nn.Identity()

    def forward(self, x: Tensor, call: Call, mask: Tensor | None, layer: int) -> Tensor:
        batch, tokens, _ = x.shape
        parts = self.wqkv(x, call.phase).split(self.sizes, dim=-1)
        q, k, v = (part.view(batch, tokens, -1, self.head_dim) for part in parts)
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)
        q, k = rotate(q, call.cos, call.sin), rotate(k, call.cos, call.sin)
        if call.cache is not None:
            cached = call.cache.update(layer, call.positions, k, v)
            if call.over_cache:
                k, v = cached
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.n_heads != self.n_kv_heads
        )
        return self.wo(y.transpose(1, 2).reshape(batch, tokens, -1), call.phase)


class FeedForward(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w13 = Linear(args.dim, 2 * args.ffn_dim, bias=args.mlp_bias)  # gate, then up
        self.w2 = Linear(args.ffn_dim, args.dim, bias=args.mlp_bias)

    def forward(self, x: Tensor, phase: Any = None) -> Tensor:
        gate, up = self.w13(x, phase).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up, phase)


class Block(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.attention_norm = nn.RMSNorm(args.dim, args.norm_eps)
        self.attention = Attention(args)
        self.ffn_norm = nn.RMSNorm(args.dim, args.norm_eps)
        self.feed_forward = FeedForward(args)

    def forward(self, x: Tensor, call: Call, mask: Tensor | None, layer: int) -> Tensor:
        x = x + self.attention(self.attention_norm(x), call, mask, layer)
        return x + self.feed_forward(self.ffn_norm(x), call.phase)


class Transformer(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding.from_pretrained(torch.empty(args.vocab_size, args.dim))
        self.layers = nn.ModuleList(Block(args) for _ in range(args.n_layers))
        self.norm = nn.RMSNorm(args.dim, args.norm_eps)
        self.output = Linear(args.dim, args.vocab_size, bias=False)
        if args.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        self.register_buffer("frequencies", rotary_frequencies(args.rope, args.head_dim), persistent=False)

    def new_cache(self, batch: int, length: int) -> KVCache:
        """An empty key/value cache for `batch` sequences of up to `length` tokens."""
        if length > self.args.max_position:
            raise ValueError(f"a context of {length} tokens exceeds this model's {self.args.max_position}")
        shape = (batch, self.args.n_kv_heads, length, self.args.head_dim)
        k, v = ([self.norm.weight.new_zeros(shape) for _ in self.layers] for _ in range(2))
        return KVCache(k, v)

    def hidden(
        self, tokens: Tensor, input_pos: Tensor | None = None, cache: KVCache | None = None, phase: Any = None
    ) -> Tensor:
        """Final normed hidden states [B, T, dim] of tokens [B, T], whose keys and values go into the cache.

        `input_pos` [T] int64 holds the tokens' positions and makes them attend over the whole cache; None stands for
        0 … T-1, a sequence from its start, which attends over itself and needs no cache.
        """
        x = self.tok_embeddings(tokens)
        positions = torch.arange(tokens.shape[1], device=x.device) if input_pos is None else input_pos
        call = Call(*self.rotary(positions, x.dtype), positions, cache, input_pos is not None, phase)
        keys = cache.length if input_pos is not None else None
        masks = {window: self.mask(positions, keys, window) for window in set(self.args.sliding_windows)}
        for number, (layer, window) in enumerate(zip(self.layers, self.args.sliding_windows, strict=True)):
            x = layer(x, call, masks[window], number)
        return self.norm(x)

    def forward(
        self, tokens: Tensor, input_pos: Tensor | None = None, cache: KVCache | None = None, phase: Any = None
    ) -> Tensor:
        """Logits [B, T, vocab] of tokens [B, T]; see `hidden`."""
        return self.output(self.hidden(tokens, input_pos, cache, phase))

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [T, head_dim / 2] of the angles at positions [T]."""
        angles = positions[:, None].float() * self.frequencies
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def mask(self, positions: Tensor, keys: int | None, window: int | None) -> Tensor | None:
        """Which keys each query sees, bool [T, keys]; None for plain causal attention.

        keys: how many positions of a cache the tokens attend over; None: over the tokens themselves.
        """
        if keys is None and (window is None or positions.shape[0] <= window):
            return None
        seen = positions if keys is None else torch.arange(keys, device=positions.device)
        mask = seen <= positions[:, None]
        return mask if window is None else mask & (seen > positions[:, None] - window)
