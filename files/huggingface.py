"""Hugging Face model folders, and their conversion into checkpoint folders of ours.

Weights are read from safetensors or, without running any code in them, from PyTorch's pickles, in one file or several.
The tokenizer's files are copied as they are. Quantized models are refused: their formats are not ours.
"""

import json
import pickle
import shutil
import sys
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from teal_fast.families.config import INSTEAD, is_teal, model_args
from teal_fast.families.table import WRAPPERS
from teal_fast.families.tensors import Tensors, inner_name
from teal_fast.files.calibration import CALIBRATION, Calibration
from teal_fast.files.checkpoint import CONFIG, read_config, rounded_to
from teal_fast.files.conversion import check_opens, write_weights
from teal_fast.files.exported import TealConfig
from teal_fast.files.store import check_new, new_folder, one_line, read_json, short
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
LLAMA3_DIGITS = r"\\p{N}{1,3}"  # in JSON, of its pattern; Tekken takes digits one by one
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
QUANTIZED_NAMES = {  # how names of a quantized layer's tensors end, and by what, the surest first
    ".g_idx": "GPTQ",
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".SCB": "bitsandbytes",
    ".absmax": "bitsandbytes",
    ".weight_scale_inv": "FP8",
    ".weight_scale": "FP8 or compressed-tensors",
    ".scales": "MLX",
}


def find_shards(folder: Path) -> list[Path]:
    """The folder's weight files: a single one or those that an index names; safetensors before .bin.

    This is the order of transformers 5.23 (_get_resolved_checkpoint_files). Other than there, an index is passed over,
    with a line that says so, when files that it names are missing and other weights are there.
    """
    lacking = []
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (folder / single).is_file():
            found = [folder / single]
        elif (folder / f"{single}.index.json").is_file():
            found = _read_index(folder / f"{single}.index.json")
        else:
            continue
        if not (missing := [path for path in found if not path.is_file()]):
            if lacking:
                print(f"{lacking[0]}: reading {found[0].name} instead", file=sys.stderr)
            return found
        lacking.append(f"{missing[0]} is missing, though the index names it ({len(missing)} of {len(found)} such)")
    if lacking:
        raise FileNotFoundError(f"{lacking[0]}: download the model again")
    raise FileNotFoundError(f"{folder} has no model.safetensors or pytorch_model.bin, with or without an index")


def _read_index(index: Path) -> list[Path]:
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        if not names:
            raise ValueError("it names no file")
        if long := [name for name in names if len(name) > 255]:  # no file system takes it
            raise ValueError(f"it names {short(long[0])}")
        return [index.with_name(Path(name).name) for name in names]  # a shard lies in the folder, never elsewhere
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} is not a weight index ({error!r}): download the model again") from error


def open_shard(path: Path) -> dict[str, Tensor]:
    """The tensors of a weight file by name, memory-mapped: their pages are read when they are."""
    if path.suffix == ".bin":
        return _open_pickle(path)
    try:
        file = safe_open(path, framework="pt")
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or not a safetensors file ({one_line(error)}): download it again"
        ) from error


def _open_pickle(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {str(name): tensor.detach() for name, tensor in loaded.items()}
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is refused: it holds more than tensors, or is corrupt ({one_line(error)})") from error
    except Exception as error:  # a corrupt pickle raises almost anything
        raise ValueError(f"{path} is truncated or not a PyTorch file ({one_line(error)}): download it again") from error


def convert_huggingface(source: Path, out: Path, dtype: torch.dtype | None) -> None:
    """Writes the checkpoint folder `out`, whole or not at all; `dtype` None keeps the widest of the source's.

    At the end it is opened as later commands will open it. That reads all weights once: see `check_opens`.
    """
    check_new(out)
    config = read_config(source)
    block = config.pop("quantization_config") if is_teal(config.get("quantization_config")) else None
    args = model_args(config)
    if not any((source / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise FileNotFoundError(f"{source} has no tokenizer.json or tokenizer.model: copy them from the original model")
    tensors: dict[str, Tensor] = {}
    shards = find_shards(source)
    for shard in shards:
        tensors |= open_shard(shard)
    about = rounded_to(shards[0]) if block is not None and shards[0].suffix == ".safetensors" else {}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    warn_of_pattern(source, config["model_type"])
    if config["model_type"] in WRAPPERS:
        tensors = only_text(source, tensors)
    check_floats(source, tensors)
    stored = {tensor.dtype for tensor in tensors.values() if tensor.ndim == 2}
    dtype = dtype or reduce(torch.promote_types, stored, torch.bool)  # bool is narrower than any
    if args.tie_embeddings and not tie(tensors, dtype):
        print(f"{source}: config.json ties {HEAD} to {EMBEDDINGS}, but they differ: not tied", file=sys.stderr)
        config["tie_word_embeddings"], args = False, replace(args, tie_embeddings=False)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    with new_folder(out) as folder:
        for name in COPIED:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        theirs = Tensors(config, args)
        write_weights(folder, args, theirs.names, shapes, lambda name: theirs.adapt(name, tensors[name]), dtype, about)
        tensors.clear()  # the source's pages need not be in memory beside the copy's
        check_opens(folder)
        if block is not None:
            take_calibration(source, folder, block)


def take_calibration(source: Path, folder: Path, block: dict[str, Any]) -> None:
    """Copies the calibration of an exported folder into the checkpoint's; says so where it is another model's."""
    try:
        given = source / TealConfig.from_dict(block).calibration
        Calibration.load(given).check(folder)
        shutil.copyfile(given, folder / CALIBRATION)
    except (ValueError, FileNotFoundError) as error:
        print(f"{source}: its calibration is left out: {error}", file=sys.stderr)


def warn_of_pattern(source: Path, model_type: str) -> None:
    """Says so where a Mistral's tokenizer.json splits text as Llama 3's does, which its model never saw.

    transformers 5.23 warns alike, and corrects it on demand (fix_mistral_regex), but by the folder's version, not by
    the pattern.
    """
    if model_type in ("mistral", "ministral3", "mistral3") and (source / "tokenizer.json").is_file():
        splitting = json.dumps(read_json(source / "tokenizer.json").get("pre_tokenizer"))
        if LLAMA3_DIGITS in splitting:
            print(
                f"{source}: tokenizer.json splits text as Llama 3's does, not as Mistral's own tokenizer: many ids "
                "will be others than the model learned; take the pattern of a newer upload",
                file=sys.stderr,
            )


def only_text(source: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model with a vision tower that its text needs, under a text model's names; says so."""
    inner = {inner_name(name): tensor for name, tensor in tensors.items()}
    if inner.pop(None, None) is not None:
        print(f"{source}: its vision tower is left out, text alone is served", file=sys.stderr)
    return inner


def check_floats(source: Path, tensors: dict[str, Tensor]) -> None:
    """Raises ValueError unless all tensors are floats; of quantized ones their names tell what quantized them."""
    other = next((name for name, tensor in tensors.items() if tensor.dtype not in DTYPES.values()), None)
    if other is not None:
        dtype = str(tensors[other].dtype)
        signs = [method for end, method in QUANTIZED_NAMES.items() if any(name.endswith(end) for name in tensors)]
        method = next(iter(signs), "something" if any(kind in dtype for kind in ("int", "float8", "float4")) else None)
        todo = f"it seems that {method} quantized them; {INSTEAD}" if method else "store the weights in one of these"
        raise ValueError(f"{source} holds {short(other)} in {dtype}, expected {', '.join(DTYPES)}: {todo}")


def tie(tensors: dict[str, Tensor], dtype: torch.dtype) -> bool:
    """Leaves the tensors that a tied model has; False where embeddings and output differ, so that it is not tied.

    So transformers 5.23 (PreTrainedModel.tie_weights) takes them: where one is missing, the other stands for both.
    """
    if HEAD in tensors and EMBEDDINGS in tensors:
        if not torch.equal(tensors[HEAD].to(dtype), tensors[EMBEDDINGS].to(dtype)):
            return False
        del tensors[HEAD]
    elif HEAD in tensors:
        tensors[EMBEDDINGS] = tensors.pop(HEAD)
    return True
