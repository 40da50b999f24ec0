"""From another program's tensors to our model.safetensors: what the readers of all foreign formats share.

Linear layers of the blocks are stacked (q, k, v and gate, up) and transposed to [K, N]. Every source tensor's shape is
checked against its own part of the whole before anything is written, and what was written is opened before it gets its
name. What a format calls its tensors and how it reads them is in huggingface.py and gguf.py.
"""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from teal_fast.files.checkpoint import METADATA, WEIGHTS
from teal_fast.files.load import load_model
from teal_fast.files.store import is_finite, write_safetensors
from teal_fast.files.tokenizer import Tokenizer
from teal_fast.model import ModelArgs, Transformer
from teal_fast.sparse_model import SPARSE_WEIGHT, dtype_name


def write_weights(
    folder: Path,
    args: ModelArgs,
    names: dict[str, tuple[str, ...]],
    shapes: dict[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes model.safetensors from another program's tensors.

    `read` fetches one; metadata: what else the file says of itself; for the others see `find_sources`.
    """
    expected, made_of = find_sources(args, names, shapes)

    def build(name: str) -> Tensor:
        return stack(name, [read(part) for part in made_of[name]])

    layout = {name: (dtype, stored_shape(name, shape)) for name, shape in expected.items()}
    write_safetensors(folder / WEIGHTS, layout, build, METADATA | (metadata or {}))


def find_sources(
    args: ModelArgs, names: dict[str, tuple[str, ...]], shapes: dict[str, tuple[int, ...]]
) -> tuple[dict[str, torch.Size], dict[str, tuple[str, ...]]]:
    """The dense model's tensors with their shapes, and which of another program's make each of them.

    `shapes` tells what there is; names: see `find_parts`. Raises ValueError naming what is missing, left over or
    misshapen.
    """
    expected, made_of = find_parts(args, names)
    _check_shapes(expected, made_of, shapes)
    return expected, {name: tuple(parts) for name, parts in made_of.items()}


def find_parts(
    args: ModelArgs, names: dict[str, tuple[str, ...]]
) -> tuple[dict[str, torch.Size], dict[str, dict[str, int]]]:
    """The dense model's tensors with their shapes, and the rows of each of another program's that make them.

    `names` maps a module of ours ("layers.{}.attention.wqkv") to those that make it when stacked along the outputs.
    """

    def sources(name: str) -> tuple[str, ...]:
        module, kind = name.rsplit(".", 1)
        layer = "".join(re.findall(r"\.(\d+)\.", module))
        return tuple(f"{source.format(layer)}.{kind}" for source in names[re.sub(r"\d+", "{}", module, count=1)])

    with torch.device("meta"):
        expected = {name: p.shape for name, p in Transformer(args).named_parameters()}  # a tied output appears once
    made_of = {}
    for name, shape in expected.items():
        parts = sources(name)
        made_of[name] = dict(zip(parts, _part_rows(args, name, shape, len(parts)), strict=True))
    return expected, made_of


def stack(name: str, parts: list[Tensor]) -> Tensor:
    """A tensor of ours as it is stored, of those that make it."""
    tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
    return tensor.t() if SPARSE_WEIGHT.fullmatch(name) else tensor


def unstack(name: str, stored: Tensor, parts: dict[str, int]) -> dict[str, Tensor]:
    """The inverse of `stack`: views of a stored tensor of ours, by what makes it; parts: rows of each."""
    tensor = stored.t() if SPARSE_WEIGHT.fullmatch(name) else stored
    return dict(zip(parts, tensor.split(tuple(parts.values())), strict=True))


def stored_shape(name: str, shape: torch.Size) -> torch.Size:
    return torch.Size(reversed(shape)) if SPARSE_WEIGHT.fullmatch(name) else shape


@torch.inference_mode()
def check_opens(folder: Path) -> None:
    """Opens a converted folder as later commands do: tokenizer, config, weights, and the dense pass of one token.

    Raises ValueError or FileNotFoundError. The pass reads all weights once, memory-mapped, while most of them still lie
    in the system's cache; besides them it takes one layer's weight in fp32.
    """
    try:
        Tokenizer.load(folder).encode("a")
    except (ValueError, OSError) as error:
        found = str(error).removeprefix(f"{folder}: ").replace(f"{folder}/", "")  # its name for now
        raise ValueError(f"the model's tokenizer does not open: {found}") from error
    model = load_model(folder)
    if not is_finite(model(torch.tensor([[0]]))):
        name = dtype_name(model)
        raise ValueError(f"the converted model computes NaN or inf in {name}: convert with another --dtype")


def _part_rows(args: ModelArgs, name: str, shape: torch.Size, parts: int) -> tuple[int, ...]:
    """Outputs of each part that makes a tensor of ours when stacked: q, k, v; gate, up; or the tensor itself."""
    if parts == 1:
        return (shape[0],)
    query, key = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    return (query, key, key) if ".wqkv." in name else (args.ffn_dim, args.ffn_dim)


def _check_shapes(
    expected: dict[str, torch.Size], made_of: dict[str, dict[str, int]], shapes: dict[str, tuple[int, ...]]
) -> None:
    for name, shape in expected.items():
        parts = made_of[name]
        if missing := [part for part in parts if part not in shapes]:
            raise ValueError(f"the checkpoint lacks {missing[0]}, which its config.json calls for")
        for part, outputs in parts.items():
            if shapes[part] != (outputs, *shape[1:]):
                called_for, found = [outputs, *shape[1:]], list(shapes[part])
                raise ValueError(f"the checkpoint has {part} {found}, but config.json calls for {called_for}")
    if extra := sorted(shapes.keys() - set().union(*made_of.values())):
        raise ValueError(f"the checkpoint holds {extra[0]} ({len(extra)} such), which config.json does not call for")
