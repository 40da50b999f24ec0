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

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
# Fields that change what the reference implementations compute, with the one value computed here.
FIXED_FIELDS = {"hidden_act": "silu", "partial_rotary_factor": 1.0, "quantization_config": None}
ROPE_TYPES = ("default", "linear", "llama3", "factors")


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
        sizes = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size", "max_position")
        for name in sizes:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"config.json: {name} is {value!r}, expected a whole number of at least 1")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"config.json: {self.n_heads} heads cannot share {self.n_kv_heads} key/value heads evenly")
        if self.head_dim % 2:
            raise ValueError(f"config.json: head_dim is {self.head_dim}, rotary embedding needs an even number")

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ModelArgs":
        """Reads a Hugging Face config.json. Raises ValueError naming the first missing or unsupported field."""
        architecture = config.get("model_type")
        if architecture not in ARCHITECTURES:
            supported = ", ".join(ARCHITECTURES)
            raise ValueError(f"config.json: model_type {architecture!r} is not supported, expected one of {supported}")
        for name, value in FIXED_FIELDS.items():
            if config.get(name, value) != value:
                raise ValueError(f"config.json: {name} {config[name]!r} is not supported, expected {value!r}")

        def required(name: str) -> Any:
            if config.get(name) is None:
                raise ValueError(f"config.json: {name} is missing, a {architecture} model needs it")
            return config[name]

        heads = required("num_attention_heads")
        attention_bias = bool(config.get("attention_bias", False)) and architecture in ("llama", "qwen3")
        return cls(
            architecture=architecture,
            dim=required("hidden_size"),
            n_layers=required("num_hidden_layers"),
            n_heads=heads,
            n_kv_heads=config.get("num_key_value_heads") or heads,  # absent before grouped-query attention
            head_dim=config.get("head_dim") or required("hidden_size") // heads,
            ffn_dim=required("intermediate_size"),
            vocab_size=required("vocab_size"),
            max_position=required("max_position_embeddings"),
            norm_eps=float(required("rms_norm_eps")),
            rope=_rope(config),
            sliding_windows=_sliding_windows(config),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=attention_bias or architecture == "qwen2",
            o_bias=attention_bias,
            mlp_bias=bool(config.get("mlp_bias", False)) and architecture == "llama",
            qk_norm=architecture == "qwen3",
        )


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings from either spelling: `rope_parameters`, or `rope_theta` beside `rope_scaling`."""
    rope = {"rope_theta": 10000.0} | {k: v for k, v in config.items() if k == "rope_theta" and v is not None}
    rope |= config.get("rope_scaling") or {}
    rope |= config.get("rope_parameters") or {}
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    if rope["rope_type"] not in ROPE_TYPES:
        raise ValueError(f"config.json: rope_type {rope['rope_type']!r} is not supported, expected one of {ROPE_TYPES}")
    needed = {
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        "factors": ("factors",),
    }
    for name in needed.get(rope["rope_type"], ()):
        if name not in rope:
            raise ValueError(f"config.json: rope_scaling of type {rope['rope_type']} lacks {name}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"config.json: partial_rotary_factor {rope['partial_rotary_factor']} is not supported")
    return rope


def _sliding_windows(config: dict[str, Any]) -> tuple[int | None, ...]:
    layers = config["num_hidden_layers"]
    window = config.get("sliding_window")
    if config["model_type"] == "llama" or window is None:
        return (None,) * layers
    if config["model_type"] == "mistral":
        return (window,) * layers
    if not config.get("use_sliding_window", False):
        return (None,) * layers
    kinds = config.get("layer_types")
    if kinds is None:
        full = config.get("max_window_layers", layers)
        kinds = ["full_attention"] * min(full, layers) + ["sliding_attention"] * max(layers - full, 0)
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"config.json: layer_types {sorted(unknown)} are not supported")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def rotary_frequencies(rope: dict[str, Any], head_dim: int) -> Tensor:
    """Angle per position of each rotated pair, fp32 [head_dim / 2]. "llama3" scaling: arXiv:2407.21783, section 3.4."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    frequency = 1.0 / rope["rope_theta"] ** exponent
    if rope["rope_type"] == "linear":
        return frequency / rope["factor"]
    if rope["rope_type"] == "factors":  # GGUF files carry the divisors themselves
        return frequency / torch.tensor(rope["factors"], dtype=torch.float32, device="cpu")
    if rope["rope_type"] == "llama3":
        # Long wavelengths are stretched by `factor`, short ones kept, those between blended.
        wavelength = 2 * math.pi / frequency
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = (rope["original_max_position_embeddings"] / wavelength - low) / (high - low)
        kept = kept.clamp(0, 1)
        return (1 - kept) * frequency / rope["factor"] + kept * frequency
    return frequency


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [B, heads, T, head_dim] by cos, sin [T, head_dim / 2] (arXiv:2104.09864)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


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
        self.wqkv = nn.Linear(args.dim, sum(self.sizes), bias=args.qkv_bias)
        self.wo = nn.Linear(query, args.dim, bias=args.o_bias)
        self.q_norm = RMSNorm(args.head_dim, args.norm_eps) if args.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(args.head_dim, args.norm_eps) if args.qk_norm else nn.Identity()
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
        self.w13 = nn.Linear(args.dim, 2 * args.ffn_dim, bias=args.mlp_bias)  # gate, then up
        self.w2 = nn.Linear(args.ffn_dim, args.dim, bias=args.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.attention = Attention(args)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)
        self.feed_forward = FeedForward(args)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, input_pos: Tensor | None, mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, input_pos, mask)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.max_seq_length = 0
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(Block(args) for _ in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
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
        angles = positions[:, None].float() * self.frequencies
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        masks = {window: self._mask(positions, input_pos, window) for window in set(self.args.sliding_windows)}
        for layer, window in zip(self.layers, self.args.sliding_windows, strict=True):
            x = layer(x, cos, sin, input_pos, masks[window])
        return self.norm(x)

    def forward(self, tokens: Tensor, input_pos: Tensor | None = None) -> Tensor:
        """Logits [B, T, vocab] of tokens [B, T]; see `hidden` for input_pos."""
        return self.output(self.hidden(tokens, input_pos))

    def _mask(self, positions: Tensor, input_pos: Tensor | None, window: int | None) -> Tensor | None:
        """Which keys each query sees, bool [T, keys]; None for plain causal attention within the tokens given."""
        if input_pos is None and (window is None or positions.shape[0] <= window):
            return None
        keys = positions if input_pos is None else torch.arange(self.max_seq_length, device=positions.device)
        mask = keys <= positions[:, None]
        return mask if window is None else mask & (keys > positions[:, None] - window)
