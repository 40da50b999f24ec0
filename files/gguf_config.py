"""A GGUF file's metadata as the config.json that describes the same model, read as llama.cpp reads them.

Files in several parts are refused, and so are files of older converters that left out what the model needs, unless it
is given.
"""

from functools import partial
from typing import Any

import gguf
import torch

from teal_fast.families.config import SOFT_CAPS
from teal_fast.families.table import FAMILIES, Family
from teal_fast.files.gguf_reader import dequantize, find_value
from teal_fast.files.pre_tokenizers import well_known

ROPE_FACTORS = "rope_freqs.weight"
LONGROPE = {"long_factor": "rope_factors_long.weight", "short_factor": "rope_factors_short.weight"}
# Llama 3.1 and later on top of rope_theta 500000, in config.json's words. Two models of Llama 3.2 have a factor of 32.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA32_SIZES = ((2048, 16), (3072, 28))  # dim and layers of 1B and 3B
LLAMA3_BOS, CODE_LLAMA_TOKEN = "<|begin_of_text|>", "▁<PRE>"  # tell these vocabularies from all others
ROPE_SCALINGS = ("llama3", "none")  # what may be given where the file says nothing
FIXED_KEYS = {"attention.causal": True}  # what llama.cpp reads for every model
TOKENS = "tokenizer.ggml.tokens"
# The family of an architecture's files, where it has another name or several: the others have the same.
MODEL_TYPES = {family.gguf: name for name, family in reversed(FAMILIES.items()) if family.gguf}
# Layers of Gemma 2's and 3's 27B; their queries are scaled by dim / heads, as llama.cpp tells them from the others.
GEMMA_27B = {"gemma2": 46, "gemma3": 62}


def to_config(
    reader: gguf.GGUFReader, rope_scaling: str | None = None, rope_theta: float | None = None
) -> dict[str, Any]:
    """The Hugging Face config.json that describes the same model. Raises ValueError naming a missing or bad key.

    `rope_scaling`, one of ROPE_SCALINGS, and `rope_theta` count instead of what the file says or leaves out.
    """
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    architecture = find_value(reader, "general.architecture", str)
    check_supported(reader, architecture)
    value = partial(find_value, reader)
    vocab_size = len(value(TOKENS, list))
    dim = value(f"{architecture}.embedding_length", int)
    heads = value(f"{architecture}.attention.head_count", int)
    head_dim = value(f"{architecture}.attention.key_length", int, dim // max(heads, 1))
    windowed = architecture == "olmo2" and value(f"{architecture}.attention.sliding_window", int, 0)
    model_type = "olmo3" if windowed else MODEL_TYPES.get(architecture, architecture)
    rotated = value(f"{architecture}.rope.dimension_count", int, head_dim)
    if rotated != head_dim and (model_type not in FAMILIES or FAMILIES[model_type].partial is None):
        raise ValueError(f"the GGUF metadata rotates {rotated} of {head_dim} dimensions, expected all of them")
    config = {
        "model_type": model_type,
        "hidden_size": dim,
        "num_hidden_layers": value(f"{architecture}.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": value(f"{architecture}.attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "intermediate_size": value(f"{architecture}.feed_forward_length", int),
        "vocab_size": vocab_size,
        "max_position_embeddings": value(f"{architecture}.context_length", int),
        "rms_norm_eps": value(f"{architecture}.attention.layer_norm_rms_epsilon", float),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    if rotated != head_dim:
        config["partial_rotary_factor"] = rotated / head_dim
    if 0 <= (eos := value("tokenizer.ggml.eos_token_id", int, -1)) < vocab_size:
        config["eos_token_id"] = eos
    if model_type in FAMILIES:
        config |= biases(FAMILIES[model_type], tensors)
    if model_type in OWN_KEYS:
        config |= OWN_KEYS[model_type](reader, config)
    config["rope_theta"] = find_theta(reader, architecture) if rope_theta is None else rope_theta
    scaling = find_scaling(reader, architecture, config, tensors, rope_scaling)
    if scaling and model_type == "phi3":  # which has it outside of the block
        config["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
    return write_rope(reader, architecture, config, scaling)


def write_rope(
    reader: gguf.GGUFReader, architecture: str, config: dict[str, Any], scaling: dict[str, Any] | None
) -> dict[str, Any]:
    """The config with rotary settings: one block of scaling, or, of models whose windowed layers have none, two."""
    local = FAMILIES[config["model_type"]].local_rope if config["model_type"] in FAMILIES else None
    if local is None:
        return config | ({"rope_scaling": scaling} if scaling else {})
    theta = config.pop("rope_theta")
    local = theta if config["model_type"] == "olmo3" else local
    local = find_value(reader, f"{architecture}.rope.freq_base_swa", float, local)
    full = (scaling or {"rope_type": "default"}) | {"rope_theta": theta}
    windowed = {"rope_type": "default", "rope_theta": local}
    return config | {"rope_parameters": {"full_attention": full, "sliding_attention": windowed}}


def biases(family: Family, tensors: dict[str, gguf.ReaderTensor]) -> dict[str, bool]:
    """The family's fields of config.json that say which layers have biases, by what the file has."""
    found = {
        "qkv_bias": any(f"blk.0.attn_{part}.bias" in tensors for part in ("q", "qkv")),
        "o_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in tensors,
    }
    fields = {switch: getattr(family, switch) for switch in found}
    return {field[0]: found[switch] for switch, field in fields.items() if not isinstance(field, bool)}


def granite_keys(reader: gguf.GGUFReader, config: dict[str, Any]) -> dict[str, Any]:
    plain = (config["hidden_size"] // config["num_attention_heads"]) ** -0.5
    return {
        "embedding_multiplier": find_value(reader, "granite.embedding_scale", float, 1.0),
        "residual_multiplier": find_value(reader, "granite.residual_scale", float, 1.0),
        "attention_multiplier": find_value(reader, "granite.attention.scale", float, plain),
        "logits_scaling": find_value(reader, "granite.logit_scale", float, 1.0),
    }


def gemma_keys(reader: gguf.GGUFReader, config: dict[str, Any]) -> dict[str, Any]:
    architecture = find_value(reader, "general.architecture", str)
    large = config["num_hidden_layers"] == GEMMA_27B[architecture]
    scalar = config["hidden_size"] // config["num_attention_heads"] if large else config["head_dim"]
    caps = SOFT_CAPS if architecture == "gemma2" else dict.fromkeys(SOFT_CAPS, 0.0)
    return {
        "sliding_window": find_value(reader, f"{architecture}.attention.sliding_window", int),
        "query_pre_attn_scalar": scalar,
    } | {name: find_value(reader, f"{architecture}.{name}", float, default) or None for name, default in caps.items()}


def mistral3_keys(reader: gguf.GGUFReader, config: dict[str, Any]) -> dict[str, Any]:
    return {"llama_4_scaling_beta": find_value(reader, "mistral3.attention.temperature_scale", float, 0.0)}


def window_key(reader: gguf.GGUFReader, config: dict[str, Any]) -> dict[str, Any]:
    architecture = find_value(reader, "general.architecture", str)
    return {"sliding_window": find_value(reader, f"{architecture}.attention.sliding_window", int, 0) or None}


# What files of a family say besides.
OWN_KEYS = {
    "granite": granite_keys,
    "gemma2": gemma_keys,
    "gemma3_text": gemma_keys,
    "ministral3": mistral3_keys,
    "olmo3": window_key,
    "phi3": window_key,
}


def check_supported(reader: gguf.GGUFReader, architecture: str) -> None:
    if (parts := find_value(reader, "split.count", int, 1)) > 1:
        raise ValueError(f"the GGUF file is one of {parts} parts: join them with llama.cpp's llama-gguf-split --merge")
    for key, fixed in FIXED_KEYS.items():
        if (found := find_value(reader, f"{architecture}.{key}", type(fixed), fixed)) != fixed:
            raise ValueError(f"the GGUF metadata has {architecture}.{key} {found}, expected {fixed}")


def find_theta(reader: gguf.GGUFReader, architecture: str) -> float:
    """The base of the rotary frequencies: llama.cpp's default is Llama 1's and 2's, later models state theirs."""
    key = f"{architecture}.rope.freq_base"
    early = find_value(reader, "tokenizer.ggml.model", str) == "llama"
    if reader.get_field(key) is None and not (early and CODE_LLAMA_TOKEN not in find_value(reader, TOKENS, list)):
        raise ValueError(f"the GGUF metadata lacks {key}: give rope_theta of the model's config.json as --rope_theta")
    return find_value(reader, key, float, 10000.0)


def find_scaling(
    reader: gguf.GGUFReader,
    architecture: str,
    config: dict[str, Any],
    tensors: dict[str, gguf.ReaderTensor],
    given: str | None,
) -> dict[str, Any] | None:
    """config.json's rope_scaling. Raises ValueError where an older converter must have left it out."""
    if given == "llama3":
        factor = 32.0 if (config["hidden_size"], config["num_hidden_layers"]) in LLAMA32_SIZES else 8.0
        return {"rope_type": "llama3", "factor": factor, **LLAMA3_ROPE}
    found = stated_scaling(reader, architecture, config, tensors) if given is None else None
    long = config["rope_theta"] == 500000 and config["max_position_embeddings"] > 8192
    if found is None and given is None and long and is_llama3(find_value(reader, TOKENS, list)):
        raise ValueError(
            f"the GGUF file has no {ROPE_FACTORS}, which Llama 3.1 and later need and its converter left out: give "
            "--rope_scaling llama3, or --rope_scaling none for a model that was trained without"
        )
    return found


def is_llama3(tokens: list[str]) -> bool:
    """By name of BOS, or by the tokens that text becomes: fine-tunes rename the one, and some cut the other down."""
    return LLAMA3_BOS in tokens or well_known(tokens) == "llama-bpe"


def stated_scaling(
    reader: gguf.GGUFReader, architecture: str, config: dict[str, Any], tensors: dict[str, gguf.ReaderTensor]
) -> dict[str, Any] | None:
    """As llama.cpp reads it: linear where no type is given, by 1 where no factor is, on top of the file's divisors."""
    value = partial(find_value, reader)
    kind = value(f"{architecture}.rope.scaling.type", str, "linear")
    prefix, positions = f"{architecture}.rope.scaling.", config["max_position_embeddings"]
    original = {"original_max_position_embeddings": value(f"{prefix}original_context_length", int, positions)}
    size = value(f"{prefix}attn_factor", float, 1.0)
    if all(name in tensors for name in LONGROPE.values()):
        factors = {key: dequantize(tensors[name], torch.float32).tolist() for key, name in LONGROPE.items()}
        return {"rope_type": "longrope", "attention_factor": size} | original | factors
    if size != 1:
        raise ValueError(f"the GGUF metadata has {prefix}attn_factor {size}, expected 1.0")
    former = value(f"{architecture}.rope.scale_linear", float, 1.0)
    factor = value(f"{prefix}factor", float, former)
    if kind == "yarn" and factor > 1:
        names = ("beta_fast", "beta_slow", "log_multiplier")
        keys = {name: value(f"{prefix}yarn_{name}", float, 0.0) for name in names}
        if keys.pop("log_multiplier") and architecture == "mistral3":  # then both multipliers are one
            keys |= {"mscale": 1.0, "mscale_all_dim": 1.0}
        if beta := config.pop("llama_4_scaling_beta", 0):
            keys["llama_4_scaling_beta"] = beta
        return {"rope_type": "yarn", "factor": factor} | original | {name: key for name, key in keys.items() if key}
    if kind not in ("none", "linear"):
        raise ValueError(f"the GGUF metadata has rope scaling of type {kind[:80]}, expected linear, yarn or none")
    factor = 1.0 if kind == "none" or factor == 0 else factor
    if (divisors := tensors.get(ROPE_FACTORS)) is not None:  # Llama 3.1 and later
        return {"rope_type": "factors", "factors": (dequantize(divisors, torch.float32) * factor).tolist()}
    return None if factor == 1 else {"rope_type": "linear", "factor": factor}
