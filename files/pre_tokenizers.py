"""How byte-level vocabularies split text into words, by the names that GGUF files give it.

A GGUF file holds a vocabulary, but of the program that splits text only the name, and files made before April 2024 not
even that. The names are those of llama.cpp's src/llama-vocab.cpp (as in llama-cpp-python 0.3.36) for models of the
families served here; any other is refused, because a guess would encode almost every text right, and the rest wrong.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers

DIGIT = r"\p{N}"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# One pattern from GPT-4 on, with what a word and a number are; then what may follow punctuation.
MODERN = r"{contraction}{word}|{digits}| ?[^\s{letter}\p{{N}}]+{ends}|\s*[\r\n]+|\s+(?!\S)|\s+"
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
MARKED_WORD = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED_WORD = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"


def _modern(
    digits: str, word: str = WORD, contraction: str = CONTRACTION, letter: str = r"\p{L}", ends: str = r"[\r\n]*"
) -> str:
    return MODERN.format(contraction=contraction, word=word, digits=digits, letter=letter, ends=ends)


LLAMA3, QWEN2 = _modern(r"\p{N}{1,3}"), _modern(DIGIT)
# Mistral's own pattern, where llama.cpp's only comes near: that cuts words at the vowel signs of Hindi, say, and after
# capitals that are not ASCII ("É|COLE").
TEKKEN = _modern(DIGIT, CASED_WORD, contraction="", ends=r"[\r\n/]*")
# OpenAI's o200k, which llama.cpp comes near in the same way; contractions belong to the word before them.
GPT4O = _modern(
    r"\p{N}{1,3}",
    "|".join(f"{word}{CONTRACTION.removesuffix('|')}?" for word in CASED_WORD.split("|")),
    contraction="",
    ends=r"[\r\n/]*",
)
HUNYUAN = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",  # noqa: RUF001
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
)


@dataclass(frozen=True)
class Splitting:
    """What the name of a pre-tokenizer stands for; the patterns are applied one after the other."""

    patterns: tuple[str, ...]
    nfc: bool = False  # as in the models' own files; llama.cpp normalizes nothing
    whole_words: bool = False  # a word that is a token is taken as it is, however its merges would go
    add_bos: bool = False  # where the file itself does not say

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.patterns]
        return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


SPLITTINGS = {
    **dict.fromkeys(("gpt-2", "a.x-4.0", "granite-docling", "mellum", "phi-2", "trillion"), Splitting((GPT2,))),
    **dict.fromkeys(("smollm", "minerva-7b", "refact", "starcoder"), Splitting((DIGIT, GPT2))),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "midm-2.0", "pixtral"),
        Splitting((LLAMA3,), whole_words=True, add_bos=True),
    ),
    "dbrx": Splitting((LLAMA3,)),  # Phi 4, OLMo 2 and 3, Granite 4
    **dict.fromkeys(("glm4", "chatglm-bpe"), Splitting((LLAMA3,), whole_words=True)),
    # As in SmolLM3's own file; llama.cpp cuts 588 of its words by their merges.
    "smaug-bpe": Splitting((LLAMA3,), whole_words=True),
    "gpt-4o": Splitting((GPT4O,)),  # Phi 4 mini
    **dict.fromkeys(("hunyuan-dense", "deepseek-v3"), Splitting(HUNYUAN)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "f2llmv2"), Splitting((QWEN2,), nfc=True)),
    **dict.fromkeys(("megrez", "stablelm2"), Splitting((QWEN2,))),
    "qwen35": Splitting((_modern(DIGIT, MARKED_WORD, letter=r"\p{L}\p{M}"),), nfc=True),
    "tekken": Splitting((TEKKEN,), whole_words=True, add_bos=True),
    "deepseek-coder": Splitting(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", DIGIT)),
    "seed-coder": Splitting((_modern(DIGIT, letter=r"\p{L}\r\n", ends=""),)),
    "viking": Splitting((r" ?[^(\s|.,!?…。，、।۔،)]+", DIGIT)),  # noqa: RUF001
}

# Well-known vocabularies: first id, end, and a hash of the tokens between. What fine-tunes add or rename lies outside.
VOCABULARIES = {
    "llama-bpe": (0, 128_000, "8dd8b994f25dc533"),
    "qwen2": (0, 151_643, "36c3749fd3c87e24"),  # Qwen3's too
    "smollm": (17, 49_152, "f5f01d320c3a4ae0"),
    "gpt-2": (0, 50_256, "3a1f1c010d179f03"),
    "tekken": (1_000, 131_072, "8c15b4a02b2bd26b"),
    "deepseek-coder": (0, 32_000, "5a6fa654cd354af4"),
    "refact": (19, 49_152, "aa241c90a290db06"),  # Granite Code's too
}


def digest(tokens: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(tokens).encode()).hexdigest()[:16]


def well_known(tokens: Sequence[str]) -> str | None:
    """The name of the pre-tokenizer of the well-known vocabulary which `tokens` are."""
    for name, (first, end, expected) in VOCABULARIES.items():
        if len(tokens) >= end and digest(tokens[first:end]) == expected:
            return name
    return None


def find_name(given: str | None, tokens: Sequence[str]) -> str:
    """The name of the pre-tokenizer: as given, else that of the well-known vocabulary which `tokens` are."""
    if given in SPLITTINGS:
        return given
    if given in (None, "", "default"):  # converters wrote "default" for what they did not know
        if name := well_known(tokens):
            return name
        found = "does not say how text is split, and the vocabulary is not a well-known one"
    else:
        found = f"is {given[:80]!r}, which is not known here"
    raise ValueError(
        f"tokenizer.ggml.pre {found}: name what splits alike with --pre NAME, one of {', '.join(SPLITTINGS)}"
    )
