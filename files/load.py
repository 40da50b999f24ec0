"""The one door through which a checkpoint's model.safetensors comes in.

Kernels take tensors by address and trust what they are told, so that a wrong type or shape would be misread silently or
end in a signal. Here the metadata and every tensor's name, type and shape are checked before any value is read. A layer
of another float type in a bf16 model, for example, is refused.

Values are checked as far as that costs next to nothing: norms, biases and scales always, all others in the pass that
copies them to a device or converts them (converting on a CPU takes 9 to 17 % longer for it). What stays memory-mapped
is not read here at all: to look for NaN in it takes longer than to load it. `thorough` does that, for those who read
every weight many times anyway. Files that this project writes were checked when they were written.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from teal_fast.families.config import model_args
from teal_fast.files.checkpoint import METADATA, WEIGHTS, read_config
from teal_fast.files.huge_pages import in_huge_pages
from teal_fast.files.memory import give_back_heap, memory_for
from teal_fast.files.store import SAFETENSORS_DTYPES, is_finite, one_line, open_safetensors, parse_json, short
from teal_fast.kernels.blocks import BLOCK_TYPES
from teal_fast.model import Linear, ModelArgs, Transformer
from teal_fast.sparse_model import KEEP_ALL, sparse_layers, sparsify
from teal_fast.weights.formats import DTYPES, EMBEDDINGS, FORMATS, BlockFormat, Format
from teal_fast.weights.quantized import Int4Weight
from teal_fast.weights.shards import Cut, Shard

# What a quantized weight is called after its layer's name, by the version of the file. A dense one is a "weight".
# Version 3 is of a GGUF file's own values: its layers are in parts, or dense.
PACKED = {"1": "weight", "2": "packed", "3": "weight"}
MOST_PARTS = 3  # of a layer: q, k and v
AGAIN = "convert or quantize the model again"


def stored_as(name: str, packed: str = "weight") -> str:
    """The name in model.safetensors of a parameter of the sparse model; `packed`: see PACKED."""
    if name == "output.weight":
        return f"output.{packed}"
    return name.replace(".weight.packed", f".{packed}").replace(".weight.scale", ".scale")


def in_blocks(name: str) -> bool:
    """Whether a parameter of the sparse model, by its name, is of a part in a GGUF block type."""
    return ".parts." in name


def keeps_type(name: str, parameter: Tensor) -> bool:
    """Whether a parameter has one type whatever is computed in: codes, and their scales."""
    return not parameter.is_floating_point() or name.endswith(".scale") or in_blocks(name)


def load_model(
    folder: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    thorough: bool = False,
    shard: Shard | None = None,
) -> Transformer:
    """The model of a checkpoint folder, its block linears sparse at sparsity 0; dtype None keeps the stored one.

    Quantized weights stay so; `dtype` is of what is computed, and of all else. A file with a GGUF file's values says
    itself what None stands for, since its norms are fp32. On the CPU tensors stay memory-mapped unless the type changes
    them. Raises ValueError on an unsound file; `thorough` also reads what would stay memory-mapped.

    shard: the part of the model to load (weights/shards.py), which is read slice by slice; sums over ranks are left to
    whoever asks for it. Raises ValueError where the model can't be cut so.
    """
    give_back_heap()  # what is read before, a vocabulary or a GGUF file's, need not be there beside the weights
    args, path = model_args(read_config(folder)), folder / WEIGHTS
    tensors: dict[str, Tensor] = {}
    lower = "take a quantized copy (quantize.py), a narrower type (--dtype bf16) or another --device"
    with memory_for(f"the weights of {folder} on {device}", lower), open_safetensors(path) as file:
        format, packed = read_format(folder, file.metadata() or {}, dtype)
        own_values = isinstance(format, BlockFormat)
        dtype = format.dtype if own_values else dtype
        model = empty_model(path, args, format)
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        found = {name: (part.get_dtype(), part.get_shape()) for name, part in parts.items()}
        names = {name: stored_as(name, packed) for name, _ in model.named_parameters()}
        check_layout(path, {names[name]: parameter for name, parameter in model.named_parameters()}, found, own_values)
        check_first_rows(path, model, packed, parts)
        whole = {name: parts[stored] for name, stored in names.items()}
        if shard is not None:
            cut = Cut(shard, args, format)
            cut.check()
            model = empty_model(path, cut.args, cut.part_format, len(cut.vocabulary))
        for name, _ in model.named_parameters():
            stored = whole[name][:] if shard is None else cut.read(name, whole)
            moved = stored.to(device)
            tensor = moved if keeps_type(name, stored) else moved.to(dtype)
            small = stored.ndim == 1 or in_blocks(name)
            if stored.is_floating_point() and (thorough or tensor is not stored or small):
                narrower = min(tensor, moved, key=Tensor.element_size)  # less to read; to narrow may give inf
                check_finite(path, stored_as(name, packed), narrower)
            tensors[name] = tensor.contiguous()
        if own_values and torch.device(device).type == "cpu":
            tensors |= in_huge_pages({name: tensor for name, tensor in tensors.items() if in_blocks(name)})
    model.load_state_dict(tensors, strict=False, assign=True)
    if isinstance(model.output, nn.Linear) and model.args.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight
    for name, layer in sparse_layers(model).items():
        layer.threshold = torch.full(layer.threshold.shape, KEEP_ALL, device=device)
        if layer.weight.format == "int4" and (thorough or layer.weight.packed.device.type != "cpu"):
            check_rows(path, stored_as(f"{name}.weight.packed", packed), layer.weight)
    return model.to(device).requires_grad_(False).eval()


def read_format(
    folder: Path, metadata: dict[str, str], dtype: torch.dtype | None = None
) -> tuple[Format | BlockFormat | None, str]:
    """The format of quantized weights, None of others, and what they are called; of a file that states it soundly.

    dtype: what is computed in, None for what the file says.
    """

    def refuse(key: str, expected: str, todo: str = AGAIN) -> ValueError:
        return ValueError(f"{folder / WEIGHTS}: {key} is {short(metadata.get(key))}, expected {expected}: {todo}")

    if metadata.get("format") != METADATA["format"]:
        todo = f"{folder} is not converted yet: run `python -m teal_fast.scripts.convert_hf_checkpoint {folder}`"
        raise refuse("format", repr(METADATA["format"]), todo)
    if (version := metadata.get("version")) not in PACKED:
        raise refuse("version", " or ".join(map(repr, PACKED)), f"{AGAIN}, or update teal-fast")
    if metadata.get("linear") != METADATA["linear"]:
        raise refuse("linear", repr(METADATA["linear"]))
    name, group = metadata.get("weights"), metadata.get("group")
    if (version == "3") != (name == "gguf"):
        raise refuse("version", "'3' where weights is 'gguf', and nowhere else")
    if name == "gguf":
        return read_parts(folder / WEIGHTS, metadata, dtype), PACKED[version]
    if name not in (None, *FORMATS):
        raise refuse("weights", f"{' or '.join(map(repr, FORMATS))}, or none at all")
    if name != "int4":
        return (Format(name), PACKED[version]) if name else (None, "weight")
    if version == "1" and metadata.get("row_scales") != "at most 1":  # a GPU's fixed point may not hold others
        raise refuse("row_scales", "'at most 1' in version 1")
    if not re.fullmatch(r"[1-9][0-9]{0,7}", group or ""):
        raise refuse("group", "the outputs that share a scale, a whole number")
    return Format(name, int(group)), PACKED[version]


def read_parts(path: Path, metadata: dict[str, str], dtype: torch.dtype | None) -> BlockFormat:
    """The format of a GGUF file's own values. Whether its parts fit the model shows when that is made of them."""
    name, stated = metadata.get("name", ""), metadata.get("dtype")
    if not re.fullmatch(r"[A-Za-z0-9_]{1,32}", name):
        raise ValueError(f"{path}: name is {short(name)}, expected that of a GGUF file's types: {AGAIN}")
    if stated not in DTYPES:
        raise ValueError(f"{path}: dtype is {short(stated)}, expected {' or '.join(DTYPES)}: {AGAIN}")
    found = parse_json(metadata.get("parts", "null"), f"{path}: parts", todo=AGAIN)
    for module, parts in found.items():
        sound = isinstance(parts, list) and 1 <= len(parts) <= (1 if module == EMBEDDINGS else MOST_PARTS)
        if not (sound and all(map(is_part, parts))):
            expected = "types with their outputs"
            raise ValueError(f"{path}: parts of {short(module)} are {short(parts)}, expected {expected}: {AGAIN}")
    return BlockFormat(name, {name: tuple(map(tuple, parts)) for name, parts in found.items()}, dtype or DTYPES[stated])


def is_part(found: Any) -> bool:
    """Whether this is a type and a number of outputs."""
    if not (isinstance(found, list) and [type(value) for value in found] == [str, int]):
        return False
    return found[0] in BLOCK_TYPES and found[1] > 0


def empty_model(
    path: Path, args: ModelArgs, format: Format | BlockFormat | None, vocabulary: int | None = None
) -> Transformer:
    """The sparse model, of parameters without values. vocabulary: how many logits it gives, by default all."""
    with torch.device("meta"):
        model = Transformer(args)
        if vocabulary is not None:
            model.output = Linear(args.dim, vocabulary, bias=False)
        try:
            sparsify(model, format)
            used = {name.split(".weight.parts.")[0] for name, _ in model.named_parameters() if in_blocks(name)}
            if isinstance(format, BlockFormat) and (extra := sorted(format.parts.keys() - used)):
                raise ValueError(f"{short(extra[0])} is no layer of it")
            return model
        except ValueError as error:
            key, value = list(format.metadata().items())[-1]
            value = one_line(value, 100, 60, 40)
            raise ValueError(f"{path}: {key} {value} does not fit its config.json ({error}): {AGAIN}") from error


def check_layout(
    path: Path, expected: dict[str, Tensor], found: dict[str, tuple[str, list[int]]], mixed: bool = False
) -> None:
    """Raises ValueError unless the file has just what is expected; found: type and shape by stored name.

    mixed: whether floats may be of several types, since they are converted to one.
    """
    if missing := [name for name in expected if name not in found]:
        raise ValueError(f"{path} lacks {missing[0]}, which its config.json calls for: {AGAIN}")
    if extra := sorted(found.keys() - expected.keys()):
        raise ValueError(f"{path} holds {short(extra[0])}, unknown to its config.json: {AGAIN}")
    fixed = {name for name in expected if keeps_type(name, expected[name])}
    floats = [SAFETENSORS_DTYPES[dtype] for dtype in DTYPES.values()]
    usual = Counter(found[name][0] for name in expected if name not in fixed).most_common(1)[0][0]
    for name, parameter in expected.items():
        dtype, shape = found[name]
        if name in fixed and dtype != SAFETENSORS_DTYPES[parameter.dtype]:
            raise ValueError(f"{path}: {name} is {dtype}, expected {SAFETENSORS_DTYPES[parameter.dtype]}: {AGAIN}")
        if name not in fixed and (dtype not in floats or (dtype != usual and not mixed)):
            types = f"{usual} as most others are" if usual in floats and not mixed else " or ".join(floats)
            raise ValueError(f"{path}: {name} is {dtype}, expected {types}: {AGAIN}")
        if list(shape) != list(parameter.shape):
            called_for = f"config.json calls for {list(parameter.shape)}"
            raise ValueError(f"{path}: {name} is {short(list(shape))}, {called_for}: {AGAIN}")


def check_finite(path: Path, name: str, tensor: Tensor) -> None:
    if not is_finite(tensor):
        reason = "NaN or inf, or values too large for the type asked for"
        raise ValueError(f"{path}: {name} holds {reason}: {AGAIN}, or choose another type")


def check_first_rows(path: Path, model: Transformer, packed: str, parts: dict[str, Any]) -> None:
    """Raises ValueError as `check_rows` does, of the first rows of int4 weights: others may stay memory-mapped."""
    for name, layer in sparse_layers(model).items():
        if layer.weight.format == "int4":
            stored_name = stored_as(f"{name}.weight.packed", packed)
            check_rows(path, stored_name, Int4Weight(parts[stored_name][:2], layer.weight.scale, layer.weight.group))


def check_rows(path: Path, name: str, weight: Int4Weight) -> None:
    """Raises ValueError unless the scales in the rows are sound and are as many as the group says."""
    scales, rest = weight.row_scales()
    check_finite(path, name, scales)
    if rest.any() or not scales.any(0).all():
        raise ValueError(f"{path}: {name} has rows of another group than {weight.group}: {AGAIN}")
    if scales.abs().max() > 1:  # a GPU's fixed point may not hold them
        raise ValueError(f"{path}: {name} has row scales beyond 1: {AGAIN}")
