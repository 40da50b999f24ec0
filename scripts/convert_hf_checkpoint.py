"""Converts a Hugging Face model folder (safetensors or .bin, sharded or not) into a checkpoint folder.

    python -m scripts.convert_hf_checkpoint checkpoints/hf/HuggingFaceTB--SmolLM2-135M

Shards are memory-mapped and each tensor of the result is written as soon as it is built: memory holds the pages that
are being read and one tensor. `.bin` files are pickles and are read with weights_only=True, which runs no code.
"""

import argparse
import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoint import CONFIG, DTYPES, ROOT, new_folder, read_config, write_weights
from cli import run
from model import ModelArgs

COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
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
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise ValueError(f"{index} is not a weight index ({error!r}): download the model again") from error
            return [folder / Path(name).name for name in names]
        if (folder / single).is_file():
            return [folder / single]
    raise FileNotFoundError(f"{folder} has no model.safetensors or pytorch_model.bin, with or without an index")


def open_shard(path: Path) -> tuple[dict[str, tuple[int, ...]], Callable[[str], Tensor], torch.dtype]:
    """Shapes by tensor name, a function that fetches a tensor, and the dtype of a shard's first matrix."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, though the index names it: download the model again")
    if path.suffix == ".bin":
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{path} is refused: it holds more than tensors, or is corrupt ({str(error)[:200]})"
            ) from error
        except (RuntimeError, ValueError, AttributeError, EOFError) as error:
            raise ValueError(f"{path} is truncated or not a PyTorch file ({error}): download it again") from error
        return shapes, tensors.__getitem__, next(t.dtype for t in tensors.values() if t.ndim == 2)
    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}): download it again") from error
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a dict)
    matrix = next(name for name, shape in shapes.items() if len(shape) == 2)
    return shapes, file.get_tensor, file.get_slice(matrix)[:1].dtype


def convert(source: Path, out: Path, dtype: torch.dtype | None) -> None:
    """Writes the checkpoint folder `out`, whole or not at all; `dtype` None keeps the source's."""
    config = read_config(source)
    args = ModelArgs.from_config(config)
    shapes: dict[str, tuple[int, ...]] = {}
    readers: dict[str, Callable[[str], Tensor]] = {}
    for shard in find_shards(source):
        found, read, stored = open_shard(shard)
        found = {name: shape for name, shape in found.items() if not re.search(r"rotary_emb\.inv_freq$", name)}
        shapes |= found
        readers |= dict.fromkeys(found, read)
        dtype = dtype or stored
    if dtype not in DTYPES.values():
        raise ValueError(f"{source} holds {dtype} weights, expected {', '.join(DTYPES)}: dequantize the model first")
    with new_folder(out) as folder:
        for name in COPIED:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_weights(folder, args, NAMES, shapes, lambda name: readers[name](name), dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder with config.json, weights and tokenizer files")
    parser.add_argument("--out", type=Path, help="folder to make (default: checkpoints/<name of the source folder>)")
    parser.add_argument("--dtype", choices=DTYPES, help="type of the stored weights (default: the source's)")
    options = parser.parse_args()
    out = options.out or ROOT / "checkpoints" / options.source.resolve().name
    convert(options.source, out, DTYPES.get(options.dtype))
    print(f"wrote {out}\nnext: python calibrate.py --checkpoint {out}")


if __name__ == "__main__":
    run(main)
