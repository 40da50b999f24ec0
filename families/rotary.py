"""Rotary settings of a config.json, as transformers 5.23 reads them, and the numbers that they mean.

Kinds of scaling: linear; dynamic (NTK-aware, by a text's length); llama3 (arXiv:2407.21783, section 3.4); yarn
(arXiv:2309.00071); longrope (arXiv:2402.13753); proportional, which turns a share of the pairs and leaves the others.
"""

import math
from typing import Any

import torch
from torch import Tensor

from teal_fast.families.args import Rope
from teal_fast.families.fields import brief, positive
from teal_fast.families.table import Family

ORIGINAL = "original_max_position_embeddings"
ROPE_FIELDS = {  # what each kind needs besides its theta
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL),
    "yarn": ("factor", ORIGINAL),
    "longrope": (ORIGINAL,),
    "proportional": (),
    "ntk_alpha": ("alpha",),  # ours: Hunyuan calls it dynamic, but its theta is the same for all texts
    "factors": (),  # ours, not Hugging Face's: a GGUF file holds the divisors of the rotary frequencies themselves
}
MAY_STAND = {  # what else may; null is as if it did not
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    "longrope": ("attention_factor", "factor"),
    "proportional": ("factor",),
}
LISTS = {"longrope": ("short_factor", "long_factor"), "factors": ("factors",)}
PHI3_KINDS = {"su": "longrope", "yarn": "longrope"}  # its former names
NO_ROPE = {"rope_type": "none"}


def rope_settings(config: dict[str, Any], family: Family) -> dict[str, Any]:
    """The rotary settings of one block, by one name for each (convert_rope_params_to_dict in modeling_rope_utils.py).

    `rope_scaling`, the former spelling, replaces `rope_parameters` as a whole, its theta included; a block without a
    theta has `rope_theta`. So a theta that stands only in `rope_parameters` would be lost: such blocks are refused.
    """
    blocks = {}
    for spelling in ("rope_scaling", "rope_parameters"):
        given = config.get(spelling)
        if not isinstance(given, dict | None) or any(isinstance(value, dict) for value in (given or {}).values()):
            raise ValueError(f"config.json: {spelling} {brief(given)} is not supported, expected one flat object")
        if given:
            blocks[spelling] = read_block(config, given, family)
    if not blocks:
        return read_block(config, {}, family)
    taken, *replaced = blocks.values()
    for other in replaced:
        plain = {"rope_type": "default", "rope_theta": taken["rope_theta"], "share": taken["share"]}  # was scaled
        if other not in (taken, plain):
            raise ValueError(
                f"config.json: rope_scaling says {brief(taken)}, rope_parameters {brief(other)}: "
                "write all of it into one of them and remove the other"
            )
    return taken


def rope_settings_by_kind(config: dict[str, Any], family: Family) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those of layers with full attention, and of windowed ones, which scaling leaves alone (Gemma 3, OLMo 3).

    `rope_parameters` has a block for each, or older files have thetas and `rope_scaling` for the full ones.
    """
    nested, scaling = (config.get(name) or {} for name in ("rope_parameters", "rope_scaling"))
    full, local = (nested.get(f"{kind}_attention") or {} for kind in ("full", "sliding"))
    if any(not isinstance(block, dict) for block in (nested, scaling, full, local)):
        raise ValueError("config.json: rope_parameters is not supported, expected a block for each kind of layer")
    if strange := sorted(nested.keys() - {"full_attention", "sliding_attention"}):
        raise ValueError(
            f"config.json: rope_parameters has {brief(strange[0])}, expected full_attention and sliding_attention"
        )
    # transformers gives OLMo 3's windowed layers its default theta, whatever rope_theta is: see findings/.
    theta = {"rope_theta": config.get("rope_local_base_freq", family.local_rope)}
    if config.get("rope_theta", family.theta) != family.theta and family.local_rope == family.theta and not local:
        raise ValueError(
            f"config.json: rope_theta {brief(config['rope_theta'])} leaves open whether layers with a window have it: "
            "write rope_parameters with a block for each kind of layer"
        )
    return read_block(config, full | scaling, family), read_block(config | theta, local, family)


def read_block(config: dict[str, Any], block: dict[str, Any], family: Family) -> dict[str, Any]:
    """A block's settings, checked: rope_type, rope_theta, `share` of a head's channels that turn, the kind's own."""
    kind = block.get("rope_type", block.get("type", "default"))
    phi3 = config["model_type"] == "phi3"
    kind = PHI3_KINDS.get(kind, kind) if phi3 and isinstance(kind, str) else kind
    if config["model_type"] == "hunyuan_v1_dense" and kind == "dynamic" and block.get("alpha"):
        kind = "ntk_alpha"
    known = {"default", "longrope"} if phi3 else ROPE_FIELDS.keys()
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(f"config.json: rope_type {brief(kind)} is not supported, expected one of {sorted(known)}")
    theta = block.get("rope_theta", config.get("rope_theta", family.theta))
    share = block.get("partial_rotary_factor", config.get("partial_rotary_factor", family.partial or 1.0))
    share = 1.0 if share is None else positive("partial_rotary_factor", share)
    if share > 1 or (share != 1 and family.partial is None and kind != "proportional"):
        where = config["model_type"]
        raise ValueError(f"config.json: partial_rotary_factor {brief(share)} is not supported in {where}")
    settings = {"rope_type": kind, "rope_theta": positive("rope_theta", theta), "share": share}
    for name in LISTS.get(kind, ()):
        given = block.get(name)
        settings[name] = [positive(name, value) for value in (given if isinstance(given, list) else [given])]
    # transformers fills in this one from outside of the block, and prefers what it finds there.
    original = block.get(ORIGINAL, config["max_position_embeddings"])
    outside = {ORIGINAL: config.get(ORIGINAL, 4096 if phi3 else original)}
    settings |= {name: positive(name, (block | outside).get(name)) for name in ROPE_FIELDS[kind]}
    optional = (name for name in MAY_STAND.get(kind, ()) if block.get(name) is not None)
    settings |= {name: positive(name, block[name]) for name in optional}
    if kind == "yarn":
        settings["truncate"] = block.get("truncate", True) is not False
    if kind == "longrope":
        settings.setdefault("factor", config["max_position_embeddings"] / settings[ORIGINAL])
    if kind == "dynamic":
        settings[ORIGINAL] = float(config["max_position_embeddings"])
    if kind == "llama3" and settings["low_freq_factor"] >= settings["high_freq_factor"]:
        low, high = settings["low_freq_factor"], settings["high_freq_factor"]
        raise ValueError(f"config.json: low_freq_factor {low} is not below high_freq_factor {high}: correct them")
    return settings


def longest(settings: dict[str, Any], positions: int) -> int:
    """The most positions of a model whose config.json says so many: those that scaling is for, where it knows."""
    if settings["rope_type"] not in ("yarn", "dynamic"):
        return positions
    return max(positions, int(settings[ORIGINAL] * settings["factor"]))


def turned(settings: dict[str, Any], head_dim: int) -> int:
    """How many of a head's channels are turned, the first ones; proportional scaling counts the others as well."""
    if head_dim % 2:
        raise ValueError(f"config.json: head_dim is {head_dim}, rotary embedding needs an even number")
    if settings["rope_type"] in ("none", "proportional"):
        return head_dim
    found = int(head_dim * settings["share"])
    if found < 2 or found % 2:
        share = settings["share"]
        raise ValueError(f"config.json: partial_rotary_factor {share} of head_dim {head_dim} is {found}, expected even")
    return found


def make_rope(settings: dict[str, Any], head_dim: int) -> Rope:
    """The numbers that settings mean, for heads of so many channels."""
    kind, half = settings["rope_type"], head_dim // 2
    if kind == "none":
        return Rope((0.0,) * half, (1.0,) * half)
    dim = turned(settings, head_dim)
    pairs = int(settings["share"] * head_dim // 2) if kind == "proportional" else dim // 2
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu")[:pairs] / dim
    stretched = settings["alpha"] ** (dim / (dim - 2)) if kind == "ntk_alpha" else 1.0
    frequency, size = 1.0 / (settings["rope_theta"] * stretched) ** exponent, 1.0
    for name in LISTS.get(kind, ()):
        if len(settings[name]) != pairs:
            raise ValueError(f"config.json: {len(settings[name])} rope factors ({name}), expected {pairs}")

    def complete(values: Tensor, rest: float) -> tuple[float, ...]:
        return (*values.tolist(), *(rest,) * (half - pairs))

    if kind in ("linear", "proportional"):
        frequency = frequency / settings.get("factor", 1.0)
    elif kind == "factors":
        frequency = frequency / torch.tensor(settings["factors"], dtype=torch.float32, device="cpu")
    elif kind == "llama3":
        # Long wavelengths are stretched by `factor`, short ones kept, those between blended.
        turns = settings[ORIGINAL] * frequency / (2 * math.pi)
        low, high = settings["low_freq_factor"], settings["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = (1 - kept) * frequency / settings["factor"] + kept * frequency
    elif kind == "yarn":
        kept = 1 - _ramp(settings, dim)
        frequency = (1 - kept) * frequency / settings["factor"] + kept * frequency
        size = _yarn_size(settings)
    elif kind == "dynamic":
        exponents = complete(exponent * dim / max(dim - 2, 1), 0.0)
        frequencies, border, growth = complete(frequency, 0.0), int(settings[ORIGINAL]), settings["factor"]
        return Rope(frequencies, (1.0,) * half, border, frequencies, growth, exponents)
    elif kind == "longrope":
        short, long = (
            1.0 / (torch.tensor(settings[name], dtype=torch.float32, device="cpu") * settings["rope_theta"] ** exponent)
            for name in LISTS[kind]
        )
        factor, original = settings["factor"], settings[ORIGINAL]
        default = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        sizes = complete(torch.full_like(short, settings.get("attention_factor", default)), 1.0)
        return Rope(complete(short, 0.0), sizes, int(original), complete(long, 0.0))
    return Rope(complete(frequency, 0.0), complete(torch.full_like(frequency, size), 1.0))


def _ramp(settings: dict[str, Any], dim: int) -> Tensor:
    """By how much each of yarn's pairs is stretched: from 0, the fast ones, to 1. fp32 [dim / 2]."""

    def pair(turns: float) -> float:  # the one that turns so many times in the original length
        by = settings[ORIGINAL] / (turns * 2 * math.pi)
        return dim * math.log(by) / (2 * math.log(settings["rope_theta"]))

    low, high = pair(settings.get("beta_fast", 32)), pair(settings.get("beta_slow", 1))
    if settings["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0
    return ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)


def _yarn_size(settings: dict[str, Any]) -> float:
    """What yarn multiplies queries and keys by, since longer texts flatten attention."""

    def sharpness(by: float = 1.0) -> float:
        return 1.0 if settings["factor"] <= 1 else 0.1 * by * math.log(settings["factor"]) + 1.0

    if "attention_factor" in settings:
        return settings["attention_factor"]
    if "mscale" in settings and "mscale_all_dim" in settings:
        return sharpness(settings["mscale"]) / sharpness(settings["mscale_all_dim"])
    return sharpness()
