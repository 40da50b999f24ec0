"""A checkpoint folder on disk (config.json, model.safetensors, tokenizer files): how it is found, written, recognised.

`model.safetensors` holds the names of model.py. The linear layers of the blocks lie [K, N], one input channel a
contiguous row (an nn.Linear's weight transposed), so that skipping a channel skips one run of memory; embeddings,
norms and the output layer lie as PyTorch has them. Files are memory-mapped when read and replaced by renaming when
written, so that no reader ever sees half a file.
"""

import hashlib
from pathlib import Path
from typing import Any

from teal_fast.families.args import ModelArgs
from teal_fast.families.config import model_args
from teal_fast.files.gguf_cache import find_prepared
from teal_fast.files.paths import demo_folder
from teal_fast.files.store import SAFETENSORS_DTYPES, open_safetensors, read_json, short

WEIGHTS, CONFIG = "model.safetensors", "config.json"
METADATA = {"format": "teal-fast", "version": "2", "linear": "[K, N]"}  # of our model.safetensors
SOURCE = "source"  # of the metadata of a quantized checkpoint: see source_of
ROUNDED = "rounded_to"  # of the metadata of weights that had been quantized: a GGUF file's types, as Q4_K_M
SIZES = ("architecture", "n_layers", "dim", "ffn_dim", "n_heads", "n_kv_heads", "head_dim", "vocab_size")
FINGERPRINT = (*SIZES, "weights")  # the keys of a fingerprint


class MissingDemoError(FileNotFoundError):
    """The demo checkpoint was asked for and is not there yet; commands make it (cli.py)."""


def find_checkpoint(name: str) -> Path:
    """The folder that `--checkpoint name` means. "demo" and a GGUF file's must be there: cli.py prepares them."""
    folder = demo_folder() if name == "demo" else Path(name)
    if name == "demo" and not folder.exists():
        raise MissingDemoError("the demo model is not prepared yet: run `python -m teal_fast.scripts.prepare_demo`")
    if folder.is_file():
        return find_prepared(folder)
    if not folder.exists():
        raise FileNotFoundError(
            f"{folder} does not exist: expected a converted checkpoint's folder, a .gguf file, or the name demo"
        )
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"{folder} has no {file}: expected a folder made by python -m teal_fast.scripts.convert_hf_checkpoint "
                "or python -m teal_fast.scripts.convert_gguf, or the name demo"
            )
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json as Hugging Face wrote it."""
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}: expected the folder of a Hugging Face model")
    return read_json(path)


def fingerprint(folder: Path) -> dict[str, str]:
    """What tells this model from another: architecture, sizes and a hash over a few rows of every layer's weights.

    Tensors are hashed under the names that the file has, so that a calibration outlives a new version of the format.
    """
    args = model_args(read_config(folder))
    digest = hashlib.sha256()
    with open_safetensors(folder / WEIGHTS) as file:
        for name in sorted(file.keys()):
            rows = file.get_slice(name)
            if rows.get_dtype() not in SAFETENSORS_DTYPES.values() or len(rows.get_shape()) not in (1, 2):
                found = f"{rows.get_dtype()} {rows.get_shape()}"
                raise ValueError(f"{folder / WEIGHTS}: {short(name)} is {found}, no weight: convert the model again")
            rows = rows[:2]
            digest.update(name.encode() + rows.float().numpy().tobytes())
    return sizes(args) | {"weights": digest.hexdigest()[:16]}


def sizes(args: ModelArgs) -> dict[str, str]:
    """What a fingerprint holds besides the weights' hash."""
    return {name: str(getattr(args, name)) for name in SIZES}


def rounded_to(weights: Path) -> dict[str, str]:
    """What a safetensors file says that its weights were rounded to before, as its metadata have it; or nothing."""
    with open_safetensors(weights) as file:
        metadata = file.metadata() or {}
    return {ROUNDED: metadata[ROUNDED]} if ROUNDED in metadata else {}


def source_of(folder: Path) -> str:
    """The weights' hash of the checkpoint that this one's were rounded from (quantize.py), else its own."""
    with open_safetensors(folder / WEIGHTS) as file:
        source = (file.metadata() or {}).get(SOURCE)
    return source or fingerprint(folder)["weights"]
