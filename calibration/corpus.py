"""Reads text to calibrate and evaluate on: plain text and .jsonl files, single or in folders."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from teal_fast.files.store import parse_json
from teal_fast.files.tokenizer import Tokenizer
from teal_fast.model import ModelArgs

TEXT_SUFFIXES = (".txt", ".raw", ".md", ".jsonl")


def read_corpus(paths: list[Path]) -> list[str]:
    """The documents of text files and folders: one per line of a .jsonl file ("text"), one per file otherwise.

    Raises ValueError on files that are not UTF-8 or hold no text, and FileNotFoundError.
    """
    documents = []
    for file in (file for path in paths for file in _text_files(path)):
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"corpus {file} is not UTF-8 text ({error.reason} at byte {error.start})") from error
        documents += _jsonl_texts(file, text) if file.suffix == ".jsonl" else [text]
    if not any(document.strip() for document in documents):
        raise ValueError(f"the corpus holds no text: {', '.join(map(str, paths))}; give text or .jsonl files")
    return documents


def encode_corpus(paths: list[Path], tokenizer: Tokenizer, args: ModelArgs) -> list[list[int]]:
    """The token ids of each of the documents, BOS included. Raises ValueError when the model knows no such token."""
    documents = [tokenizer.encode(text) for text in read_corpus(paths)]
    for ids in documents:
        args.check_ids(ids)
    return documents


def read_ids(paths: list[Path], tokenizer: Tokenizer, args: ModelArgs) -> list[int]:
    """The token ids of all documents, one after the other."""
    return [token for ids in encode_corpus(paths, tokenizer, args) for token in ids]


def as_text(piece: list[int], prefix: Sequence[int]) -> list[int]:
    """A piece of a text as a text of its own: with the ids that every text begins with (`Tokenizer.prefix`) for its
    first ones. Some models say little that makes sense without them: Gemma 3 270M loses 1.2 nats a token.
    """
    return [*prefix, *piece[len(prefix) :]]


def _text_files(path: Path) -> list[Path]:
    if path.is_dir():
        os.listdir(path)  # raises where it may not be read, which rglob keeps to itself
        return sorted(file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES and file.is_file())
    if not path.exists():
        raise FileNotFoundError(f"corpus {path} does not exist: expected a text file, a .jsonl file or a folder")
    if not (path.is_file() or path.is_fifo()):  # /dev/zero has no end
        raise ValueError(f"corpus {path} is a device: expected a text file, a .jsonl file or a folder")
    return [path]


def _jsonl_texts(file: Path, content: str) -> Iterator[str]:
    for number, line in enumerate(content.split("\n"), 1):  # splitlines() would cut at U+2028 inside a string as well
        if not line.strip():
            continue
        try:
            record = parse_json(line, f"line {number}")
        except ValueError:
            record = None
        if not (isinstance(record, dict) and isinstance(record.get("text"), str)):
            raise ValueError(f'corpus {file}, line {number}: expected a JSON object with a "text" field of text')
        yield record["text"]
