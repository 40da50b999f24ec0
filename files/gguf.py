"""GGUF files of llama.cpp, and their conversion into checkpoint folders of ours.

The metadata become a config.json, the vocabulary tokenizer files (gguf_tokenizer.py), and quantized weights are
dequantized. What llama.cpp does to weights when it makes a GGUF, such as the row order of q and k, is undone. Files in
several parts and rotary scaling other than linear are refused.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from teal_fast.families.config import model_args
from teal_fast.files.checkpoint import CONFIG
from teal_fast.files.conversion import check_opens, write_weights
from teal_fast.files.gguf_tokenizer import write_tokenizer
from teal_fast.files.store import check_new, new_folder

NAMES = {
    "tok_embeddings": ("token_embd",),
    "layers.{}.attention_norm": ("blk.{}.attn_norm",),
    "layers.{}.attention.wqkv": ("blk.{}.attn_q", "blk.{}.attn_k", "blk.{}.attn_v"),
    "layers.{}.attention.q_norm": ("blk.{}.attn_q_norm",),
    "layers.{}.attention.k_norm": ("blk.{}.attn_k_norm",),
    "layers.{}.attention.wo": ("blk.{}.attn_output",),
    "layers.{}.ffn_norm": ("blk.{}.ffn_norm",),
    "layers.{}.feed_forward.w13": ("blk.{}.ffn_gate", "blk.{}.ffn_up"),
    "layers.{}.feed_forward.w2": ("blk.{}.ffn_down",),
    "norm": ("output_norm",),
    "output": ("output",),
}
ROPE_FACTORS = "rope_freqs.weight"
VALUES_AT_ONCE = 2**22  # dequantized at a time: 16 MB of fp32, where an embedding table may take gigabytes


def open_gguf(path: Path) -> gguf.GGUFReader:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: expected a GGUF file")
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError, TypeError) as error:
        raise ValueError(f"{path} is truncated or not a GGUF file ({error}): download it again") from error


def find_value(reader: gguf.GGUFReader, key: str, kind: type, default: Any = None) -> Any:
    """The metadata at `key`. Raises ValueError when it is missing without a default, or not of type `kind`."""
    field = reader.get_field(key)
    found = default if field is None else field.contents()
    if found is None:
        raise ValueError(f"the GGUF metadata lacks {key}: cannot tell the model's shape")
    if not isinstance(found, kind):
        raise ValueError(f"the GGUF metadata has {key} {str(found)[:80]!r}, expected {kind.__name__}")
    return found


def to_config(reader: gguf.GGUFReader) -> dict[str, Any]:
    """The Hugging Face config.json that describes the same model. Raises ValueError naming a missing or bad key."""
    if (parts := find_value(reader, "split.count", int, 1)) > 1:
        raise ValueError(f"the GGUF file is one of {parts} parts: join them with llama.cpp's llama-gguf-split --merge")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    architecture = find_value(reader, "general.architecture", str)
    value = partial(find_value, reader)
    dim = value(f"{architecture}.embedding_length", int)
    heads = value(f"{architecture}.attention.head_count", int)
    head_dim = value(f"{architecture}.attention.key_length", int, dim // max(heads, 1))
    if (rotated := value(f"{architecture}.rope.dimension_count", int, head_dim)) != head_dim:
        raise ValueError(f"the GGUF metadata rotates {rotated} of {head_dim} dimensions, expected all of them")
    config = {
        "model_type": architecture,
        "hidden_size": dim,
        "num_hidden_layers": value(f"{architecture}.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": value(f"{architecture}.attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "intermediate_size": value(f"{architecture}.feed_forward_length", int),
        "vocab_size": len(value("tokenizer.ggml.tokens", list)),
        "max_position_embeddings": value(f"{architecture}.context_length", int),
        "rms_norm_eps": value(f"{architecture}.attention.layer_norm_rms_epsilon", float),
        "rope_theta": value(f"{architecture}.rope.freq_base", float, 10000.0),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in tensors,
    }
    if (eos := reader.get_field("tokenizer.ggml.eos_token_id")) is not None:
        config["eos_token_id"] = eos.contents()
    if scaling := rope_scaling(reader, architecture, tensors.get(ROPE_FACTORS)):
        config["rope_scaling"] = scaling
    return config


def rope_scaling(
    reader: gguf.GGUFReader, architecture: str, divisors: gguf.ReaderTensor | None
) -> dict[str, Any] | None:
    """As llama.cpp reads it: linear where no type is given, by 1 where no factor is, on top of the file's divisors."""
    kind = find_value(reader, f"{architecture}.rope.scaling.type", str, "linear")
    if kind not in ("none", "linear"):
        raise ValueError(f"the GGUF metadata has rope scaling of type {kind}, expected linear or none")
    former = find_value(reader, f"{architecture}.rope.scale_linear", float, 1.0)
    factor = find_value(reader, f"{architecture}.rope.scaling.factor", float, former)
    factor = 1.0 if kind == "none" or factor == 0 else factor
    if divisors is not None:  # Llama 3.1 and later
        return {"rope_type": "factors", "factors": (dequantize(divisors, torch.float32) * factor).tolist()}
    return None if factor == 1 else {"rope_type": "linear", "factor": factor}


def dequantize(tensor: gguf.ReaderTensor, dtype: torch.dtype) -> Tensor:
    """The tensor's values in PyTorch's order of dimensions, a few rows at a time so that fp32 takes little memory."""
    weight = torch.empty([int(size) for size in reversed(tensor.shape)], dtype=dtype)
    stored, rows = np.atleast_2d(tensor.data), torch.atleast_2d(weight)
    step = max(VALUES_AT_ONCE // rows[0].numel(), 1)
    for first in range(0, len(rows), step):
        try:
            values = gguf.quants.dequantize(stored[first : first + step], tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(f"{tensor.name}: the gguf package cannot read type {tensor.tensor_type.name}") from error
        rows[first : first + step] = torch.from_numpy(np.array(values, dtype=np.float32))
    return weight


def half_split(weight: Tensor, heads: int) -> Tensor:
    """Undoes llama.cpp's row order of q and k (interleaved rotary pairs) for rows [heads x head_dim, …]."""
    rows = weight.view(heads, -1, 2, *weight.shape[1:])
    return rows.transpose(1, 2).reshape(weight.shape)


def convert_gguf(source: Path, out: Path, dtype: torch.dtype) -> None:
    """Writes the checkpoint folder `out`, whole or not at all; at the end it is opened, see `check_opens`."""
    check_new(out)
    reader = open_gguf(source)
    config = to_config(reader)
    args = model_args(config)
    tensors = {tensor.name: tensor for tensor in reader.tensors if tensor.name != ROPE_FACTORS}
    # GGUF lists the fastest-varying dimension first.
    shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in tensors.items()}

    def read(name: str) -> Tensor:
        weight = dequantize(tensors[name], dtype)
        if args.architecture == "llama" and ".attn_q." in name:
            return half_split(weight, args.n_heads)
        if args.architecture == "llama" and ".attn_k." in name:
            return half_split(weight, args.n_kv_heads)
        return weight

    with new_folder(out) as folder:
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_tokenizer(reader, folder)
        del reader  # its metadata, an object for each token, is larger than some models
        write_weights(folder, args, NAMES, shapes, read, dtype)
        tensors.clear()  # the source's pages need not be in memory beside the copy's
        check_opens(folder)
