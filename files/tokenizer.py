"""Text to token ids and back, with the tokenizer that lies in a checkpoint folder.

Three libraries stand behind one class: `tokenizers` for tokenizer.json, `sentencepiece` and `tiktoken` for the two
formats that are both called tokenizer.model. They only encode; decoding is one table from id to bytes, so a text that
is streamed and a text that is decoded at once cannot differ. Special tokens written in a text become their ids, in a
prompt as in a chat, as transformers does by default. Training and truncation are left out.
"""

import base64
import codecs
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import tiktoken
import tokenizers

from teal_fast.files.chat import render_chat
from teal_fast.files.store import parse_json, read_json, read_text, short

# Llama 3's reference, https://github.com/meta-llama/llama-models/blob/main/models/llama3/tokenizer.py
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_NAMED = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1"]
LLAMA3_NAMED += ["finetune_right_pad_id", "step_id", "start_header_id", "end_header_id", "eom_id", "eot_id"]
LLAMA3_NAMED += ["python_tag", "image", *(f"reserved_special_token_{i}" for i in range(2, 246))]
LLAMA3_SPECIAL = [f"<|{name}|>" for name in LLAMA3_NAMED]
LLAMA3_EOS = ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>")
# tiktoken's regex engine overflows on longer runs of spaces. The reference cuts there too: whole runs, then one cut.
LLAMA3_CHUNK = re.compile(r"(?:\s{1,25000}+(?!\s)|\S{1,25000}+(?!\S))*+(?:\s{1,25000}+|\S{1,25000}+)?")

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
Added = dict[int, tuple[str, bool]]  # id to (text, is special): tokenizer_config.json's added_tokens_decoder


@dataclass(frozen=True)
class _Vocabulary:
    """What a tokenizer file says by itself, before tokenizer_config.json has its word."""

    encode: Callable[[str], list[int]]  # special tokens parsed, nothing added
    ids: dict[str, int]
    pieces: dict[int, bytes]  # what an id adds to the text: nothing when absent, as special tokens are
    lead: str = ""  # the space that encoding puts before a text and decoding takes away
    bos: str | None = None
    eos: tuple[str, ...] = ()
    prefix: list[int] | None = None  # ids put before a prompt; None: BOS


class Tokenizer:
    """Encodes prompts and chats as the checkpoint's own files say, and decodes to text without special tokens."""

    def __init__(self, vocabulary: _Vocabulary, config: dict[str, Any], eos_ids: set[int], template: str | None):
        defaults = {"bos_token": vocabulary.bos, "eos_token": next(iter(vocabulary.eos), None)}
        names = {key: _content(config.get(key, defaults.get(key))) for key in NAMED_TOKENS}
        self._names = {key: name for key, name in names.items() if name is not None}  # the template's variables
        named = {key: vocabulary.ids.get(name) for key, name in self._names.items()}
        for key in ("bos_token", "eos_token"):
            if key in named and named[key] is None:
                raise ValueError(f"{key} {self._names[key]!r} is not in the vocabulary: correct tokenizer_config.json")
        self.bos_id: int | None = named.get("bos_token")
        if _content(config.get("eos_token")):
            eos_ids = eos_ids | {named["eos_token"]}
        self.eos_ids = frozenset(eos_ids or {vocabulary.ids[name] for name in vocabulary.eos})
        self.vocab_size: int = max(vocabulary.ids.values()) + 1
        self.chat_template = template
        self._encode, self._lead = vocabulary.encode, vocabulary.lead
        self._pieces = {token: piece for token, piece in vocabulary.pieces.items() if token not in named.values()}
        add_bos, bos = config.get("add_bos_token"), [] if self.bos_id is None else [self.bos_id]
        if add_bos and not bos:
            raise ValueError("add_bos_token is true but there is no bos_token: correct tokenizer_config.json")
        own = bos if vocabulary.prefix is None else vocabulary.prefix
        self._prefix = own if add_bos is None else bos if add_bos else []

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read the tokenizer of a checkpoint folder: tokenizer.json where there is one, else tokenizer.model."""
        folder = Path(folder)
        config = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
        if (path := folder / "tokenizer.json").is_file():
            vocabulary = _load_json(path)
        elif (path := folder / "tokenizer.model").is_file():
            vocabulary = _load_model(path, _added_tokens(folder, config))
        else:
            raise FileNotFoundError(
                f"{folder}: found neither tokenizer.json nor tokenizer.model, expected one of them: name a checkpoint "
                "folder, or convert or download the checkpoint again"
            )
        eos_ids = _eos_ids(folder / "generation_config.json") | _eos_ids(folder / "config.json")
        try:
            return cls(vocabulary, config, eos_ids, _chat_template(folder, config))
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Ids of a prompt, after BOS where the checkpoint asks for it and `add_bos` allows it; never with EOS."""
        return (self._prefix if add_bos else []) + self._ids(text)

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Ids of a chat up to where the assistant answers; BOS stands where the template writes it, and only there."""
        if self.chat_template is None:
            raise ValueError("this checkpoint has no chat template: drop --chat or use an instruct model")
        return self._ids(render_chat(self.chat_template, messages, self._names))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens skipped; bytes that are no UTF-8 become U+FFFD."""
        data = b"".join(self._pieces.get(int(token), b"") for token in ids)
        return data.decode("utf-8", "replace").removeprefix(self._lead)

    def stream(self) -> "PieceStream":
        """Start a text that arrives token by token."""
        return PieceStream(self._pieces, self._lead)

    def _ids(self, text: str) -> list[int]:
        try:
            text.encode()  # tiktoken would take a lone surrogate, as from an argument that is not UTF-8
            return self._encode(text)
        except Exception as error:  # tokenizers raises nothing narrower
            raise ValueError(f"text cannot be tokenized ({_line(error)}): pass valid Unicode text") from error


class PieceStream:
    """Text of tokens that arrive one by one; all of it together is `Tokenizer.decode` of all tokens."""

    def __init__(self, pieces: dict[int, bytes], lead: str):
        self._pieces, self._lead = pieces, lead
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # keeps an unfinished character back

    def push(self, token: int) -> str:
        """Text that became certain with this token."""
        return self._trim(self._decoder.decode(self._pieces.get(int(token), b"")))

    def flush(self) -> str:
        """What was held back: U+FFFD where the tokens ended within a character, else nothing."""
        return self._trim(self._decoder.decode(b"", final=True))

    def _trim(self, text: str) -> str:
        if text:
            text, self._lead = text.removeprefix(self._lead), ""
        return text


def _load_json(path: Path) -> _Vocabulary:
    try:
        text = read_text(path)
        decoder = parse_json(text, "it").get("decoder")  # bounded, before the library reads it
        library = tokenizers.Tokenizer.from_str(text)
        to_bytes, lead = _json_decoder(decoder)
        library.no_truncation()  # a file may ask for either; a prompt is neither cut nor filled up
        library.no_padding()
        probe = library.encode("a")  # shows what the post-processor puts before a text
        ids = library.get_vocab(with_added_tokens=True)
        if not ids:
            raise ValueError("its vocabulary is empty")
    except Exception as error:  # tokenizers raises nothing narrower
        raise _unreadable(path, "tokenizer.json", error) from error
    added = library.get_added_tokens_decoder()
    pieces = {token: to_bytes(name) for name, token in ids.items() if token not in added}
    pieces |= {token: name.content.encode() for token, name in added.items() if not name.special}
    prefix = probe.ids[: (*probe.special_tokens_mask, 0).index(0)]
    bos = library.id_to_token(prefix[0]) if prefix else None

    def encode(text: str) -> list[int]:
        return library.encode(text, add_special_tokens=False).ids

    return _Vocabulary(encode, ids, pieces, lead, bos, prefix=prefix)


def _json_decoder(decoder: dict[str, Any] | None) -> tuple[Callable[[str], bytes], str]:
    """How tokenizer.json's decoder turns a token into bytes, and the space it strips from the start of a text."""
    if decoder is None:  # tokens are whole words
        return lambda token: f" {token}".encode(), " "
    steps = {step["type"]: step for step in decoder.get("decoders", [decoder])}
    if "ByteLevel" in steps and steps.keys() <= {"ByteLevel", "ByteFallback", "Fuse"}:
        return _byte_level(), ""
    space = steps.get("Replace", {"pattern": {"String": "▁"}})["pattern"].get("String")
    if space == "▁" and steps.keys() <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        strips = "Strip" in steps and steps["Strip"]["start"] > 0
        prepends = "Metaspace" in steps and steps["Metaspace"].get("prepend_scheme") != "never"
        return _piece_bytes, " " if strips or prepends else ""
    raise ValueError(f"its decoder is {'+'.join(steps)}, known are ByteLevel and sentencepiece's")


def _byte_level() -> Callable[[str], bytes]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for the characters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = sorted(set(range(256)) - set(printable))
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    return lambda token: bytes(byte_of[c] for c in token) if byte_of.keys() >= set(token) else token.encode()


def _piece_bytes(piece: str) -> bytes:
    byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace("▁", " ").encode()


def _load_model(path: Path, added: Added) -> _Vocabulary:
    data = path.read_bytes()
    # A sentencepiece protobuf starts with a line feed (field 1), so its first line is empty.
    is_tiktoken = re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+\r?", data.split(b"\n", 1)[0])
    try:
        return _load_tiktoken(data, added) if is_tiktoken else _load_sentencepiece(data, added)
    except (RuntimeError, ValueError) as error:
        kind = "tiktoken" if is_tiktoken else "sentencepiece"
        raise _unreadable(path, f"{kind} tokenizer.model", error) from error


def _load_tiktoken(data: bytes, added: Added) -> _Vocabulary:
    lines = [line.split() for line in data.splitlines()]
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    if sorted(ranks.values()) != list(range(len(lines))):
        raise ValueError(f"expected the ranks 0 to {len(lines) - 1}, each once")
    names = dict(enumerate(LLAMA3_SPECIAL, start=len(ranks))) | {token: name for token, (name, _) in added.items()}
    ids = {name: token for token, name in names.items()}
    library = tiktoken.Encoding("llama3", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=ids)

    def encode(text: str) -> list[int]:
        return [i for part in LLAMA3_CHUNK.findall(text) for i in library.encode(part, allowed_special="all")]

    pieces = {rank: token for token, rank in ranks.items()} | _visible(added)
    return _Vocabulary(encode, ids, pieces, "", LLAMA3_SPECIAL[0], tuple(name for name in LLAMA3_EOS if name in ids))


def _load_sentencepiece(data: bytes, added: Added) -> _Vocabulary:
    library = sentencepiece.SentencePieceProcessor()
    library.LoadFromSerializedProto(data)
    names = {i: library.id_to_piece(i) for i in range(library.vocab_size())}
    pieces = {i: _piece_bytes(name) for i, name in names.items()}
    pieces[library.unk_id()] = library.decode([library.unk_id()]).encode()
    control = {i: (name, True) for i, name in names.items() if library.is_control(i)}
    special = {name: i for i, (name, _) in (control | added).items()}
    pieces = {i: piece for i, piece in pieces.items() if i not in control | added} | _visible(added)
    pattern = re.compile("(" + ("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)") + ")")

    def encode(text: str) -> list[int]:
        parts = enumerate(pattern.split(text))  # text and special token take turns
        return [t for i, part in parts for t in ([special[part]] if i % 2 else library.encode(part))]

    # Each text between special tokens gets the leading space, as in Llama 2's reference and its tokenizer.json.
    lead = " " if library.normalize("a").startswith("▁") else ""
    eos = names.get(library.eos_id())  # -1 where there is none
    ids = {name: i for i, name in names.items()} | special
    return _Vocabulary(encode, ids, pieces, lead, names.get(library.bos_id()), (eos,) if eos else ())


def _visible(added: Added) -> dict[int, bytes]:
    return {token: name.encode() for token, (name, is_special) in added.items() if not is_special}


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    if (path := folder / "chat_template.jinja").is_file():
        try:
            return read_text(path)
        except ValueError as error:
            raise _unreadable(path, "template", error) from error
    template = config.get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    if template is not None and not isinstance(template, str):
        raise ValueError(f"chat_template is a {type(template).__name__}, expected text: correct tokenizer_config.json")
    return template


def _content(value: Any) -> str | None:
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _added_tokens(folder: Path, config: dict[str, Any]) -> Added:
    added = config.get("added_tokens_decoder") or {}
    try:
        return {int(token): (entry["content"], entry.get("special", False)) for token, entry in added.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _unreadable(folder / "tokenizer_config.json", "added_tokens_decoder", error) from error


def _eos_ids(path: Path) -> set[int]:
    value = _read_json(path).get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) for i in ids):
        raise ValueError(f"{path}: eos_token_id is {short(value)}, expected an id or a list of ids: correct it")
    return set(ids)


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path, todo="convert or download the checkpoint again") if path.is_file() else {}


def _unreadable(path: Path, kind: str, error: Exception) -> ValueError:
    return ValueError(f"{path}: not a readable {kind} ({_line(error)}): convert or download the checkpoint again")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
