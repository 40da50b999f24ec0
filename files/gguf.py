"""GGUF files of llama.cpp, and their conversion into checkpoint folders of ours.

The metadata become a config.json, the vocabulary tokenizer files (gguf_tokenizer.py). Quantized weights are kept as
they are (gguf_kept.py) or dequantized. What llama.cpp does to weights when it makes a GGUF, such as the row order of q
and k, is undone. Files in several parts and rotary scaling other than linear are refused, and so are files of older
converters that left out what the model needs, unless it is given.
"""

import json
import warnings
from functools import cache, partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from teal_fast.families.config import model_args
from teal_fast.files.checkpoint import CONFIG
from teal_fast.files.conversion import check_opens, write_weights
from teal_fast.files.gguf_kept import FLOATS, Source, write_kept
from teal_fast.files.gguf_tokenizer import write_tokenizer
from teal_fast.files.pre_tokenizers import well_known
from teal_fast.files.store import check_new, new_folder, one_line, short

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
# Llama 3.1 and later on top of rope_theta 500000, in config.json's words. Two models of Llama 3.2 have a factor of 32.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA32_SIZES = ((2048, 16), (3072, 28))  # dim and layers of 1B and 3B
LLAMA3_BOS, CODE_LLAMA_TOKEN = "<|begin_of_text|>", "▁<PRE>"  # tell these vocabularies from all others
ROPE_SCALINGS = ("llama3", "none")  # what may be given where the file says nothing
# By id: what files hold that llama.cpp reads no longer (ggml/include/ggml.h).
REMOVED_TYPES = {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8"}
REMOVED_TYPES |= {36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8"}
FIXED_KEYS = {"attention.causal": True, "rope.scaling.attn_factor": 1.0}  # what llama.cpp reads for every model
TOKENS = "tokenizer.ggml.tokens"
VALUES_AT_ONCE = 2**22  # dequantized at a time: 16 MB of fp32, where an embedding table may take gigabytes


class UnreadableTypeError(ValueError):
    """A tensor is stored in a type that the gguf package cannot dequantize."""


class Reader(gguf.GGUFReader):
    """Refuses what gguf.GGUFReader 0.19 takes or never finishes, and llama.cpp's gguf.cpp refuses.

    That is a list or value that is longer than the file, lists within lists, tensors elsewhere than behind one another,
    and, by the tensor's name, types that cannot be dequantized.
    """

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
        found = super()._get(offset, dtype, count, override_order)
        if len(found) < count:
            raise ValueError(f"it ends at byte {len(self.data)}, within what begins at {offset}")
        return found

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple:
        if raw_type == gguf.GGUFValueType.ARRAY:
            kind, count = int(self._get(orig_offs, np.uint32)[0]), int(self._get(orig_offs + 4, np.uint64)[0])
            if kind == gguf.GGUFValueType.ARRAY:
                raise ValueError("it has lists within lists")
            self._get(orig_offs, np.uint8, count)  # an entry has at least a byte
        return super()._get_field_parts(orig_offs, raw_type)

    def _build_tensors(self, start_offs: int, fields: list[gguf.ReaderField]) -> None:
        for field in fields:
            _, name, _, _, kind, _ = field.parts
            if problem := type_problem(int(kind[0])):
                name = short(bytes(name).decode("utf-8", "replace"))
                raise UnreadableTypeError(f"tensor {name} is of type {problem}: take a file in another quantization")
        super()._build_tensors(start_offs, fields)
        place = start_offs
        for tensor in self.tensors:
            if tensor.data_offset != place:
                raise ValueError(f"tensor {short(tensor.name)} lies at byte {tensor.data_offset}, expected {place}")
            place += -(-tensor.n_bytes // self.alignment) * self.alignment


@cache
def type_problem(kind: int) -> str | None:
    """Names a tensor type that cannot be dequantized and says why; None for one that can."""
    if kind not in iter(gguf.GGMLQuantizationType):
        known = f"{REMOVED_TYPES[kind]}, which llama.cpp has dropped" if kind in REMOVED_TYPES else "unknown here"
        return f"{kind} ({known})"
    kind = gguf.GGMLQuantizationType(kind)
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except NotImplementedError:
        return f"{kind} ({kind.name}), which the gguf package cannot dequantize"
    return None


def open_gguf(path: Path) -> gguf.GGUFReader:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: expected a GGUF file")
    try:
        return Reader(path)
    except UnreadableTypeError as error:
        raise ValueError(f"{path}: {error}") from None
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError, TypeError) as error:
        raise ValueError(f"{path} is truncated or not a GGUF file ({one_line(error)}): download it again") from error


def find_value(reader: gguf.GGUFReader, key: str, kind: type, default: Any = None) -> Any:
    """The metadata at `key`. Raises ValueError when it is missing without a default, or not of type `kind`."""
    field = reader.get_field(key)
    found = default if field is None else field.contents()
    if found is None:
        raise ValueError(f"the GGUF metadata lacks {key[:80]}: cannot tell the model's shape")
    if not isinstance(found, kind):
        raise ValueError(f"the GGUF metadata has {key[:80]} {str(found)[:80]!r}, expected {kind.__name__}")
    return found


def to_config(
    reader: gguf.GGUFReader, rope_scaling: str | None = None, rope_theta: float | None = None
) -> dict[str, Any]:
    """The Hugging Face config.json that describes the same model. Raises ValueError naming a missing or bad key.

    `rope_scaling`, one of ROPE_SCALINGS, and `rope_theta` count instead of what the file says or leaves out.
    """
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    architecture = find_value(reader, "general.architecture", str)
    check_supported(reader, architecture)
    value = partial(find_value, reader)
    vocab_size = len(value(TOKENS, list))
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
        "vocab_size": vocab_size,
        "max_position_embeddings": value(f"{architecture}.context_length", int),
        "rms_norm_eps": value(f"{architecture}.attention.layer_norm_rms_epsilon", float),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in tensors,
    }
    if 0 <= (eos := value("tokenizer.ggml.eos_token_id", int, -1)) < vocab_size:
        config["eos_token_id"] = eos
    config["rope_theta"] = find_theta(reader, architecture) if rope_theta is None else rope_theta
    scaling = find_scaling(reader, config, tensors.get(ROPE_FACTORS), rope_scaling)
    return config | ({"rope_scaling": scaling} if scaling else {})


def check_supported(reader: gguf.GGUFReader, architecture: str) -> None:
    if (parts := find_value(reader, "split.count", int, 1)) > 1:
        raise ValueError(f"the GGUF file is one of {parts} parts: join them with llama.cpp's llama-gguf-split --merge")
    for key, fixed in FIXED_KEYS.items():
        if (found := find_value(reader, f"{architecture}.{key}", type(fixed), fixed)) != fixed:
            raise ValueError(f"the GGUF metadata has {architecture}.{key} {found}, expected {fixed}")


def find_theta(reader: gguf.GGUFReader, architecture: str) -> float:
    """The base of the rotary frequencies: llama.cpp's default is Llama 1's and 2's, later models state theirs."""
    key = f"{architecture}.rope.freq_base"
    early = find_value(reader, "tokenizer.ggml.model", str) == "llama"
    if reader.get_field(key) is None and not (early and CODE_LLAMA_TOKEN not in find_value(reader, TOKENS, list)):
        raise ValueError(f"the GGUF metadata lacks {key}: give rope_theta of the model's config.json as --rope_theta")
    return find_value(reader, key, float, 10000.0)


def find_scaling(
    reader: gguf.GGUFReader, config: dict[str, Any], divisors: gguf.ReaderTensor | None, given: str | None
) -> dict[str, Any] | None:
    """config.json's rope_scaling. Raises ValueError where an older converter must have left it out."""
    if given == "llama3":
        factor = 32.0 if (config["hidden_size"], config["num_hidden_layers"]) in LLAMA32_SIZES else 8.0
        return {"rope_type": "llama3", "factor": factor, **LLAMA3_ROPE}
    found = stated_scaling(reader, config["model_type"], divisors) if given is None else None
    long = config["rope_theta"] == 500000 and config["max_position_embeddings"] > 8192
    if found is None and given is None and long and is_llama3(find_value(reader, TOKENS, list)):
        raise ValueError(
            f"the GGUF file has no {ROPE_FACTORS}, which Llama 3.1 and later need and its converter left out: give "
            "--rope_scaling llama3, or --rope_scaling none for a model that was trained without"
        )
    return found


def is_llama3(tokens: list[str]) -> bool:
    """By name of BOS, or by the tokens that text becomes: fine-tunes rename the one, and some cut the other down."""
    return LLAMA3_BOS in tokens or well_known(tokens) == "llama-bpe"


def stated_scaling(
    reader: gguf.GGUFReader, architecture: str, divisors: gguf.ReaderTensor | None
) -> dict[str, Any] | None:
    """As llama.cpp reads it: linear where no type is given, by 1 where no factor is, on top of the file's divisors."""
    kind = find_value(reader, f"{architecture}.rope.scaling.type", str, "linear")
    if kind not in ("none", "linear"):
        raise ValueError(f"the GGUF metadata has rope scaling of type {kind[:80]}, expected linear or none")
    former = find_value(reader, f"{architecture}.rope.scale_linear", float, 1.0)
    factor = find_value(reader, f"{architecture}.rope.scaling.factor", float, former)
    factor = 1.0 if kind == "none" or factor == 0 else factor
    if divisors is not None:  # Llama 3.1 and later
        return {"rope_type": "factors", "factors": (dequantize(divisors, torch.float32) * factor).tolist()}
    return None if factor == 1 else {"rope_type": "linear", "factor": factor}


def file_type(reader: gguf.GGUFReader) -> str:
    """What the file calls its mixture of tensor types, as Q4_K_M."""
    return file_type_name(find_value(reader, "general.file_type", int, -1))


def file_type_name(number: int) -> str:
    """The name of a mixture of tensor types."""
    known = {kind.value: kind.name.removeprefix("MOSTLY_") for kind in gguf.LlamaFileType}
    return known.get(number, "gguf")


def dequantize(tensor: gguf.ReaderTensor, dtype: torch.dtype) -> Tensor:
    """The tensor's values in PyTorch's order of dimensions, a few rows at a time so that fp32 takes little memory."""
    weight = torch.empty([int(size) for size in reversed(tensor.shape)], dtype=dtype)
    stored, rows = np.atleast_2d(tensor.data), torch.atleast_2d(weight)
    step = max(VALUES_AT_ONCE // rows[0].numel(), 1)
    for first in range(0, len(rows), step):
        values = gguf.quants.dequantize(stored[first : first + step], tensor.tensor_type)
        rows[first : first + step] = torch.from_numpy(np.array(values, dtype=np.float32))
    return weight


def half_split(weight: Tensor, heads: int) -> Tensor:
    """Undoes llama.cpp's row order of q and k (interleaved rotary pairs) for rows [heads x head_dim, …]."""
    rows = weight.view(heads, -1, 2, *weight.shape[1:])
    return rows.transpose(1, 2).reshape(weight.shape)


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
    tensors = {tensor.name: tensor for tensor in reader.tensors if tensor.name != ROPE_FACTORS}
    # GGUF lists the fastest-varying dimension first.
    shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in tensors.items()}

    def in_order(name: str, rows: Tensor) -> Tensor:
        heads = {"attn_q": args.n_heads, "attn_k": args.n_kv_heads}.get(name.split(".")[-2])
        return half_split(rows, heads) if heads and args.architecture == "llama" else rows

    def read(name: str, dtype: torch.dtype = dtype) -> Tensor:
        return in_order(name, dequantize(tensors[name], dtype))

    def read_stored(name: str) -> Tensor:
        with warnings.catch_warnings(action="ignore"):  # that it can't be written to: nobody does
            return in_order(name, torch.from_numpy(tensors[name].data))

    with new_folder(out) as folder:
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_tokenizer(reader, folder, pre)
        del reader  # its metadata, an object for each token, is larger than some models
        quantized = any(tensor.tensor_type.name not in FLOATS for tensor in tensors.values())
        if keep and quantized:
            kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
            write_kept(folder, args, NAMES, Source(kinds, shapes, read, read_stored), types, dtype)
        else:
            metadata = {"rounded_to": types} if quantized else {}
            write_weights(folder, args, NAMES, shapes, read, dtype, metadata)
        tensors.clear()  # the source's pages need not be in memory beside the copy's
        check_opens(folder)
