"""Reads a Hugging Face config.json as ModelArgs, by the row of the family that its model_type names (table.py).

A field that would change what the model computes, and that this project does not support, is refused: a wrong answer
is worse than none. Names of tensors are read in tensors.py, rotary settings in rotary.py.
"""

from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from teal_fast.families.args import ModelArgs
from teal_fast.families.fields import MANY, brief, flag, positive, size
from teal_fast.families.rotary import (
    NO_ROPE,
    ORIGINAL,
    longest,
    make_rope,
    rope_settings,
    rope_settings_by_kind,
    turned,
)
from teal_fast.families.table import FAMILIES, WRAPPERS, Family

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
ATTENTION = ("attention", "full_attention")  # a layer of this kind in a model that might have others


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json that is about text: all of it, or `text_config` where a vision tower is beside it."""
    if not isinstance(outer := config.get("model_type"), str) or outer not in WRAPPERS:
        return config
    if not isinstance(inner := config.get("text_config"), dict):
        raise ValueError(f"config.json: text_config is {brief(inner)}, a {outer} model needs it")
    # transformers ties these models by what the whole says, by default true; weights that differ stay untied.
    tied = config.get("tie_word_embeddings")
    return {"model_type": WRAPPERS[outer]} | inner | {"tie_word_embeddings": True if tied is None else tied}


def family_of(config: dict[str, Any]) -> Family:
    """The family's row. Raises ValueError naming the supported ones that are nearest by name, or all."""
    found = config.get("model_type")
    if isinstance(found, str) and found in FAMILIES:
        return FAMILIES[found]
    known = [*FAMILIES, *WRAPPERS]
    near = get_close_matches(found, known, cutoff=0.5) if isinstance(found, str) else []
    raise ValueError(
        f"config.json: model_type {brief(found)} is not supported, "
        + (f"the nearest that are: {', '.join(near)}" if near else f"expected one of {', '.join(known)}")
    )


def model_args(config: dict[str, Any]) -> ModelArgs:
    """Reads a Hugging Face config.json. Raises ValueError naming the first missing or unsupported field.

    A field that is null counts as absent, but for rope_theta and what stands in a block of rotary settings: there it
    is refused, since transformers 5.23 does not replace it. An absent field has transformers' default or, if there is
    none, is an error.
    """
    whole, config = config, text_config(config)
    family = family_of(config)
    for name, value in family.fixed.items():
        if config.get(name) not in (value, None):
            raise ValueError(f"config.json: {name} {brief(config[name])} is not supported, expected {brief(value)}")
    for name, given in ((name, part.get(name)) for part in (whole, config) for name in QUANTIZATION_FIELDS):
        if given is not None and not is_teal(given):
            method = _quantization(given)
            raise ValueError(f"config.json: {name} says that {method} quantized the weights: {INSTEAD}")
    dim = size(config, "hidden_size")
    heads = size(config, "num_attention_heads", most=MANY)
    layers = size(config, "num_hidden_layers", most=MANY)
    positions = size(config, "max_position_embeddings")
    head_dim = size(config, "head_dim", family.head_dim or max(dim // heads, 1), most=MANY)
    windows = _sliding_windows(config, family)
    settings = _ropes(config, family, windows)
    distinct = [one for i, one in enumerate(settings) if one not in settings[:i]]
    args = ModelArgs(
        architecture=config["model_type"],
        dim=dim,
        n_layers=layers,
        n_heads=heads,
        # Where families are older than grouped-query attention, heads share no keys and values without the field.
        n_kv_heads=size(config, "num_key_value_heads", None if family.grouped else heads, most=MANY),
        head_dim=head_dim,
        ffn_dim=size(config, family.ffn_field),
        vocab_size=size(config, "vocab_size"),
        max_position=max(longest(one, positions) for one in distinct if one != NO_ROPE or len(distinct) == 1),
        norm_eps=positive("rms_norm_eps", config.get("rms_norm_eps")),
        ropes=tuple(make_rope(one, head_dim) for one in distinct),
        rope_of=tuple(map(distinct.index, settings)),
        sliding_windows=windows,
        turned=turned(distinct[0], head_dim),
        tie_embeddings=flag(config, "tie_word_embeddings", family.tied),
        qkv_bias=_bias(config, family.qkv_bias),
        o_bias=_bias(config, family.o_bias),
        mlp_bias=_bias(config, family.mlp_bias),
        qk_norm=family.qk_norm,
        norm_before=family.norm_before,
        norm_behind=family.norm_behind,
        activation=family.activation,
    )
    return SCALES[family.scales](config, args) if family.scales else args


def _bias(config: dict[str, Any], stated: tuple[str, bool] | bool) -> bool:
    return stated if isinstance(stated, bool) else flag(config, *stated)


def is_teal(given: Any) -> bool:
    """Whether a quantization_config is ours (files/exported.py): the weights are dense, it says what is skipped."""
    return isinstance(given, dict) and given.get("quant_method") == "teal"


def _quantization(given: Any) -> str:
    """The method that quantized, as a quantization_config says it, and the bits where they stand there."""
    given = given if isinstance(given, dict) else {}
    signs = [method for sign, method in QUANTIZATION_SIGNS.items() if sign in given]
    method = given.get("quant_method") or (signs[0] if signs else "an unnamed method")
    method = method if isinstance(method, str) else brief(method)
    method = method.upper() if method in ("gptq", "awq", "fp8") else " ".join(method[:40].split())
    bits = given.get("bits") or (4 if given.get("load_in_4bit") else 8 if given.get("load_in_8bit") else None)
    return f"{method} ({bits} bits)" if isinstance(bits, int) else method


def _ropes(config: dict[str, Any], family: Family, windows: tuple[int | None, ...]) -> list[dict[str, Any]]:
    """Each layer's rotary settings."""
    if config["model_type"] == "granitemoehybrid" and config.get("position_embedding_type") != "rope":
        return [NO_ROPE] * len(windows)
    if family.local_rope:
        full, local = rope_settings_by_kind(config, family)
        return [full if window is None else local for window in windows]
    shared = rope_settings(config, family)
    if not family.no_rope_every:
        return [shared] * len(windows)
    every = size(config, "no_rope_layer_interval", family.no_rope_every)
    has = config.get("no_rope_layers")  # with 1 where a layer does have it
    has = [(i + 1) % every for i in range(len(windows))] if has is None else has
    if not isinstance(has, list) or len(has) < len(windows):
        raise ValueError(f"config.json: no_rope_layers {brief(has)} is not supported, expected 0 or 1 for each layer")
    return [shared if has[i] else NO_ROPE for i in range(len(windows))]


def _sliding_windows(config: dict[str, Any], family: Family) -> tuple[int | None, ...]:
    """Each layer's attention window, None for full attention.

    Mistral and its like have one in all layers. Others have it where `layer_types` says so, else Qwen from layer
    `max_window_layers` on, OLMo 3 and Gemma 3 in all layers but every 4th or 6th, Gemma 2 in every other.
    """
    layers, kinds = config["num_hidden_layers"], config.get("layer_types")
    if config["model_type"] == "granitemoehybrid":
        if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in ATTENTION for kind in kinds):
            raise ValueError(f"config.json: layer_types {brief(kinds)} is not supported, expected attention alone")
        return (None,) * layers
    by_flag = family.windows in ("qwen", "smollm3")
    if not family.windows or (by_flag and not flag(config, "use_sliding_window")):
        return (None,) * layers
    if config.get("sliding_window", 0) is None:  # here null means no window, not the default
        return (None,) * layers
    unstated = family.windows == "all" and config["model_type"] != "mistral"  # these have none by default
    if unstated and "sliding_window" not in config:
        return (None,) * layers
    window = size(config, "sliding_window", 4096)
    if family.windows == "all":
        return (window,) * layers
    if kinds is None and family.windows == "smollm3":
        raise ValueError("config.json: layer_types is missing beside use_sliding_window: state it for each layer")
    if kinds is None and family.windows == "qwen":
        full = size(config, "max_window_layers", 28, least=0)
        kinds = ["sliding_attention" if i >= full else "full_attention" for i in range(layers)]
    if kinds is None:
        every = size(config, "sliding_window_pattern", family.full_every)
        kinds = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in known for kind in kinds):
        raise ValueError(f"config.json: layer_types {brief(kinds)} is not supported, expected {known} for each layer")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _granite(config: dict[str, Any], args: ModelArgs) -> ModelArgs:
    """Four multipliers, two of which are no work: norms don't see by what the residual stream is divided.

    So that stands for `residual_multiplier`, with a smaller eps; `logits_scaling` is in the last norm (tensors.py).
    """
    each = {name: positive(name, _or(config, name, 1.0)) for name in GRANITE_SCALES}
    return replace(
        args,
        norm_eps=args.norm_eps / each["residual_multiplier"] ** 2,
        embedding_scale=each["embedding_multiplier"] / each["residual_multiplier"],
        attention_scale=each["attention_multiplier"],
    )


def _gemma(config: dict[str, Any], args: ModelArgs) -> ModelArgs:
    scalar = positive("query_pre_attn_scalar", _or(config, "query_pre_attn_scalar", 256))
    args = replace(args, embedding_scale=args.dim**0.5, attention_scale=scalar**-0.5)
    if config["model_type"] != "gemma2":
        return args
    # Here null is no cap, not the default.
    caps = [config.get(name, default) for name, default in SOFT_CAPS.items()]
    caps = [0.0 if cap is None else positive(name, cap) for name, cap in zip(SOFT_CAPS, caps, strict=True)]
    return replace(args, attention_cap=caps[0], output_cap=caps[1])


def _llama4(config: dict[str, Any], args: ModelArgs) -> ModelArgs:
    block = config.get("rope_scaling") or config.get("rope_parameters")
    if block is None:  # transformers would take the settings of one model for all
        raise ValueError("config.json: rope_parameters is missing, a ministral3 model needs it")
    beta = block.get("llama_4_scaling_beta")
    original = block.get(ORIGINAL, config["max_position_embeddings"])
    if beta is None:
        raise ValueError("config.json: llama_4_scaling_beta is missing in rope_parameters")
    return replace(args, query_growth=(positive("llama_4_scaling_beta", beta), int(positive(ORIGINAL, original))))


def _or(config: dict[str, Any], name: str, default: float) -> Any:
    return default if config.get(name) is None else config[name]


GRANITE_SCALES = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
SOFT_CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
SCALES = {"granite": _granite, "gemma": _gemma, "llama4": _llama4}
