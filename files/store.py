"""TODO."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """An open safetensors file, memory-mapped. A missing, truncated or corrupt one is one clear error."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}): make it again") from error


def check_writable(path: Path) -> None:
    """Raises ValueError when no file or folder can be made at `path`: better before long work than after it."""
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
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, else goes. Raises when `path` exists."""
    if path.exists():
        raise FileExistsError(f"{path} exists already: remove it, or choose another place with --out")
    check_writable(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_safetensors(
    path: Path,
    layout: dict[str, tuple[torch.dtype, torch.Size]],
    read: Callable[[str], Tensor],
    metadata: dict[str, str],
) -> None:
    """Writes one tensor at a time, so that memory holds one of them and not the file.

    `layout` gives dtype and shape of each tensor in file order; `read(name)` returns it. The library's own writer wants
    all tensors at once. Format: https://huggingface.co/docs/safetensors
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
        for name, (dtype, shape) in tqdm(layout.items(), desc="writing weights", unit="tensor"):
            tensor = read(name).to(dtype).contiguous()
            assert tensor.shape == shape, (name, tensor.shape, shape)
            extremes = tensor.aminmax() if dtype.is_floating_point else ()  # NaN is passed on, nothing is allocated
            if not all(extreme.isfinite() for extreme in extremes):
                raise ValueError(f"{name} holds NaN or values out of range for {SAFETENSORS_DTYPES[dtype]}")
            file.write(memoryview(tensor.flatten().view(torch.uint8).numpy()))
        file.flush()
        os.fsync(file.fileno())
