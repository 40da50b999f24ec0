"""GGUF files of llama.cpp, and their conversion into checkpoint folders of ours.

The metadata become a config.json (gguf_config.py), the vocabulary tokenizer files (gguf_tokenizer.py). Quantized
weights are kept as they are (gguf_kept.py) or dequantized. What llama.cpp does to weights when it makes a GGUF, such as
the row order of q and k, is undone.
"""

import json
import mmap
import warnings
from pathlib import Path

import torch
from torch import Tensor

from teal_fast.families.config import model_args
from teal_fast.families.tensors import Tensors
from teal_fast.files.checkpoint import CONFIG, ROUNDED
from teal_fast.files.conversion import check_opens, write_weights
from teal_fast.files.gguf_config import LONGROPE, ROPE_FACTORS, to_config
from teal_fast.files.gguf_kept import FLOATS, Source, write_kept
from teal_fast.files.gguf_reader import dequantize, file_type, open_gguf
from teal_fast.files.gguf_tokenizer import write_tokenizer
from teal_fast.files.store import check_new, new_folder


def convert_gguf(
    source: Path,
    out: Path,
    dtype: torch.dtype,
    *,
    keep: bool = False,
    pre: str | None = None,
    rope_scaling: str | None = None,
    rope_theta: float | None = None,
) -> None:
    """Writes the checkpoint folder `out`, whole or not at all; at the end it is opened, see `check_opens`.

    dtype: of the dequantized weights, or, where `keep` leaves quantized ones as they are, of what is computed. What a
    converter left out may be given: `pre`, the name of the pre-tokenizer, and the rotary settings.
    """
    check_new(out)
    reader = open_gguf(source)
    types = file_type(reader)
    config = to_config(reader, rope_scaling, rope_theta)
    args = model_args(config)
    theirs = Tensors(config, args, gguf=True)
    factors = (ROPE_FACTORS, *LONGROPE.values())  # in the config.json by now
    tensors = {tensor.name: tensor for tensor in reader.tensors if tensor.name not in factors}
    # GGUF lists the fastest-varying dimension first.
    shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in tensors.items()}

    mapped: mmap.mmap = reader.data.base

    def read(name: str, dtype: torch.dtype = dtype) -> Tensor:
        give_back(mapped)
        return theirs.adapt(name, dequantize(tensors[name], dtype))

    def read_stored(name: str) -> Tensor:
        give_back(mapped)
        with warnings.catch_warnings(action="ignore"):  # that it can't be written to: nobody does
            return theirs.adapt(name, torch.from_numpy(tensors[name].data))

    with new_folder(out) as folder:
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_tokenizer(reader, folder, pre)
        del reader  # its metadata, an object for each token, is larger than some models
        quantized = any(tensor.tensor_type.name not in FLOATS for tensor in tensors.values())
        if keep and quantized:
            kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
            write_kept(folder, args, theirs.names, Source(kinds, shapes, read, read_stored), types, dtype)
        else:
            metadata = {ROUNDED: types} if quantized else {}
            write_weights(folder, args, theirs.names, shapes, read, dtype, metadata)
        give_back(mapped)
        check_opens(folder)


def give_back(mapped: mmap.mmap) -> None:
    """Of a file that is mapped, the pages in memory: what is read again comes from the system's cache."""
    if hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)
