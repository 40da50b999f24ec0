"""The three tokens by which a model fills the gap between a prefix and a suffix.

They stand in front of the prefix, of the suffix and of the answer. A file names them, or they are a family's well-known
ones. Names are those of llama.cpp (src/llama-vocab.cpp in llama-cpp-python 0.3.36) and of transformers' CodeLlama
tokenizer, without models that were trained to read the suffix first.
"""

from collections.abc import Mapping
from typing import Any

from teal_fast.files.vocabulary import content

KEYS = ("prefix_token", "suffix_token", "middle_token")  # of tokenizer_config.json, as CodeLlama's has them
FAMILIES = [
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("<\uff5cfim▁begin\uff5c>", "<\uff5cfim▁hole\uff5c>", "<\uff5cfim▁end\uff5c>"),  # DeepSeek-Coder
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # CodeLlama
    ("<PRE>", "<SUF>", "<MID>"),
]


def find_fill_in(ids: Mapping[str, int], settings: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Ids of the tokens before prefix, suffix and answer; None where the vocabulary has no such three."""
    declared = tuple(content(settings.get(key)) for key in KEYS)
    return next((tuple(map(ids.get, names)) for names in (declared, *FAMILIES) if ids.keys() >= {*names}), None)
