"""GGUF files that are run as they are: the checkpoint folder that is made of one, once, in the cache.

    <cache>/gguf/<hash of the file>-<its name>/<its name>/      the checkpoint
    <cache>/gguf/<hash of the file>-<its name>/files.json       what it must hold

The hash is the sha256 of all bytes, since a file that was changed anywhere is another model. That takes a second a GB,
so it is kept for a file of the same place, size and times. An entry is renamed into its place when it is whole; before
each use the sizes of its files are compared, and the hashes of all but the weights. What differs is made again.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from teal_fast.files.store import new_file, new_folder, read_json
from teal_fast.kernels.native import cache_folder

LAYOUT = "4"  # of the entries; entries of another are not found
MAGIC = b"GGUF"
LIST = "files.json"
LARGE = 2**26  # a file of more bytes is told by its size
MOST_NAME = 100  # characters; file systems take 255 bytes with all that is added
SETTLED = 2  # seconds after which a change to a file shows in its times


class MissingPreparedError(FileNotFoundError):
    """A GGUF file was named that no checkpoint has been made of yet; commands make it (cli.py)."""


def find_prepared(path: Path) -> Path:
    """The checkpoint folder in the cache of a GGUF file. Raises MissingPreparedError, ValueError on another file."""
    folder = prepared_folder(path)
    if not is_whole(folder):
        todo = f"run `python -m teal_fast.scripts.convert_gguf {path}` and name the folder that it makes"
        raise MissingPreparedError(f"{path} is not prepared yet: {todo}")
    return folder


def prepared_folder(path: Path) -> Path:
    """Where the checkpoint folder of a GGUF file belongs; it has the file's name."""
    with open(path, "rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{path} is no GGUF file, expected one, a converted checkpoint's folder, or the name demo")
    name = path.stem[:MOST_NAME]
    return cache_folder() / "gguf" / f"{hash_of(path)[:16]}-{LAYOUT}-{name}" / name


def is_prepared(folder: Path) -> bool:
    """Whether a checkpoint folder is the cache's own, made of a GGUF file."""
    return folder.resolve().is_relative_to((cache_folder() / "gguf").resolve())


def hash_of(path: Path) -> str:
    """sha256 of the file's bytes, in hex."""
    about = identity(path)
    kept = cache_folder() / "gguf" / "hashes" / hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]
    if kept.is_file() and len(known := kept.read_text(encoding="ascii", errors="replace")) == 64:
        return known
    with open(path, "rb") as file:
        made = hashlib.file_digest(file, "sha256").hexdigest()
    if time.time() - max(about[-2:]) / 1e9 > SETTLED and identity(path) == about:
        # A cache that takes no file, a shared one perhaps, may have the entry all the same.
        with suppress(OSError, ValueError), new_file(kept) as temporary:
            temporary.write_text(made, encoding="ascii")
    return made


def identity(path: Path) -> list:
    """Place, size and times of a file: what can't stay the same where its bytes change."""
    found = os.stat(path)
    return [str(path.resolve()), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def describe(path: Path) -> list:
    """A file's size and, unless it is large, its hash."""
    size = path.stat().st_size
    return [size, hashlib.sha256(path.read_bytes()).hexdigest() if size <= LARGE else None]


def is_whole(folder: Path) -> bool:
    """Whether the entry with this checkpoint folder is as it was made. What was added since does not count."""
    try:
        expected = read_json(folder.parent / LIST)
        return bool(expected) and all(describe(folder / name) == about for name, about in expected.items())
    except (OSError, ValueError):
        return False


def prepare_folder(path: Path, convert: Callable[[Path], None]) -> Path:
    """The entry's checkpoint folder, which `convert` makes. Another process may do the same: the first one counts."""
    folder = prepared_folder(path)
    if folder.parent.exists() and not is_whole(folder):
        shutil.rmtree(folder.parent)
    try:
        with new_folder(folder.parent) as made:
            convert(made / folder.name)
            files = {path.name: describe(path) for path in sorted((made / folder.name).iterdir())}
            (made / LIST).write_text(json.dumps(files, indent=1) + "\n", encoding="utf-8")
    except OSError:
        if not is_whole(folder):
            raise
    return folder
