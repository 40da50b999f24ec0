"""From token ids to text: what a token adds to it, as bytes, and a text whose tokens arrive one by one.

One table from id to bytes serves a text that is streamed and one that is decoded at once, so that they cannot differ.
"""

import codecs
import re
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any

from teal_fast.files.store import short

ToBytes = Callable[[str], bytes]  # a token as the vocabulary writes it, to what it adds to a text
First = Callable[[bytes], bytes]  # what a text's first token adds to it, from what it adds elsewhere


class Pieces(Mapping[int, bytes]):
    """What each id adds to a text, in three arrays: a dictionary of 150,000 such bytes takes 22 MB, this 3."""

    def __init__(self, pieces: Mapping[int, bytes]):
        self._ids = array("Q", sorted(pieces))
        self._ends = array("Q", accumulate(len(pieces[id]) for id in self._ids))
        self._bytes = b"".join(pieces[id] for id in self._ids)

    def __getitem__(self, id: int) -> bytes:
        place = bisect_left(self._ids, id)
        if place == len(self._ids) or self._ids[place] != id:
            raise KeyError(id)
        return self._bytes[self._ends[place - 1] if place else 0 : self._ends[place]]

    def __iter__(self) -> Iterator[int]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)


class PieceStream:
    """The text of tokens that arrive one by one after a prompt, each at constant cost.

    All of it together is what decoding prompt and tokens gives after its longest common beginning with the decoded
    prompt: only where the prompt has no text of its own does the first token lose its leading space.
    """

    def __init__(self, pieces: Mapping[int, bytes], first: First, prompt: Iterable[int] = ()):
        self._pieces, self._first, self._begun = pieces, first, False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # keeps an unfinished character back
        self._decoder.decode(b"".join(self._bytes(token) for token in prompt))
        unfinished, _ = self._decoder.getstate()
        self._shown = unfinished.decode("utf-8", "replace")  # U+FFFD where the prompt ends within a character

    def push(self, token: int) -> str:
        """Text that became certain with this token."""
        return self._new(self._decoder.decode(self._bytes(token)))

    def flush(self) -> str:
        """What was held back: U+FFFD where the tokens ended within a character, else nothing."""
        return self._new(self._decoder.decode(b"", final=True))

    def _bytes(self, token: int) -> bytes:
        piece = self._pieces.get(int(token), b"")
        if piece and not self._begun:
            self._begun, piece = True, self._first(piece)
        return piece

    def _new(self, text: str) -> str:
        if text:
            text, self._shown = text.removeprefix(self._shown), ""
        return text


def unchanged(piece: bytes) -> bytes:
    return piece


def without_a_space(piece: bytes) -> bytes:
    return piece.removeprefix(b" ")


def without_spaces(piece: bytes) -> bytes:
    return piece.replace(b" ", b"")


def json_decoder(decoder: dict[str, Any] | None, pre_tokenizer: dict[str, Any] | None) -> tuple[ToBytes, First]:
    """How the decoder of a tokenizer.json turns a token into bytes, and what it takes away at the start of a text.

    A file without decoder is read backwards from its pre-tokenizer, where transformers 5.23 shows the pieces as they
    are written, with a space between each two. Raises ValueError on a decoder that is not known: the steps, their
    values and their order all count.
    """
    steps = _steps(decoder, "decoders")
    if decoder is None:
        steps = [step for step in _steps(pre_tokenizer, "pretokenizers") if step["type"] in ("ByteLevel", "Metaspace")]
        if not steps:  # tokens are whole words
            return lambda token: f" {token}".encode(), without_a_space
    order = "+".join(step["type"] for step in steps)
    if not _ORDER.fullmatch(order) or any((step | _VALUES.get(step["type"], {})) != step for step in steps):
        raise ValueError(f"its decoder is {short(steps)}, known are ByteLevel and sentencepiece's")
    if "ByteLevel" in order:
        return byte_level(), unchanged
    to_bytes = piece_bytes if decoder is None or "ByteFallback" in order else text_bytes
    if "Metaspace" in order and steps[0].get("prepend_scheme") != "never":
        return to_bytes, without_spaces  # as tokenizers 0.23 does: all spaces of the first token
    return to_bytes, without_a_space if "Strip" in order else unchanged


# Order counts: Strip takes a space from each part, and only after Fuse is the text one part.
_ORDER = re.compile(
    r"ByteLevel(\+ByteFallback)?(\+Fuse)?|Metaspace(\+Fuse)?|Replace(\+ByteFallback)?(\+Fuse(\+Strip)?)?"
)
_VALUES = {
    "Replace": {"pattern": {"String": "▁"}, "content": " "},
    "Strip": {"content": " ", "start": 1, "stop": 0},
    "Metaspace": {"replacement": "▁"},
}


def _steps(component: dict[str, Any] | None, parts: str) -> list[dict[str, Any]]:
    return (component or {}).get(parts, [component] if component else [])


def byte_level() -> ToBytes:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for the characters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = sorted(set(range(256)) - set(printable))
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    return lambda token: bytes(byte_of[c] for c in token) if byte_of.keys() >= set(token) else token.encode()


def piece_bytes(piece: str) -> bytes:
    """A sentencepiece token: a byte written <0x0A>, or text with ▁ for spaces."""
    byte = piece.startswith("<0x") and re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece)
    return bytes.fromhex(byte[1]) if byte else text_bytes(piece)


def text_bytes(piece: str) -> bytes:
    return piece.replace("▁", " ").encode()
