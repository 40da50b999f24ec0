"""Reads a Hugging Face config.json as ModelArgs: the sizes and switches of Llama, Mistral, Qwen2 and Qwen3 models.

A field that would change what the model computes, and that this project does not support, is refused: a wrong answer
is worse than none. Names of tensors are not read here.
"""

import sys
from reprlib import repr as brief  # cut where it is long or deep
from typing import Any

from teal_fast.model import ModelArgs

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
# Fields that change what the reference implementations compute, with the only value that is supported here.
FIXED_FIELDS = {"hidden_act": "silu", "partial_rotary_factor": 1.0}
# Where other programs say that they quantized: transformers, the first versions of llm-compressor, MLX.
QUANTIZATION_FIELDS = ("quantization_config", "compression_config", "quantization")
QUANTIZATION_SIGNS = {  # of a method that the field does not name
    "load_in_4bit": "bitsandbytes",
    "load_in_8bit": "bitsandbytes",
    "config_groups": "compressed-tensors",
    "quant_algo": "modelopt",
    "group_size": "MLX",
}
INSTEAD = "convert the unquantized model that it was made from, then quantize that here"
ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "factors": (),  # ours, not Hugging Face's: a GGUF file holds the divisors of the rotary frequencies themselves
}
LARGEST = 2**24  # the largest size that is believed; a larger one means a corrupt file
MANY = 2**12  # the same for layers, heads and head_dim


def model_args(config: dict[str, Any]) -> ModelArgs:
    """Reads a Hugging Face config.json. Raises ValueError naming the first missing or unsupported field.

    A field that is null counts as absent, but for rope_theta and what stands in a block of rotary settings: there it
    is refused, since transformers 5.23 does not replace it. An absent field has transformers' default or, if there is
    none, is an error.
    """
    architecture = config.get("model_type")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"config.json: model_type {brief(architecture)} is not supported, expected {ARCHITECTURES}")
    for name, value in FIXED_FIELDS.items():
        if config.get(name) not in (value, None):
            raise ValueError(f"config.json: {name} {brief(config[name])} is not supported, expected {brief(value)}")
    for name in QUANTIZATION_FIELDS:
        if config.get(name) is not None:
            method = _quantization(config[name])
            raise ValueError(f"config.json: {name} says that {method} quantized the weights: {INSTEAD}")
    dim = _size(config, "hidden_size")
    heads = _size(config, "num_attention_heads", most=MANY)
    attention_bias = _flag(config, "attention_bias") and architecture in ("llama", "qwen3")
    return ModelArgs(
        architecture=architecture,
        dim=dim,
        n_layers=_size(config, "num_hidden_layers", most=MANY),
        n_heads=heads,
        # Only Llama is older than grouped-query attention: without the field, its heads share no keys and values.
        n_kv_heads=_size(config, "num_key_value_heads", heads if architecture == "llama" else None, most=MANY),
        head_dim=_size(config, "head_dim", 128 if architecture == "qwen3" else max(dim // heads, 1), most=MANY),
        ffn_dim=_size(config, "intermediate_size"),
        vocab_size=_size(config, "vocab_size"),
        max_position=_size(config, "max_position_embeddings"),
        norm_eps=_positive("rms_norm_eps", config.get("rms_norm_eps")),
        rope=_rope(config),
        sliding_windows=_sliding_windows(config),
        tie_embeddings=_flag(config, "tie_word_embeddings"),
        qkv_bias=attention_bias or architecture == "qwen2",
        o_bias=attention_bias,
        mlp_bias=_flag(config, "mlp_bias") and architecture == "llama",
        qk_norm=architecture == "qwen3",
    )


def _quantization(given: Any) -> str:
    """The method that quantized, as a quantization_config says it, and the bits where they stand there."""
    given = given if isinstance(given, dict) else {}
    signs = [method for sign, method in QUANTIZATION_SIGNS.items() if sign in given]
    method = given.get("quant_method") or (signs[0] if signs else "an unnamed method")
    method = method if isinstance(method, str) else brief(method)
    method = method.upper() if method in ("gptq", "awq", "fp8") else " ".join(method[:40].split())
    bits = given.get("bits") or (4 if given.get("load_in_4bit") else 8 if given.get("load_in_8bit") else None)
    return f"{method} ({bits} bits)" if isinstance(bits, int) else method


def _size(config: dict[str, Any], name: str, default: int | None = None, least: int = 1, most: int = LARGEST) -> int:
    value = default if config.get(name) is None else config[name]
    if value is None:
        raise ValueError(f"config.json: {name} is missing, a {config['model_type']} model needs it")
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"config.json: {name} is {brief(value)}, expected a whole number from {least} to {most}")
    return value


def _flag(config: dict[str, Any], name: str) -> bool:
    value = config.get(name)
    if not isinstance(value, bool | None):
        raise ValueError(f"config.json: {name} is {brief(value)}, expected true or false")
    return bool(value)


def _positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        raise ValueError(f"config.json: {name} is {brief(value)}, expected a positive number")
    return float(value)


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary settings, as transformers 5.23 reads them (convert_rope_params_to_dict in modeling_rope_utils.py).

    `rope_scaling`, the former spelling, replaces `rope_parameters` as a whole, its theta included; a block without a
    theta has `rope_theta`. So a theta that stands only in `rope_parameters` would be lost: such blocks are refused.
    """
    blocks = {}
    for spelling in ("rope_scaling", "rope_parameters"):
        given = config.get(spelling)
        if not isinstance(given, dict | None) or any(isinstance(value, dict) for value in (given or {}).values()):
            raise ValueError(f"config.json: {spelling} {brief(given)} is not supported, expected one flat object")
        if given:
            blocks[spelling] = _rope_settings(config, given)
    if not blocks:
        return _rope_settings(config, {})
    taken, *replaced = blocks.values()
    for other in replaced:
        plain = {"rope_type": "default", "rope_theta": taken["rope_theta"]}  # what scaling was added to
        if other not in (taken, plain):
            raise ValueError(
                f"config.json: rope_scaling says {brief(taken)}, rope_parameters {brief(other)}: "
                "write all of it into one of them and remove the other"
            )
    return taken


def _rope_settings(config: dict[str, Any], block: dict[str, Any]) -> dict[str, Any]:
    kind = block.get("rope_type", block.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_FIELDS:
        raise ValueError(f"config.json: rope_type {brief(kind)} is not supported, expected one of {[*ROPE_FIELDS]}")
    if block.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"config.json: partial_rotary_factor {brief(block['partial_rotary_factor'])} is not supported")
    theta = block.get("rope_theta", config.get("rope_theta", 10000.0))
    settings = {"rope_type": kind, "rope_theta": _positive("rope_theta", theta)}
    if kind == "factors":
        factors = block.get("factors")
        settings["factors"] = [_positive("factors", f) for f in (factors if isinstance(factors, list) else [factors])]
    # transformers fills in this one from outside of the block, and prefers what it finds there.
    original = block.get("original_max_position_embeddings", config["max_position_embeddings"])
    outside = {"original_max_position_embeddings": config.get("original_max_position_embeddings", original)}
    settings |= {name: _positive(name, (block | outside).get(name)) for name in ROPE_FIELDS[kind]}
    if kind == "llama3" and settings["low_freq_factor"] >= settings["high_freq_factor"]:
        low, high = settings["low_freq_factor"], settings["high_freq_factor"]
        raise ValueError(f"config.json: low_freq_factor {low} is not below high_freq_factor {high}: correct them")
    return settings


def _sliding_windows(config: dict[str, Any]) -> tuple[int | None, ...]:
    """Each layer's attention window, None for full attention.

    Qwen has one from layer `max_window_layers` on, or where `layer_types` says so.
    """
    layers, kinds = config["num_hidden_layers"], config.get("layer_types")
    mistral = config["model_type"] == "mistral"
    windowed = mistral or (config["model_type"] != "llama" and _flag(config, "use_sliding_window"))
    if not windowed or config.get("sliding_window", 0) is None:  # here null means no window, not the default
        return (None,) * layers
    window = _size(config, "sliding_window", 4096)
    if mistral or kinds is None:
        full = 0 if mistral else _size(config, "max_window_layers", 28, least=0)
        kinds = ["sliding_attention" if i >= full else "full_attention" for i in range(layers)]
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in known for kind in kinds):
        raise ValueError(f"config.json: layer_types {brief(kinds)} is not supported, expected {known} for each layer")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
