"""Tiny models as GGUF files, written as llama.cpp writes them: for tests of their conversion."""

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from tokenizers import pre_tokenizers

from teal_fast.tests.models import LLAMA3_ROPE

MERGES = ["t h", "th e", "i n"]
VOCABULARY = sorted(pre_tokenizers.ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in MERGES] + ["<end>"]
LLAMA3_VOCABULARY = ["<|begin_of_text|>", *VOCABULARY[1:]]
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": len(VOCABULARY),
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
CASES = {
    "llama": (transformers.LlamaConfig, {}),
    "llama_biases": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    "llama3_rope": (transformers.LlamaConfig, {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "linear_rope": (transformers.LlamaConfig, {"rope_parameters": {"rope_type": "linear", "factor": 3.0}}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 32}),
}


HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q2_K": (80, 82)}


def make_model(case="llama", **more):
    kind, fields = CASES[case]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(kind(**SIZES | fields | more)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
        elif parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def their_name(name):
    module, kind = name.rsplit(".", 1)
    if module in TOP_NAMES:
        return f"{TOP_NAMES[module]}.{kind}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[rest]}.{kind}"


def permute(rows, heads):
    """convert_hf_to_gguf.py's LlamaModel.permute: rotary pairs side by side."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def random_tensor(name, N, K, seed, size=0.01):
    """Random bytes of a GGUF tensor [N, K], but with finite scales of this size."""
    rng, kind = np.random.default_rng(seed), Type[name]
    inputs, block = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (N, K // inputs, block), dtype=np.uint8)
    for at in HALVES.get(name, (0,)):
        value = (rng.standard_normal((N, K // inputs, 1)) * size).astype(np.float16)
        blocks[:, :, at : at + 2] = value.view(np.uint8)
    return blocks.reshape(N, -1)


def rounded(values, kind):
    """Bytes of such values in a type; where gguf-py has no way to round to it, random ones, of about their size."""
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        size = 0.001
        for _ in range(2):  # tiny scales are rounded badly, so that once is not enough
            found = random_tensor(kind.name, *values.shape, seed=values.size, size=size)
            size *= values.std() / gguf.quants.dequantize(found, kind).std()
        return random_tensor(kind.name, *values.shape, seed=values.size, size=size)


def write_gguf(path, model, kind=Type.F32, extra=None, metadata=None, vocabulary=VOCABULARY, tokenizer="gpt2"):
    """Writes `model` and rounds the model itself to what is then in the file.

    kind: the type of matrices, or a function from a tensor's name to it.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    fields = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "rope.dimension_count": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    if config.rope_parameters["rope_type"] == "linear":
        fields |= {"rope.scaling.type": "linear", "rope.scaling.factor": config.rope_parameters["factor"]}
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for name, value in (fields | (metadata or {})).items():
        if value is not None:
            add[type(value)](name if name.startswith(("split.", "general.")) else f"{config.model_type}.{name}", value)
    writer.add_tokenizer_model(tokenizer)
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(VOCABULARY) - 1) + [gguf.TokenType.CONTROL])
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(len(VOCABULARY) - 1)
    tied = config.tie_word_embeddings
    for name, parameter in model.named_parameters():
        if tied and name == "lm_head.weight":
            continue
        values, stored = parameter.detach().numpy(), kind(their_name(name)) if callable(kind) else kind
        stored = stored if parameter.ndim == 2 else Type.F32
        packed = rounded(values, stored)
        parameter.data.copy_(torch.from_numpy(np.array(gguf.quants.dequantize(packed, stored))))
        if config.model_type == "llama" and (".q_proj" in name or ".k_proj" in name):
            heads = config.num_attention_heads if ".q_proj" in name else config.num_key_value_heads
            packed = permute(packed, heads)
        writer.add_tensor(their_name(name), packed, raw_dtype=stored)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
