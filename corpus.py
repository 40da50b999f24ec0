"""Text to calibrate and evaluate on: plain text and .jsonl files, alone or in folders."""

import json
from collections.abc import Iterator
from pathlib import Path

TEXT_SUFFIXES = (".txt", ".raw", ".md", ".jsonl")


def read_corpus(paths: list[Path]) -> list[str]:
    """The documents of text files and folders: a .jsonl line's "text" each, any other file whole."""
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"corpus {path} does not exist: expected a text file, a .jsonl file or a folder")
        files += sorted(p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES) if path.is_dir() else [path]
    documents = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"corpus {file} is not UTF-8 text ({error.reason} at byte {error.start})") from error
        documents += _jsonl_texts(file, text) if file.suffix == ".jsonl" else [text]
    if not any(document.strip() for document in documents):
        raise ValueError(f"the corpus holds no text: {', '.join(map(str, paths))}; give text or .jsonl files")
    return documents


def _jsonl_texts(file: Path, content: str) -> Iterator[str]:
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'corpus {file}, line {number}: expected a JSON object with a "text" field') from error
