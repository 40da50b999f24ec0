"""The dense transformer, torch only: Llama and the families that are like it, by their `ModelArgs` (docs/families.md).

It knows nothing of sparsity, weight formats, checkpoints or devices: sparse_model.py replaces its linear layers from
outside. A model holds weights alone: the key/value cache is an argument of each call, and so is `phase`, which is
handed on to the linear layers unread, for those that were put in their place.

q/k/v and gate/up are fused into `wqkv` and `w13`; rotary embedding is the half-split form of Hugging Face checkpoints.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teal_fast.families.args import ModelArgs

ACTIVATIONS = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}  # of the gate


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [B, heads, T, head_dim] by cos, sin [T, head_dim / 2] (arXiv:2104.09864)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """x kept within -cap … cap; x itself where cap is 0."""
    return cap * (x / cap).tanh() if cap else x


def capped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, cap: float) -> Tensor:
    """scaled_dot_product_attention with scores kept within a cap, which that has no argument for (Gemma 2)."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    scores = soft_cap(q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale), cap)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1, torch.float32).to(v.dtype) @ v


class Linear(nn.Linear):
    def forward(self, x: Tensor, phase: Any = None) -> Tensor:
        """A dense layer computes the same in every phase of a call."""
        return super().forward(x)

    def reset_parameters(self) -> None:
        """Draws no initial values: checkpoints have them, and drawing any, even on "meta", costs 1.2 s and 150 MB."""


def norm(width: int, args: ModelArgs, wanted: bool) -> nn.Module:
    """RMSNorm of so many channels, or nothing where a family has none."""
    return nn.RMSNorm(width, args.norm_eps) if wanted else nn.Identity()


class KVCache:
    """Keys and values of the tokens so far, at fixed addresses: k, v [B, kv_heads, length, head_dim] of each layer.

    frequencies: by which its keys are turned, see `Transformer.stretch`.
    """

    def __init__(self, k: list[Tensor], v: list[Tensor], frequencies: Tensor):
        self.k, self.v, self.frequencies = k, v, frequencies
        self.regimes: list[int] | None = None  # that these are of

    @property
    def length(self) -> int:
        """The number of positions that there is room for."""
        return self.k[0].shape[2]

    def head(self, length: int) -> "KVCache":
        """The cache's first positions, as a view: a prompt's pass over it costs as much as these."""
        return KVCache([k[:, :, :length] for k in self.k], [v[:, :, :length] for v in self.v], self.frequencies)

    def update(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k and v [B, kv_heads, T, head_dim] of the positions [T]; all keys and values of the layer."""
        self.k[layer].index_copy_(2, positions, k)
        self.v[layer].index_copy_(2, positions, v)
        return self.k[layer], self.v[layer]


@dataclass(frozen=True)
class Call:
    """What the layers of one call share: rotary cos and sin [T, head_dim / 2], and where keys and values go.

    positions [T]: of the tokens in the cache. over_cache: whether the tokens attend over the cache, or over each other.
    growth [T, 1]: of the queries.
    """

    cos: Tensor
    sin: Tensor
    positions: Tensor
    cache: KVCache | None = None
    over_cache: bool = False
    phase: Any = None
    growth: Tensor | None = None


class Attention(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = args.n_heads, args.n_kv_heads, args.head_dim
        query, key = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
        self.sizes = (query, key, key)
        self.wqkv = Linear(args.dim, sum(self.sizes), bias=args.qkv_bias)
        self.wo = Linear(query, args.dim, bias=args.o_bias)
        self.scale, self.cap = args.attention_scale, args.attention_cap
        widths = (query, key) if args.qk_norm == "whole" else (args.head_dim, args.head_dim)
        self.q_norm, self.k_norm = (norm(width, args, bool(args.qk_norm)) for width in widths)
        self.widths = (*widths, args.head_dim)  # of what a norm sees at once
        self.norm_turned = args.qk_norm == "turned"

    def forward(self, x: Tensor, call: Call, mask: Tensor | None, layer: int) -> Tensor:
        batch, tokens, _ = x.shape
        parts = self.wqkv(x, call.phase).split(self.sizes, dim=-1)
        q, k, v = (part.view(batch, tokens, -1, width) for part, width in zip(parts, self.widths, strict=True))
        normed = (q, k, v) if self.norm_turned else (self.q_norm(q), self.k_norm(k), v)
        q, k, v = (part.view(batch, tokens, -1, self.head_dim).transpose(1, 2) for part in normed)
        q, k = rotate(q, call.cos, call.sin), rotate(k, call.cos, call.sin)
        if self.norm_turned:  # Hunyuan; weights of a norm that comes before would be turned as well
            q, k = self.q_norm(q), self.k_norm(k)
        if call.growth is not None:
            q = q * call.growth
        if call.cache is not None:
            cached = call.cache.update(layer, call.positions, k, v)
            if call.over_cache:
                k, v = cached
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale,
            enable_gqa=self.n_heads != self.n_kv_heads,
        ) if not self.cap else capped_attention(q, k, v, mask, self.scale, self.cap)  # fmt: skip
        return self.wo(y.transpose(1, 2).reshape(batch, tokens, -1), call.phase)


class FeedForward(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w13 = Linear(args.dim, 2 * args.ffn_dim, bias=args.mlp_bias)  # gate, then up
        self.w2 = Linear(args.ffn_dim, args.dim, bias=args.mlp_bias)
        self.activation = ACTIVATIONS[args.activation]

    def forward(self, x: Tensor, phase: Any = None) -> Tensor:
        gate, up = self.w13(x, phase).chunk(2, dim=-1)
        return self.w2(self.activation(gate).mul_(up), phase)  # in place: a prompt's are 40 MB and more


class Block(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.attention_norm = norm(args.dim, args, args.norm_before)
        self.attention = Attention(args)
        self.attention_norm_behind = norm(args.dim, args, args.norm_behind)
        self.ffn_norm = norm(args.dim, args, args.norm_before)
        self.feed_forward = FeedForward(args)
        self.ffn_norm_behind = norm(args.dim, args, args.norm_behind)

    def forward(self, x: Tensor, call: Call, mask: Tensor | None, layer: int) -> Tensor:
        x = x + self.attention_norm_behind(self.attention(self.attention_norm(x), call, mask, layer))
        return x + self.ffn_norm_behind(self.feed_forward(self.ffn_norm(x), call.phase))


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
        self.reset_rope()

    def reset_rope(self, device: torch.device | str = "cpu") -> None:
        """Sets frequencies and rope_sizes [ropes, head_dim / 2], which `to_empty` would lose."""
        sizes = torch.tensor([rope.sizes for rope in self.args.ropes], dtype=torch.float32, device=device)
        self.register_buffer("frequencies", self.frequencies_at(1).to(device), persistent=False)
        self.register_buffer("rope_sizes", sizes, persistent=False)

    def new_cache(self, batch: int, length: int) -> KVCache:
        """An empty key/value cache for `batch` sequences of up to `length` tokens."""
        if length > self.args.max_position:
            raise ValueError(f"a context of {length} tokens exceeds this model's {self.args.max_position}")
        shape = (batch, self.args.n_kv_heads, length, self.args.head_dim)
        k, v = ([self.norm.weight.new_zeros(shape) for _ in self.layers] for _ in range(2))
        varies = self.args.longest_plain is not None
        return KVCache(k, v, self.frequencies.clone() if varies else self.frequencies)

    def frequencies_at(self, length: int) -> Tensor:
        """The angles a position that all of a text of so many tokens is turned by, fp32 [ropes, head_dim / 2]."""
        return torch.stack([rope.at(length) for rope in self.args.ropes])

    def stretch(self, cache: KVCache, length: int) -> bool:
        """Sets by what a text of so many tokens is turned; whether keys that are in the cache had to be made again.

        Whoever fills a cache calls it before: with the text's length at its start, and then token by token.
        """
        if self.args.longest_plain is None:
            return False
        regimes = [rope.regime(length) for rope in self.args.ropes]
        if regimes == cache.regimes:
            return False
        cache.frequencies.copy_(self.frequencies_at(length))
        cache.regimes = regimes
        return True

    def hidden(
        self, tokens: Tensor, input_pos: Tensor | None = None, cache: KVCache | None = None, phase: Any = None
    ) -> Tensor:
        """Final normed hidden states [B, T, dim] of tokens [B, T], whose keys and values go into the cache.

        `input_pos` [T] int64 holds the tokens' positions and makes them attend over the whole cache; None stands for
        0 … T-1, a sequence from its start, which attends over itself and needs no cache.
        """
        x = self.embed(tokens)
        positions = torch.arange(tokens.shape[1], device=x.device) if input_pos is None else input_pos
        calls = self.calls(positions, x.dtype, cache, input_pos is not None, phase)
        keys = cache.length if input_pos is not None else None
        masks = {window: self.mask(positions, keys, window) for window in set(self.args.sliding_windows)}
        for number, (layer, window) in enumerate(zip(self.layers, self.args.sliding_windows, strict=True)):
            x = layer(x, calls[number], masks[window], number)
        return self.norm(x)

    def embed(self, tokens: Tensor) -> Tensor:
        """Hidden states [B, T, dim] before the first layer."""
        x = self.tok_embeddings(tokens)
        return x if self.args.embedding_scale == 1 else x * self.args.embedding_scale  # spares Llama a pass over x

    def forward(
        self, tokens: Tensor, input_pos: Tensor | None = None, cache: KVCache | None = None, phase: Any = None
    ) -> Tensor:
        """Logits [B, T, vocab] of tokens [B, T]; see `hidden`."""
        return self.logits(self.hidden(tokens, input_pos, cache, phase))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab] of final normed hidden states [..., dim]."""
        return soft_cap(self.output(hidden), self.args.output_cap)

    def wide_logits(self, hidden: Tensor, output: Tensor) -> Tensor:
        """The same in fp32 throughout; output: the output layer's weight, fp32 [vocab, dim]."""
        return soft_cap(F.linear(hidden.float(), output), self.args.output_cap)

    def calls(
        self,
        positions: Tensor,
        dtype: torch.dtype,
        cache: KVCache | None = None,
        over_cache: bool = False,
        phase: Any = None,
    ) -> list[Call]:
        """Each layer's call for tokens at positions [T], which without a cache are a text from its start."""
        if cache is not None:
            frequencies = cache.frequencies
        elif self.args.longest_plain is None:
            frequencies = self.frequencies
        else:
            frequencies = self.frequencies_at(positions.shape[0]).to(positions.device)
        growth = None
        if self.args.query_growth:
            beta, tokens = self.args.query_growth
            growth = (1 + beta * (1 + positions // tokens).float().log())[:, None].to(dtype)
        calls = []
        for rope in range(len(self.args.ropes)):
            angles, sizes = positions[:, None].float() * frequencies[rope], self.rope_sizes[rope]
            cos, sin = (angles.cos() * sizes).to(dtype), (angles.sin() * sizes).to(dtype)
            calls.append(Call(cos, sin, positions, cache, over_cache, phase, growth))
        return [calls[rope] for rope in self.args.rope_of]

    def mask(self, positions: Tensor, keys: int | None, window: int | None) -> Tensor | None:
        """Which keys each query sees, bool [T, keys]; None for plain causal attention.

        keys: how many positions of a cache the tokens attend over; None: over the tokens themselves.
        """
        if keys is None and (window is None or positions.shape[0] <= window):
            return None
        seen = positions if keys is None else torch.arange(keys, device=positions.device)
        mask = seen <= positions[:, None]
        return mask if window is None else mask & (seen > positions[:, None] - window)
