"""A checkpoint folder on disk (config.json, model.safetensors, tokenizer files): how it is found, written, recognised.

`model.safetensors` holds the names of model.py. The linear layers of the blocks lie [K, N], one input channel a
contiguous row (an nn.Linear's weight transposed), so that skipping a channel skips one run of memory; embeddings,
norms and the output layer lie as PyTorch has them. Files are memory-mapped when read and replaced by renaming when
written, so that no reader ever sees half a file.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from model import ModelArgs, Transformer

ROOT = Path(__file__).resolve().parent
WEIGHTS, CONFIG = "model.safetensors", "config.json"
SPARSE_WEIGHT = re.compile(r"layers\.\d+\.(attention\.(wqkv|wo)|feed_forward\.(w13|w2))\.weight")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SAFETENSORS_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
}

METADATA = {"format": "teal-fast", "version": "1", "linear": "[K, N]"}  # of our model.safetensors


def find_checkpoint(name: str) -> Path:
    """The folder that `--checkpoint name` means. "demo" is prepared on first use (scripts/prepare_demo.py)."""
    folder = ROOT / "checkpoints" / "demo" if name == "demo" else Path(name)
    if name == "demo" and not folder.exists():
        run_command("scripts.prepare_demo", "--out", str(folder))
    if folder.is_file():
        raise ValueError(
            f"{folder} is a file, expected a folder: convert it with `python -m scripts.convert_gguf {folder}`"
        )
    if not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist: expected a converted checkpoint's folder, or the name demo")
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"{folder} has no {file}: expected a folder made by `python -m scripts.convert_hf_checkpoint` or "
                "`python -m scripts.convert_gguf`, or the name demo"
            )
    return folder


def run_command(module: str, *arguments: str) -> None:
    """Runs another command of this project to its end, its output on our stderr; ValueError when it fails."""
    print(f"running: python -m {module} {' '.join(arguments)}", file=sys.stderr, flush=True)
    search_path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        stdout=2,
        env=os.environ | {"PYTHONPATH": search_path},
        check=False,
    )
    if done.returncode:
        raise ValueError(f"python -m {module} failed, see above: nothing was changed")


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json as Hugging Face wrote it."""
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}: expected the folder of a Hugging Face model")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): download or convert the model again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, expected an object: download the model again")
    return config


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
        for name, (dtype, shape) in tqdm(layout.items(), desc=f"writing {WEIGHTS}", unit="tensor"):
            tensor = read(name).to(dtype).contiguous()
            assert tensor.shape == shape, (name, tensor.shape, shape)
            extremes = tensor.aminmax() if dtype.is_floating_point else ()  # NaN is passed on, nothing is allocated
            if not all(extreme.isfinite() for extreme in extremes):
                raise ValueError(f"{name} holds NaN or values out of range for {SAFETENSORS_DTYPES[dtype]}")
            file.write(memoryview(tensor.flatten().view(torch.uint8).numpy()))
        file.flush()
        os.fsync(file.fileno())


def write_weights(
    folder: Path,
    args: ModelArgs,
    names: dict[str, tuple[str, ...]],
    shapes: dict[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
) -> None:
    """Writes model.safetensors from another program's tensors.

    `names` maps a module of ours ("layers.{}.attention.wqkv") to those that make it when stacked along the outputs;
    `shapes` tells what there is, `read` fetches one. Raises ValueError naming what is missing, left over or misshapen.
    """

    def sources(name: str) -> tuple[str, ...]:
        module, kind = name.rsplit(".", 1)
        layer = "".join(re.findall(r"\.(\d+)\.", module))
        return tuple(f"{source.format(layer)}.{kind}" for source in names[re.sub(r"\d+", "{}", module, count=1)])

    with torch.device("meta"):
        expected = {name: p.shape for name, p in Transformer(args).named_parameters()}  # a tied output appears once
    made_of = {name: sources(name) for name in expected}
    output, embeddings = sources("output.weight"), made_of["tok_embeddings.weight"]
    _check_shapes(expected, made_of, shapes, unused=output if args.tie_embeddings else ())
    if args.tie_embeddings and output[0] in shapes and not torch.equal(read(output[0]), read(embeddings[0])):
        raise ValueError(f"config.json ties {output[0]} to {embeddings[0]}, but the checkpoint's two differ")

    def build(name: str) -> Tensor:
        parts = [read(part) for part in made_of[name]]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        return tensor.t() if SPARSE_WEIGHT.fullmatch(name) else tensor

    layout = {name: (dtype, _stored_shape(name, shape)) for name, shape in expected.items()}
    write_safetensors(folder / WEIGHTS, layout, build, METADATA)


def _check_shapes(
    expected: dict[str, torch.Size],
    made_of: dict[str, tuple[str, ...]],
    shapes: dict[str, tuple[int, ...]],
    unused: tuple[str, ...],
) -> None:
    for name, shape in expected.items():
        parts = made_of[name]
        if missing := [part for part in parts if part not in shapes]:
            raise ValueError(f"the checkpoint lacks {missing[0]}, which its config.json calls for")
        rows = sum(shapes[part][0] for part in parts if shapes[part])
        if any((rows, *shapes[part][1:]) != tuple(shape) for part in parts):
            found = ", ".join(f"{part} {list(shapes[part])}" for part in parts)
            raise ValueError(f"config.json calls for {name} of shape {list(shape)}, but the checkpoint has {found}")
    if extra := sorted(shapes.keys() - set(unused).union(*made_of.values())):
        raise ValueError(f"the checkpoint holds {extra[0]} ({len(extra)} such), which config.json does not call for")


def _stored_shape(name: str, shape: torch.Size) -> torch.Size:
    return torch.Size(reversed(shape)) if SPARSE_WEIGHT.fullmatch(name) else shape


def fingerprint(folder: Path) -> dict[str, str]:
    """What tells this model from another: architecture, sizes and a hash over a few rows of every layer's weights."""
    config = read_config(folder)
    args = ModelArgs.from_config(config)
    digest = hashlib.sha256()
    with open_safetensors(folder / WEIGHTS) as file:
        for name in sorted(file.keys()):
            rows = file.get_slice(name)[:2]
            digest.update(name.encode() + rows.float().numpy().tobytes())
    sizes = ("architecture", "n_layers", "dim", "ffn_dim", "n_heads", "n_kv_heads", "head_dim", "vocab_size")
    return {name: str(getattr(args, name)) for name in sizes} | {"weights": digest.hexdigest()[:16]}
