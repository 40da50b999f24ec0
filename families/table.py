"""The families of models, a row each: how one departs from Llama, and what its config.json leaves unsaid.

Defaults are transformers 5.23's. A family that needs more than a row needs a new switch in args.py first.
"""

from dataclasses import dataclass, field
from typing import Any

# The names of tensors in Hugging Face folders, without "model." and "layers.N.", and in GGUF files, without "blk.N.".
HUGGINGFACE = {
    "tok_embeddings": ("embed_tokens",),
    "attention_norm": ("input_layernorm",),
    "attention.wqkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.q_norm": ("self_attn.q_norm",),
    "attention.k_norm": ("self_attn.k_norm",),
    "attention.wo": ("self_attn.o_proj",),
    "ffn_norm": ("post_attention_layernorm",),
    "feed_forward.w13": ("mlp.gate_proj", "mlp.up_proj"),
    "feed_forward.w2": ("mlp.down_proj",),
    "norm": ("norm",),
}
GGUF = {
    "tok_embeddings": ("token_embd",),
    "attention_norm": ("attn_norm",),
    "attention.wqkv": ("attn_q", "attn_k", "attn_v"),
    "attention.q_norm": ("attn_q_norm",),
    "attention.k_norm": ("attn_k_norm",),
    "attention.wo": ("attn_output",),
    "attention_norm_behind": ("post_attention_norm",),
    "ffn_norm": ("ffn_norm",),
    "feed_forward.w13": ("ffn_gate", "ffn_up"),
    "feed_forward.w2": ("ffn_down",),
    "ffn_norm_behind": ("post_ffw_norm",),
    "norm": ("output_norm",),
    "output": ("output",),
}
FUSED_MLP = {"feed_forward.w13": ("mlp.gate_up_proj",)}
FOUR_NORMS = {
    "attention_norm_behind": ("post_attention_layernorm",),
    "ffn_norm": ("pre_feedforward_layernorm",),
    "ffn_norm_behind": ("post_feedforward_layernorm",),
}
ATTENTION_BIAS = ("attention_bias", False)
GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "use_bidirectional_attention": False}


@dataclass(frozen=True)
class Family:
    """A row. Biases are a field of config.json with its default, or fixed.

    fixed: fields that may be absent, or have this value. grouped: whether num_key_value_heads has to stand there.
    head_dim: its default, None for dim / heads. partial: the default of partial_rotary_factor, None where other than 1
    is refused. windows: which layers have one, see families/config.py; full_every: where it is said by a number.
    local_rope: windowed layers have rotary settings of their own, by default of this theta. interleaved: neighbouring
    channels are turned together. plus_one: norms are stored less 1. names: where they differ from Llama's.
    """

    gguf: str = ""  # the architecture's name there
    theta: float = 10000.0
    grouped: bool = False
    head_dim: int | None = None
    tied: bool = False
    qkv_bias: tuple[str, bool] | bool = False
    o_bias: tuple[str, bool] | bool = False
    mlp_bias: tuple[str, bool] | bool = False
    qk_norm: str = ""
    norm_before: bool = True
    norm_behind: bool = False
    activation: str = "silu"
    partial: float | None = None
    windows: str = ""
    full_every: int = 0
    local_rope: float | None = None
    no_rope_every: int = 0
    scales: str = ""
    ffn_field: str = "intermediate_size"
    interleaved: bool = False
    plus_one: bool = False
    fixed: dict[str, Any] = field(default_factory=lambda: {"hidden_act": "silu"})
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    gguf_names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    gguf_interleaved: bool = False


def gemma(**more: Any) -> Family:
    return Family(
        **{
            "grouped": True,
            "head_dim": 256,
            "tied": True,
            "qkv_bias": ATTENTION_BIAS,
            "o_bias": ATTENTION_BIAS,
            "norm_behind": True,
            "activation": "gelu_tanh",
            "windows": "layers",
            "scales": "gemma",
            "plus_one": True,
            "names": FOUR_NORMS,
        }
        | more
    )


GRANITE = {
    "gguf": "granite",
    "qkv_bias": ATTENTION_BIAS,
    "o_bias": ATTENTION_BIAS,
    "scales": "granite",
    "gguf_interleaved": True,
}
OLMO = {
    "gguf": "olmo2",
    "qkv_bias": ATTENTION_BIAS,
    "o_bias": ATTENTION_BIAS,
    "qk_norm": "whole",
    "norm_before": False,
    "norm_behind": True,
    "names": {name: FOUR_NORMS[name] for name in ("attention_norm_behind", "ffn_norm_behind")},
}
FAMILIES = {
    "llama": Family(
        gguf="llama",
        qkv_bias=ATTENTION_BIAS,
        o_bias=ATTENTION_BIAS,
        mlp_bias=("mlp_bias", False),
        gguf_interleaved=True,
    ),
    "mistral": Family(gguf="llama", grouped=True, windows="all", gguf_interleaved=True),
    "ministral3": Family(
        gguf="mistral3", theta=1e6, grouped=True, head_dim=128, windows="all", scales="llama4", gguf_interleaved=True
    ),
    "qwen2": Family(gguf="qwen2", grouped=True, qkv_bias=True, windows="qwen"),
    "qwen3": Family(
        gguf="qwen3",
        grouped=True,
        head_dim=128,
        qkv_bias=ATTENTION_BIAS,
        o_bias=ATTENTION_BIAS,
        qk_norm="head",
        windows="qwen",
    ),
    "granite": Family(**GRANITE, mlp_bias=("mlp_bias", False)),
    "granitemoehybrid": Family(
        **GRANITE,
        ffn_field="shared_intermediate_size",
        fixed={"hidden_act": "silu", "num_local_experts": 0},
        names={"feed_forward.w13": ("shared_mlp.input_linear",), "feed_forward.w2": ("shared_mlp.output_linear",)},
    ),
    "phi3": Family(
        gguf="phi3",
        partial=1.0,
        windows="all",
        names=FUSED_MLP | {"attention.wqkv": ("self_attn.qkv_proj",)},
        gguf_names={"attention.wqkv": ("attn_qkv",), "feed_forward.w13": ("ffn_up",)},
    ),
    "smollm3": Family(
        gguf="smollm3",
        theta=2e6,
        tied=True,
        qkv_bias=ATTENTION_BIAS,
        o_bias=ATTENTION_BIAS,
        mlp_bias=("mlp_bias", False),
        windows="smollm3",
        no_rope_every=4,
        gguf_interleaved=True,
    ),
    "olmo2": Family(**OLMO),
    "olmo3": Family(**OLMO, theta=5e5, windows="layers", full_every=4, local_rope=5e5),
    "gemma2": gemma(gguf="gemma2", full_every=2, fixed=GEMMA),
    "gemma3_text": gemma(
        gguf="gemma3",
        theta=1e6,
        qk_norm="head",
        full_every=6,
        local_rope=1e4,
        fixed=GEMMA | {"final_logit_softcapping": None, "attn_logit_softcapping": None},
    ),
    "glm4": Family(
        gguf="glm4",
        grouped=True,
        head_dim=128,
        qkv_bias=("attention_bias", True),
        norm_behind=True,
        partial=0.5,
        interleaved=True,
        names=FUSED_MLP
        | {"attention_norm_behind": ("post_self_attn_layernorm",), "ffn_norm_behind": ("post_mlp_layernorm",)},
        gguf_names={"feed_forward.w13": ("ffn_up",)},
        gguf_interleaved=True,
    ),
    "ernie4_5": Family(
        gguf="ernie4_5",
        theta=5e5,
        head_dim=128,
        tied=True,
        qkv_bias=("use_bias", False),
        o_bias=("use_bias", False),
        mlp_bias=("use_bias", False),
        interleaved=True,
        gguf_interleaved=True,
    ),
    "seed_oss": Family(
        gguf="seed_oss",
        head_dim=128,
        qkv_bias=("attention_bias", True),
        o_bias=("attention_out_bias", False),
        mlp_bias=("mlp_bias", False),
        gguf_names={"ffn_norm": ("post_attention_norm",)},
    ),
    "hunyuan_v1_dense": Family(
        gguf="hunyuan-dense",
        qkv_bias=ATTENTION_BIAS,
        o_bias=ATTENTION_BIAS,
        qk_norm="turned",
        names={"attention.q_norm": ("self_attn.query_layernorm",), "attention.k_norm": ("self_attn.key_layernorm",)},
    ),
}
# The start of the class's name in transformers, which others go by; it ends in ForCausalLM.
CLASSES = {
    **{"llama": "Llama", "mistral": "Mistral", "ministral3": "Ministral3", "qwen2": "Qwen2", "qwen3": "Qwen3"},
    **{"granite": "Granite", "granitemoehybrid": "GraniteMoeHybrid", "phi3": "Phi3", "smollm3": "SmolLM3"},
    **{"olmo2": "Olmo2", "olmo3": "Olmo3", "gemma2": "Gemma2", "gemma3_text": "Gemma3"},
    **{"glm4": "Glm4", "ernie4_5": "Ernie4_5", "seed_oss": "SeedOss", "hunyuan_v1_dense": "HunYuanDenseV1"},
}
# Models with a vision tower around text, which is `text_config`: its model_type where it says none.
WRAPPERS = {"mistral3": "mistral", "gemma3": "gemma3_text"}
