"""Tokenizer files of a checkpoint folder, rebuilt from the metadata of a GGUF file.

Byte-level BPE becomes a tokenizer.json, whose way of splitting text pre_tokenizers.py knows by name; a sentencepiece
vocabulary becomes a tokenizer.model. Both encode as llama.cpp does (src/llama-vocab.cpp in llama-cpp-python 0.3.36).
"""

import json
import struct
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gguf import GGUFReader, TokenType
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from teal_fast.files.fill_in import KEYS
from teal_fast.files.pre_tokenizers import SPLITTINGS, find_name
from teal_fast.files.store import one_line, short

PREFIX = "tokenizer.ggml."
AGAIN = "take another GGUF file"
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
END_KEYS += ("fim_pad_token_id", "fim_rep_token_id", "fim_sep_token_id")  # as in llama.cpp, which ends at these as well
FILL_IN = [("fim_pre_token_id", "prefix_token_id"), ("fim_suf_token_id", "suffix_token_id")]
FILL_IN += [("fim_mid_token_id", "middle_token_id")]  # in the order of KEYS, each with its older name
IDS = (*END_KEYS, *(key for keys in FILL_IN for key in keys))
NO_ID = 2**32 - 1  # -1 as an unsigned number: some converters wrote it for a token that the model lacks
NAMED = {"unk_token": "unknown_token_id", "bos_token": "bos_token_id"}
NAMED |= {"eos_token": "eos_token_id", "pad_token": "padding_token_id"}  # in the order of sentencepiece's fields
LISTS = {"tokens": str, "merges": str, "scores": int | float, "token_type": int}  # of what
SCALARS = dict.fromkeys((*NAMED.values(), *IDS), int) | {"model": str, "pre": str}
SCALARS |= {"add_bos_token": bool, "add_space_prefix": bool}
SPECIAL = (TokenType.CONTROL, TokenType.UNKNOWN)  # no text
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}


def write_tokenizer(reader: GGUFReader, folder: Path, pre: str | None = None) -> None:
    """Write tokenizer.json or tokenizer.model, tokenizer_config.json and, for ends beside EOS, generation_config.json.

    `pre` names the pre-tokenizer instead of the file.
    """
    keys = {PREFIX + name: name for name in (*LISTS, *SCALARS)} | {"tokenizer.chat_template": "chat_template"}
    given = {name: reader.fields[key].contents() for key, name in keys.items() if key in reader.fields}
    given = _checked({name: value for name, value in given.items() if value != NO_ID})
    if given["model"] == "gpt2":
        given["pre"] = find_name(pre or given.get("pre"), given["tokens"])
    elif pre:
        raise ValueError("--pre is for byte-level vocabularies, this GGUF file has a sentencepiece one: leave it out")
    config = _config(given)
    if given["model"] == "gpt2":
        _byte_level_bpe(given, config).save(str(folder / "tokenizer.json"))
    else:
        (folder / "tokenizer.model").write_bytes(_sentencepiece_model(given))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
    ends = {given[name] for name in END_KEYS if name in given}
    if ends - {given.get("eos_token_id")}:  # a turn of a chat may end otherwise than a text, and eos_token is one token
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": sorted(ends)}))


def _checked(given: dict[str, Any]) -> dict[str, Any]:
    """The metadata of a vocabulary that can be written, with its token types. Raises ValueError for any other."""
    _check_types(given)
    model, tokens = given.get("model"), given.get("tokens") or []
    if model not in ("gpt2", "llama"):
        raise ValueError(f"{PREFIX}model is {short(model)}, expected 'gpt2' or 'llama': {AGAIN}")
    byte_level = "Ġ" in tokens and not any(token.startswith("▁") for token in tokens)
    if byte_level and given.get("merges"):
        model = "gpt2"  # also where a converter called it "llama", as which no program could use it
    needed = ["merges"] if model == "gpt2" else ["scores", "token_type"]
    if missing := [PREFIX + name for name in ["tokens", *needed] if not given.get(name)]:
        raise ValueError(f"{', '.join(missing)}: missing in the GGUF file, expected lists: {AGAIN}")
    if byte_level != (model == "gpt2"):
        found = "byte-level tokens without merges" if byte_level else "no byte-level tokens"
        raise ValueError(f"{PREFIX}model is {short(model)}, but the GGUF file has {found}: {AGAIN}")
    types = given.get("token_type") or [TokenType.NORMAL] * len(tokens)
    if uneven := [name for name in ("scores", "token_type") if len(given.get(name) or tokens) != len(tokens)]:
        raise ValueError(f"{PREFIX}{uneven[0]} and {PREFIX}tokens differ in length: {AGAIN}")
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]  # llama.cpp's name for them
    if len(set(tokens)) < len(tokens):
        ((twice, _),) = Counter(tokens).most_common(1)
        raise ValueError(f"{PREFIX}tokens holds {twice[:80]!r} twice: {AGAIN}")
    if beyond := [name for name in (*NAMED.values(), *IDS) if not 0 <= given.get(name, 0) < len(tokens)]:
        raise ValueError(f"{beyond[0]} is {given[beyond[0]]} of {len(tokens)} tokens: {AGAIN}")
    if model == "llama":  # llama.cpp's defaults
        defaults = {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        given = {name: i for name, i in defaults.items() if i < len(tokens) and types[i] in SPECIAL} | given
    return given | {"model": model, "tokens": tokens, "token_type": types}


def _check_types(given: dict[str, Any]) -> None:
    for name, kind in (LISTS | SCALARS | {"chat_template": str}).items():
        value = given.get(name)
        if value is None or value == []:
            continue
        listed = isinstance(value, list)
        one = value[0] if listed else value  # a GGUF list holds values of one type
        if listed != (name in LISTS) or not isinstance(one, kind) or (kind is not bool and isinstance(one, bool)):
            wanted = f"a list of {getattr(kind, '__name__', kind)}" if name in LISTS else f"one {kind.__name__}"
            raise ValueError(f"the GGUF metadata has {name} {str(value)[:80]!r}, expected {wanted}: {AGAIN}")


def _config(given: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json: what to put before a prompt, where to stop, and which tokens are no text."""
    tokens, types, sentencepiece = given["tokens"], given["token_type"], given["model"] == "llama"
    add_bos = given.get("add_bos_token", sentencepiece or SPLITTINGS[given["pre"]].add_bos)
    config: dict[str, Any] = {
        "tokenizer_class": "LlamaTokenizer" if sentencepiece else "PreTrainedTokenizerFast",
        "add_bos_token": add_bos and "bos_token_id" in given,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    if sentencepiece:
        config["legacy"] = True  # a text that follows an added token begins with a space, as the prompt does
    named = NAMED | {name: new if new in given else old for name, (new, old) in zip(KEYS, FILL_IN, strict=True)}
    config |= {name: tokens[given[key]] for name, key in named.items() if key in given}
    if given.get("chat_template"):
        config["chat_template"] = given["chat_template"]
    config["added_tokens_decoder"] = {
        str(i): {"content": tokens[i], "special": kind in SPECIAL, "normalized": False}
        for i, kind in enumerate(types)
        if kind in SPECIAL or kind == TokenType.USER_DEFINED
    }
    return config


def _byte_level_bpe(given: dict[str, Any], config: dict[str, Any]) -> Tokenizer:
    splitting = SPLITTINGS[given["pre"]]
    ids = {token: i for i, token in enumerate(given["tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in given["merges"]]
    try:
        library = Tokenizer(BPE(ids, merges, ignore_merges=splitting.whole_words))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"the GGUF file's merges do not fit its tokens ({one_line(error)}): {AGAIN}") from error
    library.pre_tokenizer = splitting.pre_tokenizer()
    library.decoder = decoders.ByteLevel()
    if splitting.nfc:
        library.normalizer = normalizers.NFC()
    library.add_tokens([AddedToken(**added) for added in config["added_tokens_decoder"].values()])
    bos = config.get("bos_token")
    if config["add_bos_token"]:
        library.post_processor = processors.TemplateProcessing(single=[bos, "$A"], special_tokens=[(bos, ids[bos])])
    return library


def _sentencepiece_model(given: dict[str, Any]) -> bytes:
    """A ModelProto of https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto.

    Token types are the same numbers in GGUF. A protobuf of three flat messages does not need the protobuf package.
    """
    tokens = given["tokens"]
    rows = zip(tokens, given["scores"], _piece_types(given), strict=True)
    pieces = (_message([(1, token), (2, float(score)), (3, kind)]) for token, score, kind in rows)
    ids = [given.get(key, -1) for key in NAMED.values()]
    trainer = [(3, 2), (4, len(tokens)), (35, BYTES.issubset(tokens))]  # 2 is BPE
    trainer += zip(range(40, 44), ids, strict=True)
    trainer += [(field, tokens[i]) for field, i in zip(range(45, 49), ids, strict=True) if i >= 0]
    normalizer = [(1, "identity"), (3, given.get("add_space_prefix", True)), (4, False)]
    return _message([*((1, piece) for piece in pieces), (2, _message(trainer)), (3, _message(normalizer))])


def _piece_types(given: dict[str, Any]) -> list[int]:
    """Token types that sentencepiece opens: one unknown token, and bytes typed as such, all of them or none.

    User-defined tokens stand in added_tokens_decoder: llama.cpp cuts a text at them before it puts spaces in front of
    the parts, where sentencepiece does so afterwards.
    """
    tokens, unknown = given["tokens"], given.get("unknown_token_id")
    if unknown is None:
        raise ValueError(f"the GGUF file has no unknown token: {AGAIN}")
    if 0 < (found := len(BYTES.intersection(tokens))) < len(BYTES):
        raise ValueError(f"{PREFIX}tokens holds {found} of the {len(BYTES)} bytes, expected all or none: {AGAIN}")
    changed = {TokenType.USER_DEFINED: TokenType.NORMAL, TokenType.UNKNOWN: TokenType.CONTROL}
    changed |= {TokenType.BYTE: TokenType.NORMAL}
    types = [
        TokenType.BYTE if token in BYTES else changed.get(kind, kind)
        for token, kind in zip(tokens, given["token_type"], strict=True)
    ]
    types[unknown] = TokenType.UNKNOWN
    return types


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
