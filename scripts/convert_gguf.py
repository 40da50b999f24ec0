"""Converts a GGUF file (llama.cpp) into a checkpoint folder, dequantizing whatever type its tensors have.

    python -m scripts.convert_gguf model.Q4_K_M.gguf --out checkpoints/model

The dequantized values are the model from here on: they are not the ones its authors published.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from checkpoint import CONFIG, DTYPES, ROOT, new_folder, write_weights
from cli import run
from model import ModelArgs
from scripts.gguf_tokenizer import write_tokenizer

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


def open_gguf(path: Path) -> gguf.GGUFReader:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: expected a GGUF file")
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is truncated or not a GGUF file ({error}): download it again") from error


def to_config(reader: gguf.GGUFReader) -> dict[str, Any]:
    """The Hugging Face config.json that describes the same model. Raises ValueError naming a missing key."""

    def value(key: str, default: Any = None) -> Any:
        field = reader.get_field(key)
        if field is not None:
            return field.contents()
        if default is None:
            raise ValueError(f"the GGUF metadata lacks {key}: cannot tell the model's shape")
        return default

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    architecture = value("general.architecture")
    dim = value(f"{architecture}.embedding_length")
    heads = value(f"{architecture}.attention.head_count")
    config = {
        "model_type": architecture,
        "hidden_size": dim,
        "num_hidden_layers": value(f"{architecture}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": value(f"{architecture}.attention.head_count_kv", heads),
        "head_dim": value(f"{architecture}.attention.key_length", dim // heads),
        "intermediate_size": value(f"{architecture}.feed_forward_length"),
        "vocab_size": len(value("tokenizer.ggml.tokens")),
        "max_position_embeddings": value(f"{architecture}.context_length"),
        "rms_norm_eps": value(f"{architecture}.attention.layer_norm_rms_epsilon"),
        "rope_theta": value(f"{architecture}.rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in tensors,
    }
    if (eos := reader.get_field("tokenizer.ggml.eos_token_id")) is not None:
        config["eos_token_id"] = eos.contents()
    scaling = value(f"{architecture}.rope.scaling.type", "none")
    if ROPE_FACTORS in tensors:  # Llama 3.1 and later: the divisors that its rope scaling comes to
        factors = tensors[ROPE_FACTORS].data.astype(np.float32).tolist()
        config["rope_scaling"] = {"rope_type": "factors", "factors": factors}
    elif scaling != "none":
        factor = value(f"{architecture}.rope.scaling.factor")
        config["rope_scaling"] = {"rope_type": scaling, "factor": factor}
    return config


def half_split(weight: Tensor, heads: int) -> Tensor:
    """Undoes llama.cpp's row order of q and k (interleaved rotary pairs) for rows [heads x head_dim, …]."""
    rows = weight.view(heads, -1, 2, *weight.shape[1:])
    return rows.transpose(1, 2).reshape(weight.shape)


def convert(source: Path, out: Path, dtype: torch.dtype) -> None:
    """Writes the checkpoint folder `out`, whole or not at all."""
    reader = open_gguf(source)
    config = to_config(reader)
    args = ModelArgs.from_config(config)
    tensors = {tensor.name: tensor for tensor in reader.tensors if tensor.name != ROPE_FACTORS}
    # GGUF lists the fastest-varying dimension first.
    shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in tensors.items()}

    def read(name: str) -> Tensor:
        tensor = tensors[name]
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(f"{name}: the gguf package cannot read type {tensor.tensor_type.name}") from error
        weight = torch.from_numpy(np.array(values, dtype=np.float32)).view(shapes[name])
        if args.architecture == "llama" and ".attn_q." in name:
            return half_split(weight, args.n_heads)
        if args.architecture == "llama" and ".attn_k." in name:
            return half_split(weight, args.n_kv_heads)
        return weight

    with new_folder(out) as folder:
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_tokenizer(reader, folder)
        write_weights(folder, args, NAMES, shapes, read, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a .gguf file")
    parser.add_argument("--out", type=Path, help="folder to make (default: checkpoints/<name of the file>)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="stored type (default: %(default)s)")
    options = parser.parse_args()
    out = options.out or ROOT / "checkpoints" / options.source.stem
    convert(options.source, out, DTYPES[options.dtype])
    print(f"wrote {out}\nnext: python calibrate.py --checkpoint {out}")


if __name__ == "__main__":
    run(main)
