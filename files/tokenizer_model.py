"""The vocabulary of a tokenizer.model: two formats have that name, sentencepiece's and Llama 3's tiktoken ranks."""

import base64
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tiktoken import Encoding
from tokenizers import AddedToken

from teal_fast.files.decoding import piece_bytes, unchanged, without_a_space
from teal_fast.files.pre_tokenizers import LLAMA3
from teal_fast.files.vocabulary import Vocabulary, is_control, unreadable

# Llama 3's reference, https://github.com/meta-llama/llama-models/blob/main/models/llama3/tokenizer.py
LLAMA3_NAMED = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1"]
LLAMA3_NAMED += ["finetune_right_pad_id", "step_id", "start_header_id", "end_header_id", "eom_id", "eot_id"]
LLAMA3_NAMED += ["python_tag", "image", *(f"reserved_special_token_{i}" for i in range(2, 246))]
LLAMA3_SPECIAL = [f"<|{name}|>" for name in LLAMA3_NAMED]
# tiktoken's regex engine overflows on longer runs of spaces. The reference cuts there too: whole runs, then one cut.
LLAMA3_CHUNK = re.compile(r"(?:\s{1,25000}+(?!\s)|\S{1,25000}+(?!\S))*+(?:\s{1,25000}+|\S{1,25000}+)?")
# normalizer_spec { add_dummy_prefix: false }: in a protobuf the last word on a field counts.
NO_LEADING_SPACE = b"\x1a\x02\x18\x00"


def load_model(path: Path, declared: dict[int, AddedToken], special: Iterable[str], every_part: bool) -> Vocabulary:
    """declared: the added tokens of the files beside it, by id; special: the names of special tokens there.

    every_part: whether a leading space also goes before a text that follows an added token.
    """
    data = path.read_bytes()
    # A sentencepiece protobuf starts with a line feed (field 1), so its first line is empty.
    is_tiktoken = re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+\r?", data.split(b"\n", 1)[0])
    try:
        return _tiktoken(data, declared) if is_tiktoken else _sentencepiece(data, declared, special, every_part)
    except (RuntimeError, ValueError) as error:
        kind = "tiktoken" if is_tiktoken else "sentencepiece"
        raise unreadable(path, f"{kind} tokenizer.model", error) from error


def _tiktoken(data: bytes, declared: dict[int, AddedToken]) -> Vocabulary:
    lines = [line.split() for line in data.splitlines()]
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    if sorted(ranks.values()) != list(range(len(lines))):
        raise ValueError(f"expected the ranks 0 to {len(lines) - 1}, each once")
    own = {i: AddedToken(name, special=True) for i, name in enumerate(LLAMA3_SPECIAL, start=len(ranks))}
    added = own | declared
    ids = {token.content: i for i, token in added.items()}
    library = Encoding("llama3", pat_str=LLAMA3, mergeable_ranks=ranks, special_tokens={})

    split, split_plain = _splitter(added), _splitter(_no_control(added))

    def encode(text: str, control: bool = True, start: bool = True) -> list[int]:
        found = []
        for part in (split if control else split_plain)(text):  # first: the chunks' limits know no added tokens
            if isinstance(part, int):
                found.append(part)
            else:
                found += [i for chunk in LLAMA3_CHUNK.findall(part) for i in library.encode_ordinary(chunk)]
        return found

    pieces = {rank: token for token, rank in ranks.items()}
    pieces |= {i: token.content.encode() for i, token in declared.items() if not token.special}
    return Vocabulary(encode, ids, pieces, added, bos=LLAMA3_SPECIAL[0], eos=LLAMA3_SPECIAL[1])


def _sentencepiece(
    data: bytes, declared: dict[int, AddedToken], special: Iterable[str], every_part: bool
) -> Vocabulary:
    library = SentencePieceProcessor()
    library.LoadFromSerializedProto(data)
    names = {i: library.id_to_piece(i) for i in range(library.vocab_size())}
    control = {i for i, name in names.items() if library.is_control(i) or name in special}
    added = {i: AddedToken(names[i], special=True) for i in control} | declared
    names |= {i: token.content for i, token in added.items()}
    pieces = {i: piece_bytes(name) for i, name in names.items() if i not in added or not added[i].special}
    if library.unk_id() in pieces:
        pieces[library.unk_id()] = library.decode([library.unk_id()]).encode()
    spaced = library.normalize("a").startswith("▁")
    rest = library
    if spaced and not every_part:
        rest = SentencePieceProcessor()
        rest.LoadFromSerializedProto(data + NO_LEADING_SPACE)
    split, split_plain = _splitter(added), _splitter(_no_control(added))

    def encode(text: str, control: bool = True, start: bool = True) -> list[int]:
        found = []
        for i, part in enumerate((split if control else split_plain)(text)):
            found += [part] if isinstance(part, int) else (library if start and not i else rest).encode(part)
        return found

    ids, eos, bos = {name: i for i, name in names.items()}, library.eos_id(), library.bos_id()  # -1: there is none
    first = without_a_space if spaced else unchanged
    return Vocabulary(encode, ids, pieces, added, first, names.get(bos), names.get(eos))


def _no_control(added: dict[int, AddedToken]) -> dict[int, AddedToken]:
    return {i: token for i, token in added.items() if not is_control(token)}


def _splitter(declared: dict[int, AddedToken]) -> Callable[[str], list[str | int]]:
    """Cuts a text into ids of added tokens and the texts between them, which lose the spaces that a token claims."""
    added = {token.content: (i, token) for i, token in declared.items()}
    whole = r"(?<!\w{name})(?!\w)"
    ends = {name: whole.format(name=re.escape(name)) if token.single_word else "" for name, (_, token) in added.items()}
    pattern = re.compile(f"({_longest(ends) if ends else '(?!)'})")

    def split(text: str) -> list[str | int]:
        parts: list[str | int] = pattern.split(text)  # text and added token take turns
        for i in range(1, len(parts), 2):
            parts[i], token = added[parts[i]]
            parts[i - 1] = parts[i - 1].rstrip() if token.lstrip else parts[i - 1]
            parts[i + 1] = parts[i + 1].lstrip() if token.rstrip else parts[i + 1]
        return parts

    return split


def _longest(ends: dict[str, str]) -> str:
    """A pattern of the longest of the names, each with what has to follow it.

    Names that begin alike are written once: one after the other, Gemma's 6400 take a second for 60 kB of text.
    """
    rests: dict[str, dict[str, str]] = {}
    for name, end in ends.items():
        if name:
            rests.setdefault(name[0], {})[name] = end
    parts = []
    for names in rests.values():
        first, last = min(names), max(names)  # what these share at their beginning, all share
        shared = first[: next((i for i, char in enumerate(first) if char != last[i]), len(first))]
        parts.append(re.escape(shared) + _longest({name[len(shared) :]: end for name, end in names.items()}))
    parts += [ends[""]] if "" in ends else []
    return f"(?:{'|'.join(parts)})" if len(parts) > 1 else parts[0]
