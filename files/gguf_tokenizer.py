"""Tokenizer files of a checkpoint folder, rebuilt from the metadata of a GGUF file.

A GGUF holds the vocabulary, but not the program that splits text: its pre-tokenizer is only a name. Known names are
spelled out here and any other is refused, because a guess would encode almost every text right, and the rest wrong.
"""

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gguf import GGUFReader, TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

# Split patterns of https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp, as in the models' own files.
DIGITS = r"\p{N}"
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")


def write_tokenizer(reader: GGUFReader, folder: Path) -> None:
    """Write tokenizer.json or tokenizer.model, tokenizer_config.json and, for several EOS, generation_config.json."""
    metadata = {name: field.contents() for name, field in reader.fields.items() if name.startswith("tokenizer.")}
    prefix = "tokenizer.ggml."
    given = {name.removeprefix(prefix): value for name, value in metadata.items() if name.startswith(prefix)}
    kind = given.get("model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"tokenizer.ggml.model is {kind!r}, expected 'gpt2' or 'llama': take another GGUF file")
    tokens = given.get("tokens") or []
    needed = ["merges"] if kind == "gpt2" else ["scores", "token_type"]
    if missing := [prefix + name for name in ["tokens", *needed] if not given.get(name)]:
        raise ValueError(f"{', '.join(missing)}: missing in the GGUF file, expected lists: take another GGUF file")
    types = given.get("token_type") or [TokenType.NORMAL] * len(tokens)
    if uneven := [name for name in ("scores", "token_type") if len(given.get(name) or tokens) != len(tokens)]:
        raise ValueError(f"{prefix}{uneven[0]} and {prefix}tokens differ in length: take another GGUF file")
    config = _config(given, metadata.get("tokenizer.chat_template"), tokens, types)
    if kind == "gpt2":
        _byte_level_bpe(given, tokens, types, config).save(str(folder / "tokenizer.json"))
    else:
        (folder / "tokenizer.model").write_bytes(_sentencepiece_model(given, tokens, types))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
    ends = {given[name] for name in ("eos_token_id", "eot_token_id", "eom_token_id") if name in given}
    if len(ends) > 1:  # a turn of a chat may end otherwise than a text, and eos_token is but one token
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": sorted(ends)}))


def _config(given: dict[str, Any], template: str | None, tokens: list[str], types: list[int]) -> dict[str, Any]:
    """tokenizer_config.json: what to put before a prompt, where to stop, and which tokens are no text."""
    by_default = "bos_token_id" in given and (given["model"] == "llama" or given.get("pre") in LLAMA3_NAMES)
    config: dict[str, Any] = {
        "tokenizer_class": "LlamaTokenizer" if given["model"] == "llama" else "PreTrainedTokenizerFast",
        "add_bos_token": given.get("add_bos_token", by_default),
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    if given["model"] == "llama":
        config["legacy"] = True  # llama.cpp puts a space before every text that follows a special token
    for key, name in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        if (token := given.get(f"{name}_token_id")) is None:
            continue
        if token >= len(tokens):
            raise ValueError(f"{name}_token_id is {token} of {len(tokens)} tokens: take another GGUF file")
        config[f"{key}_token"] = tokens[token]
    if template:
        config["chat_template"] = template
    special = [i for i, kind in enumerate(types) if kind == TokenType.CONTROL]
    config["added_tokens_decoder"] = {
        str(i): {"content": tokens[i], "special": True, "normalized": False} for i in special
    }
    return config


def _byte_level_bpe(given: dict[str, Any], tokens: list[str], types: list[int], config: dict[str, Any]) -> Tokenizer:
    name = given.get("pre", "default")
    ids = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in given["merges"]]
    try:
        library = Tokenizer(BPE(ids, merges, ignore_merges=name in LLAMA3_NAMES))
    except Exception as error:  # tokenizers raises nothing narrower
        reason = " ".join(str(error).split())
        raise ValueError(f"the GGUF file's merges do not fit its tokens ({reason}): take another GGUF file") from error
    library.pre_tokenizer = _pre_tokenizer(name)
    library.decoder = decoders.ByteLevel()
    if name == "qwen2":
        library.normalizer = normalizers.NFC()
    for i, kind in enumerate(types):
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED):
            library.add_tokens([AddedToken(tokens[i], special=kind == TokenType.CONTROL, normalized=False)])
    bos = config.get("bos_token")
    if config["add_bos_token"] and bos:
        library.post_processor = processors.TemplateProcessing(single=[bos, "$A"], special_tokens=[(bos, ids[bos])])
    return library


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    if name in ("default", "gpt-2"):
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "smollm":
        first, use_regex = pre_tokenizers.Digits(individual_digits=True), True
    elif name == "qwen2" or name in LLAMA3_NAMES:
        pattern = WORDS.format(digits=DIGITS if name == "qwen2" else DIGITS + "{1,3}")
        first, use_regex = pre_tokenizers.Split(Regex(pattern), "isolated"), False
    else:
        known = ", ".join(["default", "gpt-2", "smollm", "qwen2", *LLAMA3_NAMES])
        raise ValueError(f"tokenizer.ggml.pre is {name!r}, expected one of {known}: convert the original checkpoint")
    return pre_tokenizers.Sequence([first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)])


def _sentencepiece_model(given: dict[str, Any], tokens: list[str], types: list[int]) -> bytes:
    """A ModelProto of https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto.

    Token types are the same numbers in GGUF. A protobuf of three flat messages does not need the protobuf package.
    """
    rows = zip(tokens, given["scores"], types, strict=True)
    pieces = (_message([(1, token), (2, score), (3, kind)]) for token, score, kind in rows)
    unknown = given.get("unknown_token_id", 0)
    bos, eos, pad = (given.get(f"{name}_token_id", -1) for name in ("bos", "eos", "padding"))
    trainer = [(3, 2), (4, len(tokens)), (35, True), (40, unknown), (41, bos), (42, eos), (43, pad)]  # type 2 is BPE
    names = [(45, unknown), (46, bos), (47, eos), (48, pad)]
    trainer += [(field, tokens[i]) for field, i in names if i >= 0]
    normalizer = [(1, "identity"), (2, bytes(given.get("precompiled_charsmap", b"")))]
    normalizer += [(3, given.get("add_space_prefix", True)), (4, given.get("remove_extra_whitespaces", False))]
    return _message([*((1, piece) for piece in pieces), (2, _message(trainer)), (3, _message(normalizer))])


def _message(fields: Iterable[tuple[int, str | bytes | float | int]]) -> bytes:
    """Protobuf wire format: https://protobuf.dev/programming-guides/encoding/."""
    data = bytearray()
    for number, value in fields:
        if isinstance(value, float):
            data += _varint(number << 3 | 5) + struct.pack("<f", value)
        elif isinstance(value, int):
            data += _varint(number << 3) + _varint(value)
        else:
            value = value.encode() if isinstance(value, str) else value
            data += _varint(number << 3 | 2) + _varint(len(value)) + value
    return bytes(data)


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative numbers are two's complement
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    return bytes([*data, value])
