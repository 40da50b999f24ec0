"""The dense transformer, torch only: Llama 1/2/3, Mistral, Qwen2/2.5, Qwen3, SmolLM2, built from their config.json.

It knows nothing of sparsity, weight formats or devices: sparse_model.py replaces its linear layers from outside.
q/k/v and gate/up are fused into `wqkv` and `w13`; rotary embedding is the half-split form of Hugging Face checkpoints.
"""

import math
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
    def reset_parameters(self) -> None:
        """Draws no initial values: checkpoints have them, and drawing any, even on "meta", costs 1.2 s and 150 MB."""


class KVCache(nn.Module):
    """Keys and values of the tokens so far, at fixed addresses: k, v [B, kv_heads, max_seq_length, head_dim]."""

    def __init__(self, batch: int, heads: int, max_seq_length: int, head_dim: int, like: Tensor):
        super().__init__()
        for name in ("k", "v"):
            self.register_buffer(name, like.new_zeros(batch, heads, max_seq_length, head_dim), persistent=False)

    def update(self, input_pos: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.k.index_copy_(2, input_pos, k)
        self.v.index_copy_(2, input_pos, v)
        return self.k, self.v


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
        self.kv_cache: KVCache | None = None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, input_pos: Tensor | None, mask: Tensor | None) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (part.view(batch, tokens, -1, self.head_dim) for part in self.wqkv(x).split(self.sizes, dim=-1))
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.kv_cache is not None:
            positions = torch.arange(tokens, device=x.device) if input_pos is None else input_pos
            cached = self.kv_cache.update(positions, k, v)
            if input_pos is not None:
                k, v = cached
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.n_heads != self.n_kv_heads
        )
        return self.wo(y.transpose(1, 2).reshape(batch, tokens, -1))


class FeedForward(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w13 = Linear(args.dim, 2 * args.ffn_dim, bias=args.mlp_bias)  # gate, then up
        self.w2 = Linear(args.ffn_dim, args.dim, bias=args.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.attention_norm = nn.RMSNorm(args.dim, args.norm_eps)
        self.attention = Attention(args)
        self.ffn_norm = nn.RMSNorm(args.dim, args.norm_eps)
        self.feed_forward = FeedForward(args)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, input_pos: Tensor | None, mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, input_pos, mask)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.max_seq_length = 0
        self.tok_embeddings = nn.Embedding.from_pretrained(torch.empty(args.vocab_size, args.dim))
        self.layers = nn.ModuleList(Block(args) for _ in range(args.n_layers))
        self.norm = nn.RMSNorm(args.dim, args.norm_eps)
        self.output = Linear(args.dim, args.vocab_size, bias=False)
        if args.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        self.register_buffer("frequencies", rotary_frequencies(args.rope, args.head_dim), persistent=False)

    def setup_caches(self, batch: int, max_seq_length: int) -> None:
        """Allocates an empty key/value cache for `batch` sequences of up to `max_seq_length` tokens."""
        if max_seq_length > self.args.max_position:
            raise ValueError(f"a context of {max_seq_length} tokens exceeds this model's {self.args.max_position}")
        self.max_seq_length = max_seq_length
        for layer in self.layers:
            layer.attention.kv_cache = KVCache(
                batch, self.args.n_kv_heads, max_seq_length, self.args.head_dim, like=self.norm.weight
            )

    def hidden(self, tokens: Tensor, input_pos: Tensor | None = None) -> Tensor:
        """Final normed hidden states [B, T, dim] of tokens [B, T].

        `input_pos` [T] int64 holds the tokens' positions and makes them attend over the cache; None stands for
        0 … T-1, a sequence from its start, which needs no cache but fills it when there is one.
        """
        x = self.tok_embeddings(tokens)
        positions = torch.arange(tokens.shape[1], device=x.device) if input_pos is None else input_pos
        cos, sin = self.rotary(positions, x.dtype)
        masks = {window: self.mask(positions, input_pos, window) for window in set(self.args.sliding_windows)}
        for layer, window in zip(self.layers, self.args.sliding_windows, strict=True):
            x = layer(x, cos, sin, input_pos, masks[window])
        return self.norm(x)

    def forward(self, tokens: Tensor, input_pos: Tensor | None = None) -> Tensor:
        """Logits [B, T, vocab] of tokens [B, T]; see `hidden` for input_pos."""
        return self.output(self.hidden(tokens, input_pos))

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [T, head_dim / 2] of the angles at positions [T]."""
        angles = positions[:, None].float() * self.frequencies
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def mask(self, positions: Tensor, input_pos: Tensor | None, window: int | None) -> Tensor | None:
        """Which keys each query sees, bool [T, keys]; None for plain causal attention within the tokens given."""
        if input_pos is None and (window is None or positions.shape[0] <= window):
            return None
        keys = positions if input_pos is None else torch.arange(self.max_seq_length, device=positions.device)
        mask = keys <= positions[:, None]
        return mask if window is None else mask & (keys > positions[:, None] - window)
