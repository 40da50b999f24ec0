"""Hugging Face model folders, and their conversion into checkpoint folders of ours.

Weights are read from safetensors or, without running any code in them, from PyTorch's pickles, in one file or several.
The tokenizer's files are copied as they are. Quantized models are refused: their formats are not ours.
"""

import json
import pickle
import shutil
from functools import reduce
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from teal_fast.families.config import model_args
from teal_fast.files.checkpoint import CONFIG, read_config
from teal_fast.files.conversion import write_weights
from teal_fast.files.store import new_folder, read_json, short
from teal_fast.weights.formats import DTYPES

COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
NAMES = {
    "tok_embeddings": ("model.embed_tokens",),
    "layers.{}.attention_norm": ("model.layers.{}.input_layernorm",),
    "layers.{}.attention.wqkv": tuple(f"model.layers.{{}}.self_attn.{part}_proj" for part in "qkv"),
    "layers.{}.attention.q_norm": ("model.layers.{}.self_attn.q_norm",),
    "layers.{}.attention.k_norm": ("model.layers.{}.self_attn.k_norm",),
    "layers.{}.attention.wo": ("model.layers.{}.self_attn.o_proj",),
    "layers.{}.ffn_norm": ("model.layers.{}.post_attention_layernorm",),
    "layers.{}.feed_forward.w13": ("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"),
    "layers.{}.feed_forward.w2": ("model.layers.{}.mlp.down_proj",),
    "norm": ("model.norm",),
    "output": ("lm_head",),
}


def find_shards(folder: Path) -> list[Path]:
    """The folder's weight files: those its index names, or the single one; safetensors before .bin."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if index.is_file():
            try:
                names = sorted(set(read_json(index)["weight_map"].values()))
                return [folder / Path(name).name for name in names]  # a shard lies in the folder, never elsewhere
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise ValueError(f"{index} is not a weight index ({error!r}): download the model again") from error
        if (folder / single).is_file():
            return [folder / single]
    raise FileNotFoundError(f"{folder} has no model.safetensors or pytorch_model.bin, with or without an index")


def open_shard(path: Path) -> dict[str, Tensor]:
    """The tensors of a weight file by name, memory-mapped: their pages are read when they are."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, though the index names it: download the model again")
    if path.suffix == ".bin":
        return _open_pickle(path)
    try:
        file = safe_open(path, framework="pt")
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}): download it again") from error


def _open_pickle(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {str(name): tensor.detach() for name, tensor in loaded.items()}
    except pickle.UnpicklingError as error:
        reason = str(error)[:200]
        raise ValueError(f"{path} is refused: it holds more than tensors, or is corrupt ({reason})") from error
    except Exception as error:  # a corrupt pickle raises almost anything
        raise ValueError(f"{path} is truncated or not a PyTorch file ({error}): download it again") from error


def convert_huggingface(source: Path, out: Path, dtype: torch.dtype | None) -> None:
    """Writes the checkpoint folder `out`, whole or not at all; `dtype` None keeps the widest of the source's."""
    config = read_config(source)
    args = model_args(config)
    tensors: dict[str, Tensor] = {}
    for shard in find_shards(source):
        tensors |= open_shard(shard)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            found = f"{short(name)} in {tensor.dtype}"
            raise ValueError(f"{source} holds {found}, expected {', '.join(DTYPES)}: dequantize the model first")
    stored = {tensor.dtype for tensor in tensors.values() if tensor.ndim == 2}
    dtype = dtype or reduce(torch.promote_types, stored, torch.bool)  # bool is narrower than any
    with new_folder(out) as folder:
        for name in COPIED:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_weights(folder, args, NAMES, shapes, tensors.__getitem__, dtype)
