"""TODO."""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from teal_fast.files.checkpoint import METADATA, WEIGHTS
from teal_fast.files.store import write_safetensors
from teal_fast.model import ModelArgs, Transformer
from teal_fast.sparse_model import SPARSE_WEIGHT


def write_weights(
    folder: Path,
    args: ModelArgs,
    names: dict[str, tuple[str, ...]],
    shapes: dict[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
) -> None:
    """Writes model.safetensors from another program's tensors.

    `names` maps a module of ours ("layers.{}.attention.wqkv") to those that make it when stacked along the outputs;
    `shapes` tells what there is, `read` fetches one. Raises ValueError naming what is missing, left over or misshapen.
    """

    def sources(name: str) -> tuple[str, ...]:
        module, kind = name.rsplit(".", 1)
        layer = "".join(re.findall(r"\.(\d+)\.", module))
        return tuple(f"{source.format(layer)}.{kind}" for source in names[re.sub(r"\d+", "{}", module, count=1)])

    with torch.device("meta"):
        expected = {name: p.shape for name, p in Transformer(args).named_parameters()}  # a tied output appears once
    made_of = {name: sources(name) for name in expected}
    output, embeddings = sources("output.weight"), made_of["tok_embeddings.weight"]
    _check_shapes(expected, made_of, shapes, unused=output if args.tie_embeddings else ())
    if args.tie_embeddings and output[0] in shapes and not torch.equal(read(output[0]), read(embeddings[0])):
        raise ValueError(f"config.json ties {output[0]} to {embeddings[0]}, but the checkpoint's two differ")

    def build(name: str) -> Tensor:
        parts = [read(part) for part in made_of[name]]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        return tensor.t() if SPARSE_WEIGHT.fullmatch(name) else tensor

    layout = {name: (dtype, _stored_shape(name, shape)) for name, shape in expected.items()}
    write_safetensors(folder / WEIGHTS, layout, build, METADATA)


def _check_shapes(
    expected: dict[str, torch.Size],
    made_of: dict[str, tuple[str, ...]],
    shapes: dict[str, tuple[int, ...]],
    unused: tuple[str, ...],
) -> None:
    for name, shape in expected.items():
        parts = made_of[name]
        if missing := [part for part in parts if part not in shapes]:
            raise ValueError(f"the checkpoint lacks {missing[0]}, which its config.json calls for")
        rows = sum(shapes[part][0] for part in parts if shapes[part])
        if any((rows, *shapes[part][1:]) != tuple(shape) for part in parts):
            found = ", ".join(f"{part} {list(shapes[part])}" for part in parts)
            raise ValueError(f"config.json calls for {name} of shape {list(shape)}, but the checkpoint has {found}")
    if extra := sorted(shapes.keys() - set(unused).union(*made_of.values())):
        raise ValueError(f"the checkpoint holds {extra[0]} ({len(extra)} such), which config.json does not call for")


def _stored_shape(name: str, shape: torch.Size) -> torch.Size:
    return torch.Size(reversed(shape)) if SPARSE_WEIGHT.fullmatch(name) else shape
