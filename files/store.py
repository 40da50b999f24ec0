"""Reading and writing files safely: JSON and safetensors of any origin, and files that appear whole or not at all.

What is read may be damaged or hostile: it gives one ValueError of one line, whatever it holds. Of JSON that means
bounds on its size and its nesting, and no constants that JSON does not have. What is written is renamed into its place,
so that no reader ever sees half a file. What a killed process left unfinished is hidden, and the next one to write into
that folder removes it. What a file's contents mean is the business of those who ask for it.
"""

import fcntl
import json
import os
import reprlib
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

SAFETENSORS_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
MOST_BYTES = 2**26  # of a JSON file: twice the largest tokenizer.json known, Gemma 3's of 33 MB
SHOWN = reprlib.Repr()
SHOWN.maxstring = SHOWN.maxother = SHOWN.maxlong = 100  # characters
TEMPORARY = ".teal-fast.tmp"  # what names of unfinished files and folders end in
MOST_LEVELS = 64  # of nesting: tokenizer.json has 8; Python's own code recurses, and gives up at some hundred


def short(value: Any) -> str:
    """A value of a foreign file as an error shows it: cut where it is long or deep."""
    return " ".join(SHOWN.repr(value).split())


def one_line(said: Exception | str, most: int = 300, first: int = 200, last: int = 100) -> str:
    """What an error says, of more than `most` characters the first and the last: some libraries quote a file whole."""
    text = " ".join(str(said).split())
    return text if len(text) <= most else f"{text[:first]} … {text[-last:]}"


def read_text(path: Path) -> str:
    """A text file that is neither huge nor of another encoding than UTF-8."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ValueError(f"{path} has {size} bytes, expected at most {MOST_BYTES}: is it the right file?")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error.reason} at byte {error.start}): make it again") from error


def read_json(path: Path, kind: type = dict, todo: str = "download or convert the model again") -> Any:
    """What a JSON file holds, a dict unless `kind` says otherwise. `todo`: what the user can do if it is unsound."""
    return parse_json(read_text(path), str(path), kind, todo)


def parse_json(text: str, place: str, kind: type = dict, todo: str = "make it again") -> Any:
    """The JSON of a text of any origin, found at `place`. Raises ValueError on all that is not plain, bounded JSON."""
    if len(text) > MOST_BYTES:
        raise ValueError(f"{place} has {len(text)} characters, expected at most {MOST_BYTES}: {todo}")
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        _check_depth(value)
    except RecursionError as error:
        raise ValueError(f"{place} is not valid JSON (nested deeper than {MOST_LEVELS} levels): {todo}") from error
    except ValueError as error:
        raise ValueError(f"{place} is not valid JSON ({error}): {todo}") from error
    if not isinstance(value, kind):
        expected = {dict: "an object", list: "a list"}[kind]
        raise ValueError(f"{place} holds a {type(value).__name__}, expected {expected}: {todo}")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MOST_LEVELS):
        parts = (node.values() if isinstance(node, dict) else node for node in level if isinstance(node, dict | list))
        if not (level := [node for part in parts for node in part if isinstance(node, dict | list)]):
            return
    raise RecursionError


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor of floats holds neither NaN nor inf; nothing of its size is allocated.

    Both stay in a sum, which is 45 times as fast as `isfinite`. A sum can overflow too: least and greatest tell then.
    """
    return bool(tensor.sum().isfinite()) or all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """An open safetensors file, memory-mapped. A missing, truncated or corrupt one is one clear error."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({one_line(error)}): make it again") from error


def check_writable(path: Path) -> None:
    """Raises ValueError when no file can be made at `path`: better before long work than after it."""
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "no ordinary file"
        raise ValueError(f"cannot write {path}: it is {kind}, expected the name of a file to make or replace")
    _check_takes_files(path)


def check_new(path: Path) -> None:
    """Raises FileExistsError or ValueError when no folder can be made at `path`: better before long work than after."""
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"{path} exists already: remove it, or choose another place with --out")
    _check_takes_files(path)


def _check_takes_files(path: Path) -> None:
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"cannot write {path}: {folder} takes no new file ({error.strerror})") from error


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which it replaces when the block ends well; otherwise `path` stays as it was."""
    check_writable(path)
    with _temporary(path, Path.touch) as temporary:
        yield temporary
        os.replace(temporary, path)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, else goes. Raises when `path` exists."""
    check_new(path)
    with _temporary(path, Path.mkdir) as temporary:
        yield temporary
        os.rename(temporary, path)


@contextmanager
def _temporary(path: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """A hidden file or folder beside `path`, no other thread's, locked as long as this process lives or it is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path.parent)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    make(temporary)
    lock = _lock(temporary)
    try:
        yield temporary
    except OSError as error:
        if error.errno and not error.filename:  # a full disk names no file
            error.filename = str(path)
        raise
    finally:
        _remove(temporary)
        if lock is not None:
            os.close(lock)


def _remove_leftovers(folder: Path) -> None:
    """Removes what killed processes left in `folder`: hidden files and folders of ours that none holds locked."""
    for path in folder.glob(f".*{TEMPORARY}"):
        with suppress(OSError):  # another process was faster, or it is another user's
            # Another process locks what it has just made: that takes it no second.
            if time.time() - path.stat().st_mtime > 1 and (lock := _lock(path)) is not None:
                _remove(path)
                os.close(lock)


def _lock(path: Path) -> int | None:
    """A descriptor that holds the lock on a file or folder until it is closed or its process ends, however it ends.

    None where another process holds it, or where the file system has no locks.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_safetensors(
    path: Path,
    layout: dict[str, tuple[torch.dtype, torch.Size]],
    read: Callable[[str], Tensor],
    metadata: dict[str, str],
    progress: str | None = "writing weights",
) -> None:
    """Writes one tensor at a time, so that memory holds one of them and not the file.

    `layout` gives dtype and shape of each tensor in file order; `read(name)` returns it. progress: what the bar on
    stderr is called, None for no bar. The library's own writer wants all tensors at once. Format:
    https://huggingface.co/docs/safetensors
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, (dtype, shape) in layout.items():
        begin, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)  # rows then start on a cache line wherever a row is a multiple of one
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape) in tqdm(layout.items(), progress, disable=progress is None, unit="tensor"):
            tensor = read(name).to(dtype).contiguous()
            assert tensor.shape == shape, (name, tensor.shape, shape)
            if dtype.is_floating_point and not is_finite(tensor):
                raise ValueError(f"{name} holds NaN or values out of range for {SAFETENSORS_DTYPES[dtype]}")
            file.write(memoryview(tensor.flatten().view(torch.uint8).numpy()))
        file.flush()
        os.fsync(file.fileno())
